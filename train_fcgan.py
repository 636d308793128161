"""Fully connected GAN (Goodfellow et al., 2014, arXiv:1406.2661) on MNIST, CIFAR-10 or a folder.

No convolutions: G and D are stacks of linear layers that see an image as one long row of pixels.
That is enough for digits, and the shortest way to see what the two losses do. As published, without
BatchNorm in G and dropout in D (--norm none --dropout 0), D wins after ten epochs and every sample
becomes the same; see "Digits" in docs/results.md.

    python train_fcgan.py                              # MNIST, downloaded once into data/
    python train_fcgan.py --dataset cifar10 --label 7  # CIFAR-10's horses alone
    python train_fcgan.py --path imgs/ --image_size 32
    python train_fcgan.py --resume --epochs 150        # the newest run goes on
    python generate.py --grid_size 10                  # images of the newest run

What to expect: all ten digits, most of them clear, after 100 epochs of MNIST, 11.5 minutes on
two cores of an AMD EPYC in bf16. On a GPU the step is recorded as a CUDA graph and replayed.
"""

import argparse
import itertools
import sys

import torch
import torch.nn.functional as F
from torch import nn

import common


def sizes(text):
    """An argparse type: "512,256" -> "512,256", refused if it is no list of widths."""
    for width in text.split(","):
        common.bounded(int, 1, 65536)(width)
    return text


def get_args(argv, **flags):
    parser = common.run_parser(__file__, __doc__, epochs=100, batch_size=128)
    number, rate = common.bounded(int, 1, 65536), common.bounded(float, 0, 1e38)
    add = parser.add_argument
    add("--z_dim", type=number, default=100, help="numbers of noise that make one image")
    add("--hidden_g", type=sizes, help="widths of G's layers: 128,256,512,1024 (CIFAR-10: ,2048)")
    add("--hidden_d", type=sizes, help="widths of D's layers: 512,256 (CIFAR-10: 1024,512,256)")
    add("--lrd", type=rate, default=2e-4, help="Adam's rate for D")
    add("--lrg", type=rate, default=2e-4, help="Adam's rate for G")
    add("--beta1", type=common.bounded(float, 0, 0.999), default=0.5, help="Adam's momentum")
    add("--k", type=number, default=1, help="batches for D per update of G")
    add("--norm", choices=["batch", "none"], default="batch", help="of G; none: published")
    add("--dropout", type=common.bounded(float, 0, 0.9), default=0.15, help="in D; 0: as published")
    add("--alpha", type=rate, default=0.2, help="LeakyReLU slope in G and D")
    switch = argparse.BooleanOptionalAction
    add("--flip_labels", action=switch, default=False, help="D says 0 for real and 1 for fake")
    args = common.parse_flags(parser, argv, flags)
    if not args.path and not args.dataset:
        args.dataset = "mnist"
        print("no --path, no --dataset: training on MNIST")
    own_size = {"mnist": 28, "cifar10": 32, "glyphs": 32}
    args.image_size = args.image_size or own_size.get(args.dataset, 64)
    deep = args.dataset == "cifar10"
    args.hidden_g = args.hidden_g or "128,256,512,1024" + ",2048" * deep
    args.hidden_d = args.hidden_d or "1024," * deep + "512,256"
    return args


class Generator(nn.Module):
    """z (N, z_dim) -> images (N, channels, image_size, image_size) in [-1, 1]."""

    def __init__(self, image_size, channels, z_dim, hidden, norm="batch", alpha=0.2):
        super().__init__()
        self.shape, layers = (channels, image_size, image_size), []
        for before, after in itertools.pairwise([z_dim, *hidden]):
            layers.append(nn.Linear(before, after))
            layers += [nn.BatchNorm1d(after)] if norm == "batch" else []
            layers.append(nn.LeakyReLU(alpha, inplace=True))
        layers.append(nn.Linear(hidden[-1], channels * image_size**2))
        self.layers = nn.Sequential(*layers)

    def forward(self, z):
        return torch.tanh(self.layers(z).float()).view(-1, *self.shape)


