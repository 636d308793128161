"""How good are samples? A small network, trained on the data itself, tells.

    python tests/quality.py check imgs/ --image_size 32        # a yardstick for these images?
    python tests/quality.py measure imgs/ runs/dcgan-imgs runs/dcgan-imgs/generator_*.pt
    python tests/quality.py measure mnist runs/fcgan-mnist     # the test images in --data_dir, too
    python tests/quality.py measure glyphs runs/dcgan-glyphs   # drawn characters
    python tests/quality.py compare imgs/ --kimg 50 200 --seeds 0 1 \\
        "plain: train_dcgan.py --lrd 2e-4 --lrg 2e-4" "faster: train_dcgan.py"
    python tests/quality.py compare imgs/ --train 400 --kimg 100 "few: train_dcgan.py"
    python tests/quality.py cost imgs/ "plain: train_dcgan.py" "k 2: train_dcgan.py --k 2"

The network learns without labels how far an image has been turned (0, 90, 180 or 270 degrees;
Gidaris et al., 2018, arXiv:1803.07728) from every second image, exact duplicates left out; on MNIST
it learns the digits, and of drawn characters which one it is, or that it is none (`characters`).
The *distance* is the Frechet distance between its 128 features of 10,000 samples and of the images
it has not learned from (of those two, that it has learned from). Features of turns
are whitened first: on the real images they are uncorrelated and vary by 1, so that all that they
see counts alike, not only what tells a turned image. It compares with nothing but distances to the
same images at the same size. The networks are kept in --cache.

With --train, recipes learn from that many of the images, exact duplicates left out, and the network
learns from half of the others: samples are compared with the other half, which neither has seen.
"""

import argparse
import collections
import csv
import functools
import gzip
import hashlib
import importlib
import inspect
import itertools
import json
import shlex
import shutil
import subprocess
import sys
import unittest.mock
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import disturbances

import common
import fid

ROOT = Path(__file__).parents[1]
OTHERS = "CDFGJLMNOPQRUVWYZ16789"  # what common.GLYPHS lacks
N_IMAGES = {"mnist": 60_000, "glyphs": 4800}
SAMPLES = 10_000
SEEN = {"digits": 240_000, "turns": 128_000}  # images that the network learns from, with repeats

# ---------------------------------------------------------------------------------- the yardstick


class Classifier(nn.Module):
    """Images (N, C, side, side) in [-1, 1] -> features (N, 128) and logits (N, classes)."""

    def __init__(self, side, channels, classes):
        super().__init__()
        self.side, layers, width = side, [], 16
        while side > 7:  # 28 -> 14 -> 7, 32 -> 16 -> 8 -> 4
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            channels, width, side = width, 2 * width, side // 2
        layers += [nn.Flatten(), nn.Linear(channels * side**2, 128), nn.ReLU()]
        self.features, self.head = nn.Sequential(*layers), nn.Linear(128, classes)

    def forward(self, images):
        features = self.features(images)
        return features, self.head(features)


def to_tensor(pixels, side):
    """uint8 (n, H, W, C) -> float32 (n, C, side, side) in [-1, 1]."""
    images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
    if images.shape[2] == side:
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)


