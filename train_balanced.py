"""Loss-balanced GAN for a few hundred images on a small machine (jhayes14's adversarial faces).

When one network runs ahead, the other learns nothing from it. Here both losses are means of binary
cross-entropy per image, ln 2 each at balance, and whenever they lie more than a margin apart the
network with the higher loss gets extra updates on the same batch until they do not.

    python train_balanced.py --path faces/                  # 64 pixels, 200 epochs
    python train_balanced.py --path faces/ --flip           # faces may be mirrored
    python train_balanced.py --path faces/ --margin inf     # without the rule
    python train_balanced.py --resume --epochs 400          # the newest run goes on
    python generate.py --nearest faces/                     # are the samples copies?

What to expect from 400 photographs of cats on two cores of an AMD EPYC in float32: eyes after
16,000 images (4 minutes), faces of many colours after 64,000 (17 minutes). In the one comparison
made, on these cats, --margin inf was as clear, with more kinds of fur and in less time: try both.
Width and rates are not the published ones, --width 128 --lrd 2e-5 --lrg 2e-5, 16 times as slow.
"""

import itertools
import sys

import torch
import torch.nn.functional as F
from torch import nn

import common


def get_args(argv, **flags):
    parser = common.run_parser(__file__, __doc__, epochs=200, batch_size=50)
    number, rate = common.bounded(int, 1, 65536), common.bounded(float, 0, 1e38)
    add = parser.add_argument
    add(
        "--margin",
        type=common.bounded(float, 0),
        default=0.1,
        help="how far the losses may lie apart; inf: any",
    )
    add("--max_extra", type=common.bounded(int, 0), default=10, help="extra updates in a step")
    add("--z_dim", type=number, default=100, help="numbers of noise that make one image")
    add("--width", type=number, default=32, help="channels next to the image; 128: as published")
    add("--lrd", type=rate, default=1e-4, help="Adam's rate for D; 2e-5: as published")
    add("--lrg", type=rate, default=1e-4, help="Adam's rate for G; 2e-5: as published")
    add("--beta1", type=common.bounded(float, 0, 0.999), default=5e-4, help="Adam's momentum")
    add("--dropout", type=common.bounded(float, 0, 0.9), default=0.2, help="in D")
    args = common.parse_flags(parser, argv, flags)
    if not args.path and not args.dataset:
        args.dataset = "glyphs"
        print("no --path: training on drawn characters, 32 pixels")
    args.image_size = args.image_size or (32 if args.dataset else 64)
    if args.image_size not in (16, 32, 64, 128, 256):
        raise common.UserError(f"--image_size {args.image_size} is not 16, 32, 64, 128 or 256")
    return args


def stage_widths(image_size, width):
    """Channels from the 4x4 stage to the one next to the image: 64, width 128 -> 1024 ... 128."""
    stages = image_size.bit_length() - 3
    return [width * min(2**i, 8) for i in reversed(range(stages))]


class UpsampleConv(nn.Conv2d):
    """Nearest upsampling by 2, then a 5x5 convolution; in 9 multiplications an output, not 25.

    Upsampled rows come in equal pairs, so five taps w0 ... w4 fall on three rows of the input, with
    the weights (w0 + w1, w2 + w3, w4) for even outputs and (w0, w1 + w2, w3 + w4) for odd ones.
    The same holds for columns: four 3x3 convolutions, whose outputs are interleaved.
    """

    TAPS = (
        ((1, 1, 0, 0, 0), (0, 0, 1, 1, 0), (0, 0, 0, 0, 1)),
        ((1, 0, 0, 0, 0), (0, 1, 1, 0, 0), (0, 0, 0, 1, 1)),
    )

    def __init__(self, before, after):
        super().__init__(before, after, 5)
        taps = torch.tensor(self.TAPS).float()
        taps = torch.einsum("auk,bvl->abuvkl", taps, taps).reshape(36, 25)
        self.register_buffer("taps", taps, persistent=False)

    def forward(self, h):
        weight = self.weight.permute(0, 2, 3, 1).flatten(1, 2)  # (out, 25, in)
        four = (self.taps @ weight).view(-1, 3, 3, self.in_channels).permute(0, 3, 1, 2)
        four = F.conv2d(h, four, self.bias.repeat_interleave(4), padding=1)  # (N, 4 out, H, W)
        return F.pixel_shuffle(four, 2)  # (N, out, 2 H, 2 W)


