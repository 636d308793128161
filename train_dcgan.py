"""DCGAN: a convolutional generative adversarial network (Radford et al., 2015, arXiv:1511.06434).

A generator G turns noise z into images; a discriminator D learns to tell them from real ones, and
G learns from D's gradient. Transposed convolutions in G, strided ones in D, BatchNorm in between.

    python train_dcgan.py                              # coloured characters, needs no data
    python train_dcgan.py --path imgs/ --epochs 50     # a folder or .zip of images, at 64 pixels
    python train_dcgan.py --resume --epochs 100        # the newest run goes on
    python generate.py --img_num 64                    # images of the newest run

Unless typed: 50 epochs in batches of 32; drawn characters: 20 in batches of 16, rates of 2e-3. R1
holds D for these and for MNIST.

What to expect on two cores of an AMD EPYC: characters, most of them legible, in two to four
minutes; from 12,000 photographs of cats at 64 pixels blurred faces after 48,000 images (15 minutes
in float32), clear ones after 132,000 (40 minutes), fur and whiskers after 300,000 (92 minutes; 28
in bf16 and batches of 64). One NVIDIA H200 sees a million of them in 75 seconds.
"""

import itertools
import sys

import torch
import torch.nn.functional as F
from torch import nn

import common

R1_EVERY = 16  # steps from penalty to penalty, each that many times as strong (Karras et al., 2020)


def get_args(argv, **flags):
    # batch, decay and rates won in docs/experiments.md; the paper's are 128, no average and 2e-4.
    # What is None here is settled below, by data and size.
    parser = common.run_parser(__file__, __doc__, epochs=None, batch_size=None, ema=0.9999)
    number, rate = common.bounded(int, 1, 65536), common.bounded(float, 0, 1e38)
    add = parser.add_argument
    add("--z_dim", type=number, default=100, help="numbers of noise that make one image")
    add("--width", type=number, help="channels next to the image, doubling inwards up to 8 times")
    add("--lrd", type=rate, help="Adam's rate for D; default: 2e-4, below 64 pixels 4e-4")
    add("--lrg", type=rate, help="the same for G; TTUR: other than D's")
    add("--beta1", type=common.bounded(float, 0, 0.999), default=0.5, help="Adam's momentum")
    add("--k", type=number, default=1, help="batches for D per update of G (Goodfellow et al.)")
    add("--one_sided", type=common.bounded(float, 0, 1), default=0.0,
        help="label smoothing: D's target for real images is 1 minus this")  # fmt: skip
    add("--r1", type=rate, metavar="GAMMA",
        help="R1: a penalty in place of D's BatchNorm; default: 0, glyphs, mnist 1")  # fmt: skip
    add("--lr_decay", type=common.bounded(float, 0, 1), default=1.0,
        help="both rates times this after every epoch")  # fmt: skip
    add("--augment", choices=["need", "none"],
        help="need: disturb images as D gets too sure; default: need, with --r1 none")  # fmt: skip
    add("--norm", choices=["batch", "none"], default="batch", help="normalisation of inner layers")
    add("--alpha", type=rate, default=0.2, help="LeakyReLU slope in D")
    add("--alpha_g", type=rate, default=0.0, help="LeakyReLU slope in G; 0 is ReLU")
    add("--init", choices=["normal", "xavier"],
        help="initial weights; default: normal, N(0, 0.02), or xavier with --r1")  # fmt: skip
    args = common.parse_flags(parser, argv, flags)
    if not args.path and not args.dataset:
        args.dataset = "glyphs"
        print("no --path: training on drawn characters, 32 pixels")
    args.image_size = args.image_size or (32 if args.dataset else 64)
    if args.image_size not in (16, 32, 64, 128, 256):
        raise common.UserError(f"--image_size {args.image_size} is not 16, 32, 64, 128 or 256")
    drawn = args.dataset == "glyphs"  # to be legible in minutes
    args.width = args.width or (32 if drawn else 64)
    args.epochs = args.epochs or (20 if drawn else 50)
    args.batch_size = args.batch_size or (16 if drawn else 32)
    fitting = 2e-3 if drawn else 4e-4 if args.image_size < 64 else 2e-4
    args.lrd = fitting if args.lrd is None else args.lrd
    args.lrg = fitting if args.lrg is None else args.lrg
    if args.r1 is None:
        args.r1 = 1.0 if args.dataset in ("glyphs", "mnist") else 0.0
    if args.r1 and args.compile:
        raise common.UserError("--compile has no second derivatives for --r1: omit it, or --r1 0")
    args.init = args.init or ("xavier" if args.r1 else "normal")
    args.augment = args.augment or ("none" if args.r1 else "need")  # R1 holds D without it
    return args


def stage_widths(image_size, width):
    """Channels from the 4x4 stage to the one next to the image: 64, width 64 -> 512 256 128 64."""
    stages = image_size.bit_length() - 3
    return [width * min(2**i, 8) for i in reversed(range(stages))]