def characters(side, channels, n, seed):
    """n drawn characters and as many that are none, uint8 (2n, side, side, channels); classes.

    The last class has other letters and digits, mirror writing, and two characters in one image:
    an upper half and a lower one, a left and a right one, or both at half their strength.
    """
    images, labels = common.draw_glyphs(side, channels, n, seed)
    with unittest.mock.patch.object(common, "GLYPHS", OTHERS):
        others, _ = common.draw_glyphs(side, channels, n // 2, seed + 100)
    uneven = [common.GLYPHS.index(letter) for letter in "BEKS2345"]
    mirrored = images[np.isin(labels, uneven)][: n // 6, :, ::-1]
    pixels, first = images[: n // 3].astype(np.float32), np.arange(side)[:, None] < side / 2
    shares = np.full((3, side, side, 1), 0.5)
    shares[0], shares[1] = first[:, None], first
    far = np.abs(pixels - pixels[:, :1, :1]).sum(3, keepdims=True)  # from the paper in the corner
    darkest = far.reshape(len(far), -1).argmax(1)
    ink = pixels.reshape(len(pixels), -1, channels)[np.arange(len(pixels)), darkest][:, None, None]
    strokes, share = far / far.max((1, 2, 3), keepdims=True), shares[np.arange(len(pixels)) % 3]
    strokes = share * strokes + (1 - share) * np.roll(strokes, 1, 0)
    both = (pixels[:, :1, :1] * (1 - strokes) + ink * strokes).round().astype(np.uint8)
    both = both[labels[: n // 3] != np.roll(labels[: n // 3], 1)]
    none = np.concatenate([others, mirrored, both])
    return np.concatenate([images, none]), np.append(labels, np.full(len(none), len(common.GLYPHS)))


def wobbly(images, pixels):
    """uint8 (n, side, side, C), each bent at random by about so many pixels."""
    n, side = images.shape[:2]
    bends = torch.randn(n, 2, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 * pixels / side
    bends = F.interpolate(bends, (side, side), mode="bicubic").permute(0, 2, 3, 1)
    places = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), (n, 1, side, side), align_corners=False)
    bent = F.grid_sample(
        to_tensor(images, side), places + bends, padding_mode="border", align_corners=False
    )
    return common.to_uint8(bent)


def digits(images, labels):
    """A Classifier of labelled images, what makes a batch of an index, and the largest index."""
    labels = torch.from_numpy(labels.astype(np.int64))
    make = lambda index: (to_tensor(images[index.numpy()], 28), labels[index])
    return Classifier(28, images.shape[-1], int(labels.max()) + 1), make, len(images)


def turns(images):
    """The same for quarter turns of images, of which half carry black rectangles.

    Without those the network takes small black spots for eyes, and is shocked by few more than by
    many.
    """
    parts = ((images[i::16], ((i + 1) / 16) ** 2) for i in range(16))
    spotted = [disturbances.disturb(part, "rectangles", level) for part, level in parts]
    pool, side = np.concatenate([images, *spotted]), images.shape[1]

    def make(index):
        batch = to_tensor(pool[index.numpy()], side)
        batch = torch.where(torch.rand(len(batch), 1, 1, 1) < 0.5, batch.flip(3), batch)
        return turned(batch), torch.arange(4).repeat_interleave(len(batch) // 4)

    return Classifier(side, images.shape[-1], 4), make, len(pool)


def turned(images):
    """Images (4 * n, C, side, side), the first n as they are, the next turned by 90 degrees, ..."""
    return torch.cat([part.rot90(turn, (2, 3)) for turn, part in enumerate(images.chunk(4))])


def train_net(images, labels):
    torch.manual_seed(0)
    task = "turns" if labels is None else "digits"
    net, make, n = turns(images) if task == "turns" else digits(images, labels)
    opt, epochs = torch.optim.Adam(net.parameters(), 1e-3), round(SEEN[task] / n)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, epochs * (n // 128))
    for _ in range(epochs):
        for index in torch.randperm(n).split(128)[: n // 128]:
            batch, target = make(index)
            loss = F.cross_entropy(net(batch)[1], target)
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
    return net.eval()


@torch.no_grad()
def judge(net, pixels):
    """Features (n, 128) and probabilities (n, classes) of uint8 (n, H, W, C)."""
    parts = [net(to_tensor(pixels[i : i + 200], net.side)) for i in range(0, len(pixels), 200)]
    features, logits = (torch.cat(part).double() for part in zip(*parts))
    return features.numpy(), logits.softmax(1).numpy()


class Yardstick:
    """A trained network for some images, and the statistics that distances are taken to."""

    def __init__(self, data, image_size, channels, data_dir="data", cache=".cache", train=0):
        if data == "mnist":
            learned, labels = common.read_dataset("mnist", data_dir)
            test, test_labels = read_test_split(data_dir)
            self.images = common.resized(learned, image_size, channels)
            self.other = common.resized(test, image_size, channels)
        elif data == "glyphs":  # seed 0 draws those that runs learn from
            depth = 1 if channels == "1" else 3
            learned, labels = characters(image_size, depth, 24_000, seed=1)
            test, test_labels = characters(image_size, depth, SAMPLES, seed=2)
            self.images, self.other = learned[:24_000].copy(), test[:SAMPLES]
            for i in range(16):  # a wobbly hand or rough paper makes no other character
                part = wobbly(learned[i::16], i / 12)
                learned[i::16] = disturbances.disturb(part, "noise", i % 4 / 8)
        else:
            (_, images), labels = parted(data, image_size, channels, cache, train), None
            if len(images) < 256:
                raise SystemExit(f"{len(images)} images are too few for a yardstick: 256 or more")
            self.other = learned = np.ascontiguousarray(images[0::2])
            self.images = np.ascontiguousarray(images[1::2])
        self.net = self.trained(learned, labels, cache)
        if labels is None:
            n = len(self.images) // 4 * 4
            test = turned(to_tensor(self.images[:n], image_size))
            test, test_labels = common.to_uint8(test), np.arange(4).repeat(n // 4)
        right = (judge(self.net, test)[1].argmax(1) == test_labels).mean()
        print(f"the yardstick's network is right on {right:.2%} of the images it has not learned")
        if right < 0.9:
            raise SystemExit("that is no judge: it must be right on 90 %. Are there more images?")
        features, _ = judge(self.net, self.images)
        values, vectors = np.linalg.eigh(np.cov(features, rowvar=False))
        kept = values > 1e-4 * values[-1]  # the others are rounding, or features that never fire
        self.whiten = vectors[:, kept] / np.sqrt(values[kept]) if labels is None else np.eye(128)
        self.mu, self.sigma = self.moments(features)

    def moments(self, features):
        """Mean and covariance of features, whitened unless they are those of digits."""
        white = features @ self.whiten
        return white.mean(0), np.cov(white, rowvar=False)

    def trained(self, images, labels, cache):
        """The network out of `cache`; trained, if it is not there."""
        makers = (Classifier, characters, wobbly, digits, turns, train_net, disturbances.disturb)
        content = hashlib.sha256(images).hexdigest()
        key = repr(([inspect.getsource(maker) for maker in makers], content))
        file = Path(cache, f"yardstick-{hashlib.sha256(key.encode()).hexdigest()[:12]}.pt")
        if not file.exists():
            print(f"training the yardstick's network on {len(images):,} images", flush=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            common.save_file(train_net(images, labels).state_dict(), file)
        side, classes = (images.shape[1], 4) if labels is None else (28, int(labels.max()) + 1)
        net = Classifier(side, images.shape[-1], classes).eval()
        net.load_state_dict(torch.load(file, weights_only=True))
        return net

    def distance(self, pixels):
        """Frechet distance of uint8 (n, H, W, C), and the probabilities of the classes."""
        features, p = judge(self.net, pixels)
        return fid.frechet_distance(self.mu, self.sigma, *self.moments(features)), p


def parted(data, image_size, channels, cache, train):
    """Images (train, H, W, C) that recipes learn from, always the same, and all others.

    Without exact duplicates: those could be learned from and judged by.
    """
    images = common.load_images(data, image_size, channels, cache)
    images = np.array(list({image.tobytes(): image for image in images}.values()))
    order = np.random.default_rng(0).permutation(len(images))
    return images[np.sort(order[:train])], images[np.sort(order[train:])]


def read_test_split(data_dir):
    """MNIST's 10,000 test images (10000, 28, 28, 1) and labels, plain or gzipped IDX files."""
    arrays = []
    for name, header in (("t10k-images-idx3-ubyte", 16), ("t10k-labels-idx1-ubyte", 8)):
        (path,) = list(Path(data_dir).glob(f"**/{name}*"))[:1]
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        arrays.append(np.frombuffer(content, np.uint8)[header:])
    return arrays[0].reshape(-1, 28, 28, 1), arrays[1]


def check(args):
    """Distances of disturbed images must rise with each level, those of real ones be tiny."""
    yardstick = Yardstick(args.data, args.image_size, "auto", args.data_dir, args.cache)
    print(f"other real images {yardstick.distance(yardstick.other)[0]:.4g}")
    images, panels = yardstick.images[:SAMPLES], []
    for kind in disturbances.KINDS:
        disturbed = (disturbances.disturb(images, kind, level) for level in disturbances.LEVELS)
        values = [yardstick.distance(each)[0] for each in disturbed]
        rising = all(a < b for a, b in itertools.pairwise(values))
        print(kind, *(f"{value:.4g}" for value in values), "rising" if rising else "NOT RISING")
        panels.append((kind, disturbances.LEVELS, {"": values}))
    if args.out:
        common.save_curves(panels, args.out, "level of the disturbance", height=200)


# ---------------------------------------------------------------------------------- the generators


def generators(path):
    """Yield (label, generator, z) of a run folder or .pt; what is in a checkpoint alone, too."""
    path = Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)
    content = common.load_file(path)
    module = importlib.import_module(content["script"])  # train_*.py, also those in tests/
    buffers = {name for name, _ in module.Generator(**content["generator_args"]).named_buffers()}
    averaged = content["G_ema"]
    if "G" in content:
        copied = {k: content["G"][k] if k in buffers else v for k, v in averaged.items()}
        states = {"raw": content["G"], "averaged": averaged, "copied": copied}
    else:
        states = {"averaged": averaged}
    states |= {k.replace("G_ema", "averaged"): v for k, v in content.items() if "G_ema_" in k}
    for label, state in states.items():
        G = module.Generator(**content["generator_args"])
        G.load_state_dict(state)
        if label.startswith("averaged_"):  # with fresh statistics, as common.Run gives G_ema
            common.refresh_batchnorm(G, content["z"], content["config"]["seed"])
        yield label, G.requires_grad_(False).eval(), content["z"]


@functools.cache
def yardstick_for(data, image_size, channels, data_dir, cache, train):
    yardstick = Yardstick(data, image_size, channels, data_dir, cache, train)
    distance, p = yardstick.distance(yardstick.other)
    print(f"other real images {distance:.4g}{classes_of(p)}", flush=True)
    return yardstick


def distances(path, args):
    """Yield (label, distance, probabilities) of the generators in a file."""
    for label, G, z in generators(path):
        if args.only and label not in args.only:
            continue
        pixels = common.generate(G, common.latents(z, 0, range(SAMPLES)))
        size, channels = pixels.shape[1], str(pixels.shape[-1])
        yardstick = yardstick_for(args.data, size, channels, args.data_dir, args.cache, args.train)
        yield label, *yardstick.distance(pixels)


def measure(args):
    for path in args.snapshots:
        for label, distance, p in distances(path, args):
            row = f"{path!s:<40} {label:<16} {distance:9.2f}"
            print(row + classes_of(p), flush=True)


def classes_of(p):
    """Of probabilities of digits or characters: the share of sure ones, and of each class."""
    if p.shape[1] == 4:
        return ""
    sure = (p[:, : len(common.GLYPHS)].max(1) > 0.9).mean()  # not of being none
    shares = np.bincount(p.argmax(1), minlength=p.shape[1]) / len(p)
    return f" {sure:6.1%} sure;" + "".join(f"{share:6.1%}" for share in shares)


# ------------------------------------------------------------------------------------ the recipes


def recipes(args):
    """{name: words of the command} of texts such as "plain: train_dcgan.py --lrd 2e-4"."""
    data = ["--dataset", args.data, "--data_dir", args.data_dir]
    data = data if args.data in N_IMAGES else ["--path", args.path or args.data]
    for text in args.recipes:
        name, _, command = text.partition(":")
        script, *flags = shlex.split(command)
        script = next(path for path in (ROOT / script, ROOT / "tests" / script) if path.exists())
        yield name, [sys.executable, str(script), *data, "--cache", args.cache, *flags]


def n_images(args):
    if args.data in N_IMAGES:
        return N_IMAGES[args.data]
    return len(common.load_images(args.path or args.data, args.image_size, "auto", args.cache))


def write_part(args):
    """The folder of the --train images that recipes learn from, in --out; written once."""
    folder = args.out / f"train-{args.train}"
    if not folder.exists():
        images, _ = parted(args.data, args.image_size, "auto", args.cache, args.train)
        folder.mkdir(parents=True)
        for i, image in enumerate(images):
            common.to_picture(image).save(folder / f"{i:06d}.png")
    return str(folder)


def compare(args):
    """Train each recipe with each seed to each number of images; print its distances there.

    What is in --out is not trained or measured again, so that recipes and seeds can be added.
    """
    args.path = write_part(args) if args.train else None
    n, rows = n_images(args), collections.defaultdict(dict)
    for (name, command), seed in itertools.product(recipes(args), args.seeds):
        folder = args.out / f"{name}-s{seed}"
        for kimg in sorted(args.kimg):
            epochs = max(1, round(1000 * kimg / n))
            kept = folder / f"epochs_{epochs}.pt"
            if not kept.exists():
                train_to(epochs, command, seed, folder)
                with common.replacing(kept) as part:
                    shutil.copy(folder / "checkpoint.pt", part)
            measured = kept.with_suffix(".json")
            if not measured.exists():
                found = {label: distance for label, distance, _ in distances(kept, args)}
                measured.write_text(json.dumps(found))
                print(name, f"seed {seed}, {kimg:g} thousand images:", found, flush=True)
            for label, distance in json.loads(measured.read_text()).items():
                rows[name, label, kimg][seed] = distance
    print(f"\n| recipe | generator | thousand images | mean of {len(args.seeds)} | each seed |")
    print("|---|---|---|---|---|")
    for (name, label, kimg), found in rows.items():
        each = " ".join(f"{value:.3g}" for value in found.values())
        print(f"| {name} | {label} | {kimg:g} | {np.mean([*found.values()]):.3g} | {each} |")


def train_to(epochs, command, seed, folder):
    """Train a run in `folder` to this number of epochs, from where it is."""
    start = ["--resume", str(folder)] if (folder / "checkpoint.pt").exists() else None
    start = command[:2] + (start or [*command[2:], "--seed", str(seed), "--out", str(folder)])
    often = ["--checkpoint", "1000000", "--sample_every", "1000000"]
    subprocess.run([*start, "--epochs", str(epochs), *often], check=True, stdout=subprocess.DEVNULL)


def cost(args):
    """Time each recipe in turn, --rounds times; print the best, as a multiple of the first."""
    speeds = collections.defaultdict(list)
    for number, (name, command) in itertools.product(range(args.rounds), recipes(args)):
        folder = args.out / f"{name}-{number}"
        train_to(args.epochs, command, 0, folder)
        with (folder / "metrics.csv").open() as file:
            speeds[name] += [float(row["images_per_s"]) for row in csv.DictReader(file)]
        shutil.rmtree(folder)
    first = max(next(iter(speeds.values())))
    for name, found in speeds.items():
        best = max(found)
        print(f"{name:<20} {1000 / best:7.2f} s for 1000 images, {first / best:.2f} of the first")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    for work in (check, measure, compare, cost):
        sub = commands.add_parser(work.__name__, help=work.__doc__)
        sub.set_defaults(work=work, path=None)
        sub.add_argument("data", help="a folder or .zip of images, mnist or glyphs")
        sub.add_argument("--data_dir", default="data", help="of MNIST, with its test files")
        sub.add_argument("--cache", default=".cache")
        if work in (check, compare, cost):
            sub.add_argument("--image_size", type=int, default=32)
        if work in (compare, measure):
            sub.add_argument("--train", type=int, default=0, help="different images to train on")
            sub.add_argument("--only", nargs="+", help="raw, averaged, copied; default: all")
        if work is check:
            sub.add_argument("--out", type=Path, help="a picture of the curves")
        elif work is measure:
            sub.add_argument("snapshots", nargs="+", help="snapshots, checkpoints or run folders")
        else:
            sub.add_argument("recipes", nargs="+", help='as in "k 2: train_dcgan.py --k 2"')
            sub.add_argument("--out", type=Path, default=Path("runs/quality"))
        if work is compare:
            sub.add_argument("--kimg", type=float, nargs="+", required=True)
            sub.add_argument("--seeds", type=int, nargs="+", default=[0])
        elif work is cost:
            sub.add_argument("--rounds", type=int, default=3)
            sub.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    args.work(args)


if __name__ == "__main__":
    main()