class Generator(nn.Module):
    """z (N, z_dim) -> images (N, channels, image_size, image_size) in [-1, 1]."""

    def __init__(self, image_size=64, channels=3, z_dim=100, width=128):
        super().__init__()
        self.widths = stage_widths(image_size, width)
        features = 4 * 4 * self.widths[0]  # each with a BatchNorm of its own
        self.project = nn.Sequential(
            nn.Linear(z_dim, features), nn.BatchNorm1d(features), nn.ReLU()
        )
        layers = []
        for before, after in itertools.pairwise(self.widths):  # each doubles the side
            layers += [UpsampleConv(before, after), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, UpsampleConv(self.widths[-1], channels))

    def forward(self, z):
        h = self.project(z).view(-1, 4, 4, self.widths[0]).permute(0, 3, 1, 2)  # (N, C, 4, 4)
        return torch.tanh(self.layers(h).float())


class Discriminator(nn.Module):
    """Images (N, channels, image_size, image_size) -> logits (N,), float32; D(x) = sigmoid."""

    def __init__(self, image_size=64, channels=3, width=128, dropout=0.2):
        super().__init__()
        widths, layers = stage_widths(image_size, width)[::-1], []
        for before, after in itertools.pairwise([channels, *widths]):  # each halves the side
            layers += [nn.Conv2d(before, after, 5, 2, 2), nn.LeakyReLU(0.2, inplace=True)]
            layers.append(nn.Dropout(dropout))
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4))  # dense: (N, 1, 1, 1)

    def forward(self, images):
        return self.layers(images).flatten().float()


def init_weights(net):
    """From N(0, 0.02), BatchNorm's from N(1, 0.02), as in DCGAN (Radford et al., 2015)."""
    for layer in net.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.normal_(layer.weight, 0.0, 0.02)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)


def update_d(D, opt_d, real, fake):
    """D: maximize log D(x) + log(1 - D(G(z))). Returns its loss before that, and its answers.

    -log D(x) = softplus(-logit) and -log(1 - D(x)) = softplus(logit). The mean is over real and
    fake images together. They share a pass, as no BatchNorm mixes them.
    """
    logits_real, logits_fake = D(torch.cat([real, fake.detach()])).chunk(2)
    loss_d = torch.cat([F.softplus(-logits_real), F.softplus(logits_fake)]).mean()
    opt_d.zero_grad()
    loss_d.backward()
    common.sync_grads(D)
    opt_d.step()
    return {
        "loss_d": common.rank_mean(loss_d.detach()),
        "d_real": logits_real.detach().sigmoid().mean(),
        "d_fake": logits_fake.detach().sigmoid().mean(),  # before D's update
    }


def update_g(G, D, opt_g, z, fake=None):
    """G: maximize log D(G(z)), the non-saturating form; `fake`: G(z), where it is there already."""
    D.requires_grad_(False)
    logits_fake = D(G(z) if fake is None else fake)
    loss_g = F.softplus(-logits_fake).mean()
    opt_g.zero_grad()
    loss_g.backward()
    common.sync_grads(G)
    opt_g.step()
    D.requires_grad_(True)
    d_fake_after = logits_fake.detach().sigmoid().mean()
    return {"loss_g": common.rank_mean(loss_g.detach()), "d_fake_after": d_fake_after}


def update_both(G, D, opt_d, opt_g, real, z):
    """D, then G, with the same images; these are returned too."""
    fake = G(z)
    stats = update_d(D, opt_d, real, fake) | update_g(G, D, opt_g, z, fake)
    return stats | {"fake": fake.detach()}


UPDATES = update_both, update_d, update_g