class Discriminator(nn.Module):
    """Images (N, channels, image_size, image_size) -> logits (N,), float32; D(x) = sigmoid."""

    def __init__(self, image_size, channels, hidden, dropout=0.15, alpha=0.2):
        super().__init__()
        layers = []
        for before, after in itertools.pairwise([channels * image_size**2, *hidden]):
            layers += [nn.Linear(before, after), nn.LeakyReLU(alpha, inplace=True)]
            layers += [nn.Dropout(dropout)] if dropout else []
        self.layers = nn.Sequential(*layers, nn.Linear(hidden[-1], 1))

    def forward(self, images):
        return self.layers(images.flatten(1)).flatten().float()


def train_step(G, D, opt_d, opt_g, real, args):
    """k updates of D, each with fresh images, then one of G. Returns detached 0-d tensors.

    real: (k * N, C, H, W) in [-1, 1]. Losses are means of -log P(right), from logits: with the
    logit of "real", -log P(real) = softplus(-logit) and -log P(fake) = softplus(logit). With
    --flip_labels D's output is the logit of "fake", hence the sign.
    """
    sign = -1.0 if args.flip_labels else 1.0
    for x in real.chunk(args.k):
        # D: maximize log P(real | x) + log P(fake | G(z)); in one pass, as no BatchNorm mixes them
        fake = G(torch.randn(len(x), args.z_dim, device=x.device))
        both = torch.cat([x, fake.detach()])
        logits_real, logits_fake = (sign * D(both)).chunk(2)
        loss_d = F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()
        opt_d.zero_grad()
        loss_d.backward()
        common.sync_grads(D)
        opt_d.step()

    # G: maximize log P(real | G(z)), the non-saturating form, with the images D has just seen
    D.requires_grad_(False)
    logits_fake_g = sign * D(fake)
    loss_g = F.softplus(-logits_fake_g).mean()
    opt_g.zero_grad()
    loss_g.backward()
    common.sync_grads(G)
    opt_g.step()
    D.requires_grad_(True)
    return {
        "loss_d": loss_d.detach(),
        "loss_g": loss_g.detach(),
        "d_real": logits_real.detach().sigmoid().mean(),  # P(real), whatever the labels
        "d_fake": logits_fake.detach().sigmoid().mean(),  # before D's update
        "d_fake_after": logits_fake_g.detach().sigmoid().mean(),
    }


def train(*argv, **flags):
    """Train as the command line does, train(dataset="mnist"); returns the run's folder."""
    args = get_args(argv, **flags)
    device = common.setup(args)
    images, _ = common.load_data(args)  # uint8 (N, H, W, C); their classes

    size = {"image_size": args.image_size, "channels": images.shape[-1], "alpha": args.alpha}
    hidden_g, hidden_d = ([*map(int, text.split(","))] for text in (args.hidden_g, args.hidden_d))
    generator_args = size | {"z_dim": args.z_dim, "hidden": hidden_g, "norm": args.norm}
    G = Generator(**generator_args)
    D = Discriminator(**size, hidden=hidden_d, dropout=args.dropout)
    if args.summary:
        return print(common.summary(G), common.summary(D))
    G_ema = common.averaged(G, device)
    G, D = common.prepare(G, device, args), common.prepare(D, device, args)
    opt_d = torch.optim.Adam(D.parameters(), args.lrd, (args.beta1, 0.999), fused=True)
    opt_g = torch.optim.Adam(G.parameters(), args.lrg, (args.beta1, 0.999), fused=True)

    latent = {"dim": args.z_dim, "distribution": "normal"}  # as train_step draws z
    state = {"G": G, "D": D, "G_ema": G_ema, "opt_d": opt_d, "opt_g": opt_g}
    run = common.Run(args, __file__, images, device, generator_args, latent, args.k, **state)
    step = common.Recorded(train_step, device, args)
    for real in run.batches():
        stats = step(G, D, opt_d, opt_g, real, args)
        common.update_ema(G_ema, G, run.step, args.ema)
        run.end_step(stats)
    return run.folder


def main():
    with common.exit_codes():
        train(*sys.argv[1:])


if __name__ == "__main__":
    main()
