"""train_dcgan.py with what was tried on it and did not win: docs/experiments.md has the figures.

    python tests/train_variants.py --path imgs/ --upsample
    python tests/train_variants.py --path imgs/ --spectral
    python tests/train_variants.py --path imgs/ --norm_d none --r1 1 --every 16
    python tests/train_variants.py --path imgs/ --norm none --relativistic --r1 1 --r2 1
    python tests/train_variants.py --path imgs/ --emas 0.99 0.9995

Its rates, batch and decay are those of the plain recipe. With train_dcgan.py's, and without a flag
of its own, it does what that does, bit for bit.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import train_dcgan


def get_args(argv, **flags):
    parser = common.run_parser(__file__, __doc__, epochs=50, batch_size=64)
    number, rate = common.bounded(int, 1, 65536), common.bounded(float, 0)
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument
    add("--z_dim", type=number, default=100)
    add("--width", type=number, default=64)
    add("--lrd", type=rate, default=2e-4)
    add("--lrg", type=rate, default=2e-4)
    add("--beta1", type=common.bounded(float, 0, 0.999), default=0.5)
    add("--beta2", type=common.bounded(float, 0, 0.9999), default=0.999)
    add("--lr_decay", type=rate, default=1.0)
    add("--hold", type=rate, help="thousand images after which the rates fall")
    add("--power", type=rate, default=1.0, help="as (hold / thousand images seen) to this power")
    add("--one_sided", type=common.bounded(float, 0, 1), default=0.0)
    add("--norm", choices=["batch", "none"], default="batch", help="of G")
    add("--norm_d", choices=["batch", "none"], default="batch", help="of D")
    add("--augment", choices=["need", "none"], default="none", help="need: as train_dcgan's")
    add("--init", choices=["normal", "xavier"], default="normal")
    add("--upsample", action=switch, default=False, help="nearest x2, 3x3 convolution")
    add("--spectral", action=switch, default=False, help="D: Miyato et al., 2018")
    add("--relativistic", action=switch, default=False, help="the pairing loss of R3GAN")
    add("--r1", type=rate, default=0.0, help="gamma of |grad D(x)|^2 / 2 (Mescheder et al., 2018)")
    add("--r2", type=rate, default=0.0, help="the same of samples; with the former, R3GAN's")
    add("--every", type=number, default=1, help="steps between penalties, that times as strong")
    add("--emas", type=float, nargs="*", default=[], help="decays of more averaged generators")
    args = common.parse_flags(parser, argv, flags)
    if not args.path and not args.dataset:
        args.dataset = "glyphs"
    args.image_size = args.image_size or (32 if args.dataset else 64)
    return args


class Generator(train_dcgan.Generator):
    """train_dcgan's; with `upsample` its transposed convolutions are replaced."""

    def __init__(self, upsample=False, **args):
        super().__init__(**args)
        for i, layer in enumerate(self.layers) if upsample else ():
            if isinstance(layer, nn.ConvTranspose2d):
                channels, bias = (layer.in_channels, layer.out_channels), layer.bias is not None
                conv = nn.Conv2d(*channels, 3, padding=1, bias=bias)
                self.layers[i] = nn.Sequential(nn.Upsample(scale_factor=2), conv)


def train_step(G, D, opt_d, opt_g, augment, real, penalize, args):
    """train_dcgan.train_step at k=1 on one rank, with the losses of the flags."""
    fake = G(torch.randn(len(real), args.z_dim, device=real.device))
    seen = augment(real)
    logits_real = D(seen)
    logits_fake = D(augment(fake.detach()))
    if args.relativistic:  # D: maximize log sigmoid(D(x) - D(G(z))), in pairs
        loss_d = F.softplus(logits_fake - logits_real).mean()
    else:
        s = args.one_sided
        loss_real = (1 - s) * F.softplus(-logits_real) + s * F.softplus(logits_real)
        loss_d = loss_real.mean() + F.softplus(logits_fake).mean()
    objective = loss_d
    for gamma, images in ((args.r1, seen), (args.r2, fake)):
        if gamma and penalize:
            objective = objective + args.every * gamma / 2 * train_dcgan.r1_penalty(D, images)
    opt_d.zero_grad()
    objective.backward()
    opt_d.step()
    augment.update(logits_real.detach())

    D.requires_grad_(False)
    logits_fake_g = D(augment(fake))
    loss_g = F.softplus(-logits_fake_g).mean()
    if args.relativistic:
        loss_g = F.softplus(logits_real.detach() - logits_fake_g).mean()
    opt_g.zero_grad()
    loss_g.backward()
    opt_g.step()
    D.requires_grad_(True)
    return {
        "loss_d": loss_d.detach(),
        "loss_g": loss_g.detach(),
        "d_real": logits_real.detach().sigmoid().mean(),
        "d_fake": logits_fake.detach().sigmoid().mean(),
        "d_fake_after": logits_fake_g.detach().sigmoid().mean(),
        "p": augment.p.clone(),
    }


def train(*argv, **flags):
    args = get_args(argv, **flags)
    device = common.setup(args)
    images, _ = common.load_data(args)

    size = {"image_size": args.image_size, "channels": images.shape[-1], "width": args.width}
    own = {"z_dim": args.z_dim, "norm": args.norm, "upsample": args.upsample}
    G, D = Generator(**size, **own), train_dcgan.Discriminator(**size, norm=args.norm_d)
    train_dcgan.init_weights(G, args.init)
    train_dcgan.init_weights(D, args.init)
    for module in D.modules() if args.spectral else ():
        if type(module) is nn.Conv2d:
            spectral_norm(module)
    G_ema = copy.deepcopy(G).to(device).requires_grad_(False).eval()
    more = {f"G_ema_{decay}": copy.deepcopy(G_ema) for decay in args.emas}
    G, D = common.prepare(G, device, args), common.prepare(D, device, args)
    betas = args.beta1, args.beta2
    opt_d = torch.optim.Adam(D.parameters(), args.lrd, betas, fused=True)
    opt_g = torch.optim.Adam(G.parameters(), args.lrg, betas, fused=True)

    augment = train_dcgan.Augment(args.image_size, args.augment == "need").to(device)
    z = {"dim": args.z_dim, "distribution": "normal"}
    state = {"G": G, "D": D, "G_ema": G_ema, "opt_d": opt_d, "opt_g": opt_g, "augment": augment}
    state |= more
    run = common.Run(args, __file__, images, device, size | own, z, **state)
    step = common.Recorded(train_step, device, args)
    for real in run.batches():
        scale = args.lr_decay**run.epoch
        if args.hold:
            kimg = run.images_seen / 1000
            scale *= (args.hold / max(kimg, args.hold)) ** args.power
        for opt, rate in ((opt_d, args.lrd), (opt_g, args.lrg)):
            opt.param_groups[0]["lr"] = rate * scale
        penalize = run.step % args.every == 0
        stats = step(G, D, opt_d, opt_g, augment, real, penalize, args)
        for decay, average in [(args.ema, G_ema), *zip(args.emas, more.values())]:
            common.update_ema(average, G, run.step, decay)
        run.end_step(stats)
    return run.folder


if __name__ == "__main__":
    with common.exit_codes():
        train(*sys.argv[1:])