def balance(loss_d, loss_g, extra_d, extra_g, args):
    """Update the network with the higher loss until the losses lie within the margin.

    It stops too when the other loss becomes the higher one, and after max_extra updates. `extra_d`
    and `extra_g` make one update and return the loss before it; the other loss is not computed
    again. Returns the number of extra updates of D, of G, and whether the bound ended them.
    """
    extra, gap = 0, (loss_d - loss_g).item()  # waits for the device: the next update depends on it
    d_is_behind = gap > 0  # chosen once a step
    while apart := abs(gap) > args.margin and (gap > 0) == d_is_behind:
        if extra == args.max_extra:
            break
        if d_is_behind:
            loss_d = extra_d()
        else:
            loss_g = extra_g()
        extra, gap = extra + 1, (loss_d - loss_g).item()
    return (extra, 0, int(apart)) if d_is_behind else (0, extra, int(apart))


def train_step(G, D, opt_d, opt_g, real, args, updates=UPDATES):
    """An update of D and one of G, then those that balance asks for. Returns 0-d tensors."""
    both, again_d, again_g = updates
    z = torch.rand(len(real), args.z_dim, device=real.device) * 2 - 1
    stats = both(G, D, opt_d, opt_g, real, z)
    fake = stats.pop("fake")
    extra_d = lambda: again_d(D, opt_d, real, fake)["loss_d"]
    extra_g = lambda: again_g(G, D, opt_g, z)["loss_g"]
    counts = balance(stats["loss_d"], stats["loss_g"], extra_d, extra_g, args)
    number = lambda value: torch.full((), float(value), device=real.device)  # waits for nothing
    return stats | dict(zip(("extra_d", "extra_g", "bound"), map(number, counts)))


def imbalance(stats, args):
    """What it means that most of these steps hit the bound, and what helps; else None."""
    rows = [torch.stack([s["bound"], s["extra_d"], s["extra_g"]]) for s in stats]
    bound, of_d, of_g = torch.stack(rows).sum(0).tolist()  # waits for the device once
    if bound <= len(stats) / 2:
        return None
    behind, ahead = ("D", "G") if of_d > of_g else ("G", "D")
    return (
        f"in most steps {behind} stays behind {ahead} even with {args.max_extra} extra updates: "
        f"raise --lr{behind.lower()}, lower --lr{ahead.lower()}, or allow it with a larger --margin"
    )


def train(*argv, **flags):
    """Train as the command line does, train(path="faces/"); returns the run's folder."""
    args = get_args(argv, **flags)
    device = common.setup(args)
    images, _ = common.load_data(args)  # uint8 (N, H, W, C); their classes

    size = {"image_size": args.image_size, "channels": images.shape[-1], "width": args.width}
    generator_args = size | {"z_dim": args.z_dim}
    G, D = Generator(**generator_args), Discriminator(**size, dropout=args.dropout)
    if args.summary:
        return print(common.summary(G), common.summary(D))
    init_weights(G)
    init_weights(D)
    G_ema = common.averaged(G, device)
    G, D = common.prepare(G, device, args), common.prepare(D, device, args)
    opt_d = torch.optim.Adam(D.parameters(), args.lrd, (args.beta1, 0.999), fused=True)
    opt_g = torch.optim.Adam(G.parameters(), args.lrg, (args.beta1, 0.999), fused=True)

    latent = {"dim": args.z_dim, "distribution": "uniform"}  # as train_step draws z
    state = {"G": G, "D": D, "G_ema": G_ema, "opt_d": opt_d, "opt_g": opt_g}
    run = common.Run(args, __file__, images, device, generator_args, latent, **state)
    # a graph each, since the rule between them waits for the device
    updates = [common.Recorded(update, device, args) for update in UPDATES]
    steps, told = [], None
    for real in run.batches():
        epoch, stats = run.epoch, train_step(G, D, opt_d, opt_g, real, args, updates)
        common.update_ema(G_ema, G, run.step, args.ema)
        run.end_step(stats)
        steps.append(stats)
        if run.epoch > epoch:
            advice, steps = imbalance(steps, args), []
            if advice and advice != told:
                common.say(f"\nepoch {run.epoch}: {advice}")
            told = advice
    return run.folder


def main():
    with common.exit_codes():
        train(*sys.argv[1:])


if __name__ == "__main__":
    main()