def norm_layer(norm, channels):
    return [nn.BatchNorm2d(channels)] if norm == "batch" else []


class Generator(nn.Module):
    """z (N, z_dim) -> images (N, channels, image_size, image_size) in [-1, 1]."""

    def __init__(self, image_size=64, channels=3, z_dim=100, width=64, norm="batch", alpha=0.0):
        super().__init__()
        bias = norm == "none"  # BatchNorm has its own
        self.widths = stage_widths(image_size, width)
        self.project = nn.Linear(z_dim, 4 * 4 * self.widths[0], bias=bias)
        layers = norm_layer(norm, self.widths[0]) + [nn.LeakyReLU(alpha, inplace=True)]
        for before, after in itertools.pairwise(self.widths):  # each doubles the side
            layers.append(nn.ConvTranspose2d(before, after, 4, 2, 1, bias=bias))
            layers += norm_layer(norm, after) + [nn.LeakyReLU(alpha, inplace=True)]
        layers += [nn.ConvTranspose2d(self.widths[-1], channels, 4, 2, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, z):
        h = self.project(z).view(-1, 4, 4, self.widths[0]).permute(0, 3, 1, 2)  # (N, C, 4, 4)
        return torch.tanh(self.layers(h).float())


class Discriminator(nn.Module):
    """Images (N, channels, image_size, image_size) -> logits (N,), float32; D(x) = sigmoid."""

    def __init__(self, image_size=64, channels=3, width=64, norm="batch", alpha=0.2):
        super().__init__()
        widths = stage_widths(image_size, width)[::-1]
        layers = [nn.Conv2d(channels, widths[0], 4, 2, 1), nn.LeakyReLU(alpha, inplace=True)]
        for before, after in itertools.pairwise(widths):  # each halves the side
            layers.append(nn.Conv2d(before, after, 4, 2, 1, bias=norm == "none"))
            layers += norm_layer(norm, after) + [nn.LeakyReLU(alpha, inplace=True)]
        layers += [nn.Conv2d(widths[-1], 1, 4)]  # (N, 1, 1, 1)
        self.layers = nn.Sequential(*layers)

    def forward(self, images):
        return self.layers(images).flatten().float()


def init_weights(net, init):
    """From N(0, 0.02), BatchNorm's from N(1, 0.02) (Radford et al., 2015); or "xavier"."""
    for layer in net.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            if init == "normal":
                nn.init.normal_(layer.weight, 0.0, 0.02)
            else:
                nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d) and init == "normal":
            nn.init.normal_(layer.weight, 1.0, 0.02)


TARGET, MOST, PACE = 0.75, 0.5, 50_000  # of `sure`; of p; images for p to go from 0 to 1
SPREAD = 0.2  # of log2 of an image's size


class Augment(nn.Module):
    """Shifts, resizes and stretches what D sees, real and generated alike; G learns through it.

    Each with probability p, which `update` moves by need (Karras et al., 2020, arXiv:2006.06676).
    """

    def __init__(self, image_size, on=True):
        super().__init__()
        self.on = on
        place = torch.arange(image_size) - (image_size - 1) / 2  # of a pixel, from the centre
        self.register_buffer("place", place, persistent=False)
        bends = SPREAD * torch.tensor([[1.0, 1.0], [-1.0, 1.0]])  # scale, stretch: of each axis
        self.register_buffer("bends", bends, persistent=False)
        self.register_buffer("p", torch.tensor(0.0))
        self.register_buffer("sure", torch.tensor(0.0))

    @torch.no_grad()
    def update(self, logits_real):
        """After an update of D: move p by D's logits of the real images as it saw them, (N,)."""
        if self.on:
            self.sure.lerp_(common.rank_mean(logits_real.sign().mean()), 0.03)
            step = len(logits_real) * common.WORLD_SIZE / PACE
            self.p.add_((self.sure - TARGET).sign(), alpha=step).clamp_(0, MOST)

    def forward(self, images):
        """Images (N, C, side, side), resampled bilinearly, with zeros from outside."""
        if not self.on:
            return images
        n, channels, side, _ = images.shape
        uniform = torch.rand(n, 6, device=images.device)
        hit = uniform[:, :4] < self.p  # moved down, right; scaled, stretched
        shift = ((uniform[:, 4:] - 0.5) * (side / 4) * hit[:, :2]).round()  # up to an eighth
        zoom = torch.exp2((torch.randn(n, 2, device=images.device) * hit[:, 2:]) @ self.bends)
        # where each row and column comes from, then matrices that take it from there
        source = (self.place - shift[..., None]) * zoom[..., None]  # (N, 2, side)
        rows, columns = F.relu(1 - (source[..., None] - self.place).abs()).unbind(1)
        images = images.flatten(1, 2) @ columns.mT  # (N, C * side, side)
        return rows[:, None] @ images.view(n, channels, side, side)


def r1_penalty(D, images):
    """Mean of |dD/dx|^2 over images (N, C, H, W), which holds D flat around them.

    R1 of Mescheder et al., 2018, arXiv:1801.04406. D's logits must not depend on the batch.
    """
    images = images.detach().requires_grad_()
    (slopes,) = torch.autograd.grad(D(images).sum(), images, create_graph=True)
    return slopes.square().sum((1, 2, 3)).mean()


def train_step(G, D, opt_d, opt_g, augment, real, penalize, args):
    """k updates of D, each with fresh images, then one of G. Returns detached 0-d tensors.

    real: (k * N, C, H, W) in [-1, 1]; penalize: with R1? All losses are means of -log D or
    -log(1 - D), from logits: -log D(x) = softplus(-logit) and -log(1 - D(x)) = softplus(logit).
    For another loss change loss_real, loss_d, loss_g; augment needs the sign of logits_real only.
    """
    for x in real.chunk(args.k):
        # D: maximize log D(x) + log(1 - D(G(z))). Real and fake go separately: BatchNorm must not
        # mix them. With one-sided smoothing s: (1 - s) log D(x) + s log(1 - D(x)) for the real.
        fake = G(torch.randn(len(x), args.z_dim, device=x.device))
        seen = augment(x)
        logits_real = D(seen)
        logits_fake = D(augment(fake.detach()))
        s = args.one_sided
        loss_real = (1 - s) * F.softplus(-logits_real) + s * F.softplus(logits_real)
        loss_d = loss_real.mean() + F.softplus(logits_fake).mean()
        objective = loss_d
        if penalize:
            objective = loss_d + R1_EVERY * args.r1 / 2 * r1_penalty(D, seen)
        opt_d.zero_grad()
        objective.backward()
        common.sync_grads(D)
        opt_d.step()
        augment.update(logits_real.detach())

    # G: maximize log D(G(z)), the non-saturating form, with the images that D has just seen
    D.requires_grad_(False)
    logits_fake_g = D(augment(fake))
    loss_g = F.softplus(-logits_fake_g).mean()
    opt_g.zero_grad()
    loss_g.backward()
    common.sync_grads(G)
    opt_g.step()
    D.requires_grad_(True)
    return {
        "loss_d": loss_d.detach(),
        "loss_g": loss_g.detach(),
        "d_real": logits_real.detach().sigmoid().mean(),
        "d_fake": logits_fake.detach().sigmoid().mean(),  # before D's update
        "d_fake_after": logits_fake_g.detach().sigmoid().mean(),
        "p": augment.p.clone(),  # of each augmentation
    }


def train(*argv, **flags):
    """Train as the command line does, train(path="imgs/", epochs=50); returns the run's folder."""
    args = get_args(argv, **flags)
    device = common.setup(args)
    images, _ = common.load_data(args)  # uint8 (N, H, W, C); their classes

    size = {"image_size": args.image_size, "channels": images.shape[-1], "width": args.width}
    generator_args = size | {"z_dim": args.z_dim, "norm": args.norm, "alpha": args.alpha_g}
    G = Generator(**generator_args)
    D = Discriminator(**size, norm="none" if args.r1 else args.norm, alpha=args.alpha)
    if args.summary:
        return print(common.summary(G), common.summary(D))
    init_weights(G, args.init)
    init_weights(D, args.init)
    G_ema = common.averaged(G, device)
    G, D = common.prepare(G, device, args), common.prepare(D, device, args)
    opt_d = torch.optim.Adam(D.parameters(), args.lrd, (args.beta1, 0.999), fused=True)
    opt_g = torch.optim.Adam(G.parameters(), args.lrg, (args.beta1, 0.999), fused=True)

    augment = Augment(args.image_size, args.augment == "need").to(device)
    latent = {"dim": args.z_dim, "distribution": "normal"}  # as train_step draws z
    state = {"G": G, "D": D, "G_ema": G_ema, "opt_d": opt_d, "opt_g": opt_g, "augment": augment}
    run = common.Run(args, __file__, images, device, generator_args, latent, args.k, **state)
    step = common.Recorded(train_step, device, args)
    for real in run.batches():
        for opt, rate in ((opt_d, args.lrd), (opt_g, args.lrg)):
            opt.param_groups[0]["lr"] = rate * args.lr_decay**run.epoch
        penalize = args.r1 > 0 and run.step % R1_EVERY == 0
        stats = step(G, D, opt_d, opt_g, augment, real, penalize, args)
        common.update_ema(G_ema, G, run.step, args.ema)
        run.end_step(stats)
    return run.folder


def main():
    with common.exit_codes():
        train(*sys.argv[1:])


if __name__ == "__main__":
    main()
