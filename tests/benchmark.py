"""Speed against plain forms of the same work, and growth. Run it alone on the machine:

    python tests/benchmark.py dcgan --path imgs/       # a folder of .jpg
    python tests/benchmark.py fcgan --path data/       # the folder of MNIST
    python tests/benchmark.py balanced --path imgs/
    python tests/benchmark.py fid
    python tests/benchmark.py scale

dcgan: a training step of train_dcgan.py at 64 pixels, width 64, batch 64, and the plain form of the
same networks: float32, default memory format, unfused Adam, textbook loop with BCELoss on sigmoids,
images read with Pillow by a DataLoader with two workers.
fcgan: likewise train_fcgan.py on MNIST, batch 128; the plain form makes one Pillow image and one
transform an item, as torchvision's MNIST does, in a DataLoader without workers, its default.
balanced: likewise train_balanced.py at the published width of 128, batch 50, without extra updates;
the plain form upsamples, then convolves.
fid: Inception features of batches of 16 as fid.py computes them, and by the same network in default
memory format with BatchNorm layers; then the distance of two Gaussians in 2048 dimensions, and by
scipy's matrix square root.
scale: 2,000 to 200,000 small JPEGs: decoding, cache, a start with a warm cache, memory; and how a
step of train_dcgan.py grows with the image size.

Contestants alternate in blocks of steps, their data included. The best times are compared, since
only noise makes a step slower; medians and worst times tell how much noise there was.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import fid
import train_balanced
import train_dcgan
import train_fcgan


def contestant(pipe, make, args):
    """In a process of its own: do as many steps as the pipe asks for, send their times back."""
    os.chdir(tempfile.mkdtemp())
    steps = make(args)
    while count := pipe.recv():
        times = []
        for _ in range(count):
            start = time.perf_counter()
            next(steps)
            times.append(time.perf_counter() - start)
        pipe.send(times)


def duel(makers, args, images_per_step, steps, blocks=8, pause=2.0):
    """Time generators of steps, each in its process, block by block in turn; prints the ratio."""
    spawn = multiprocessing.get_context("spawn")
    pipes, times = {}, {make.__name__: [] for make in makers}
    for make in makers:
        pipes[make.__name__], theirs = spawn.Pipe()
        spawn.Process(target=contestant, args=(theirs, make, args)).start()
    for block in range(blocks):
        for name, pipe in pipes.items():
            time.sleep(pause)  # data loading workers fill their queues and fall silent
            pipe.send(steps)
            taken = pipe.recv()
            times[name] += taken if block else []  # the first is a warm-up
    for name, seconds in times.items():
        pipes[name].send(0)
        best, median, worst = (images_per_step / f(seconds) for f in (min, statistics.median, max))
        print(f"{name:<12} images/s: best {best:.3g}, median {median:.3g}, worst {worst:.3g}")
    first, second = times
    for label, pick in (("best", min), ("median", statistics.median)):
        print(f"{second} over {first}, {label}: {pick(times[first]) / pick(times[second]):.2f}")


class Items(torch.utils.data.Dataset):
    """One Pillow image and one transform an item: of .jpg files, or of an array (N, 28, 28, 1)."""

    def __init__(self, items, image_size):
        self.items, self.image_size = items, image_size

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        item = self.items[i]
        image = Image.fromarray(item[..., 0]) if isinstance(item, np.ndarray) else Image.open(item)
        pixels = np.array(image.resize((self.image_size, self.image_size)))
        return torch.from_numpy(np.atleast_3d(pixels)).permute(2, 0, 1).float() / 127.5 - 1


def plain(G, D, items, image_size, batch_size, lr, workers, device, draw=None):
    """The steps of tutorials; yields after each."""
    draw = draw or (lambda n: torch.randn(n, 100))
    G, D = G.to(device), D.to(device)
    opt_d = torch.optim.Adam(D.parameters(), lr=lr, betas=(0.5, 0.999))
    opt_g = torch.optim.Adam(G.parameters(), lr=lr, betas=(0.5, 0.999))
    data, how = Items(items, image_size), {"shuffle": True, "drop_last": True}
    loader = torch.utils.data.DataLoader(data, batch_size, num_workers=workers, **how)
    bce = nn.BCELoss()
    ones, zeros = torch.ones(batch_size, device=device), torch.zeros(batch_size, device=device)
    while True:
        for real in loader:
            real = real.to(device)
            D.zero_grad()
            loss_real = bce(torch.sigmoid(D(real)), ones)
            loss_real.backward()
            fake = G(draw(batch_size).to(device))
            loss_fake = bce(torch.sigmoid(D(fake.detach())), zeros)
            loss_fake.backward()
            opt_d.step()
            G.zero_grad()
            loss_g = bce(torch.sigmoid(D(fake)), ones)
            loss_g.backward()
            opt_g.step()
            (loss_real.item(), loss_fake.item(), loss_g.item())  # printed in tutorials
            yield


def ours(train, **flags):
    """A training script as it is, in a thread that is held at the end of each step."""
    go, done, end_step = threading.Semaphore(0), threading.Semaphore(0), common.Run.end_step

    def end_step_and_wait(run, stats):
        end_step(run, stats)
        stats["loss_g"].item()  # on a GPU, the end of the step
        done.release()
        go.acquire()

    common.Run.end_step = end_step_and_wait
    threading.Thread(target=train, kwargs=flags | {"sample_every": 10_000}, daemon=True).start()
    done.acquire()
    while True:
        go.release()
        done.acquire()
        yield


def plain_dcgan(args):
    G, D = train_dcgan.Generator(), train_dcgan.Discriminator()
    train_dcgan.init_weights(G, "normal")
    train_dcgan.init_weights(D, "normal")
    files = sorted(args.path.rglob("*.jpg"))
    return plain(G, D, files, 64, 64, 4e-4, 2, common.choose_device(args.device))


def our_dcgan(args):
    flags = {"image_size": 64, "width": 64, "batch_size": 64, "compile": args.compile}
    return ours(train_dcgan.train, path=args.path, device=args.device, **flags)


def plain_fcgan(args):
    shape = {"image_size": 28, "channels": 1, "alpha": 0.2}
    G = train_fcgan.Generator(**shape, z_dim=100, hidden=[128, 256, 512, 1024], norm="none")
    D = train_fcgan.Discriminator(**shape, hidden=[512, 256], dropout=0)
    images, _ = common.read_dataset("mnist", args.path)
    return plain(G, D, images, 28, 128, 2e-4, 0, common.choose_device(args.device))


def our_fcgan(args):
    flags = {"dataset": "mnist", "data_dir": args.path, "device": args.device}
    flags |= {"norm": "none", "dropout": 0, "compile": args.compile}  # as published
    return ours(train_fcgan.train, **flags)


class UpsampleThenConv(nn.Conv2d):
    def __init__(self, before, after):
        super().__init__(before, after, 5, padding=2)

    def forward(self, h):
        return super().forward(F.interpolate(h, scale_factor=2))


def plain_balanced(args):
    train_balanced.UpsampleConv = UpsampleThenConv
    G, D = train_balanced.Generator(), train_balanced.Discriminator()
    files = sorted(args.path.rglob("*.jpg"))
    draw = lambda n: torch.rand(n, 100) * 2 - 1
    return plain(G, D, files, 64, 50, 2e-5, 2, common.choose_device(args.device), draw)


def our_balanced(args):
    flags = {"path": args.path, "device": args.device, "width": 128, "margin": "inf"}
    return ours(train_balanced.train, **flags)


def features(net):
    weight = next(net.parameters())
    images = torch.rand(16, 3, fid.SIDE, fid.SIDE).to(weight)
    if isinstance(net.Conv2d_1a_3x3.bn, nn.Identity):
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        while True:
            net(images).cpu()
            yield


def plain_features(args):
    return features(fid.Inception().eval().to(common.choose_device(args.device)))


def our_features(args):
    device = common.choose_device(args.device)
    return features(fid.load_inception("random", None, device, args.precision)[0])


def wide_gaussian(seed, d=2048, n=5000):
    """Statistics with a spectrum that spans four orders of magnitude, as features have."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, d)) * 10.0 ** rng.uniform(-2, 0, d) @ rng.normal(size=(d, d))
    return rows.mean(0), np.cov(rows, rowvar=False)


def distances(rounds=3):
    """The time of each form, alternating, and the values."""
    a, b = wide_gaussian(0), wide_gaussian(1)

    def root():
        trace = np.trace(scipy.linalg.sqrtm(a[1] @ b[1]).real)
        return ((a[0] - b[0]) ** 2).sum() + np.trace(a[1]) + np.trace(b[1]) - 2 * trace

    times = {"scipy sqrtm": [], "fid.py": []}
    for _ in range(rounds):
        for (name, taken), form in zip(
            times.items(), (root, lambda: fid.frechet_distance(*a, *b)), strict=True
        ):
            start = time.perf_counter()
            value = form()
            taken.append(time.perf_counter() - start)
            print(f"{name}: {taken[-1]:.2f} s, distance {value:.9g}", flush=True)
    print(f"best over best: {min(times['scipy sqrtm']) / min(times['fid.py']):.1f}")


def child(code):
    """Run Python code in a process of its own; what it prints last, as numbers."""
    code = f"import sys; sys.path.insert(0, {sys.path[0]!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.splitlines()[-1].split()]


LOAD = """
import time, common
start = time.perf_counter()
images = common.load_images("imgs", 64)
print(time.perf_counter() - start, images.nbytes / 1e6)
"""
TRAIN = """
import common, train_dcgan
end_step = common.Run.end_step
def end_step_and_stop(run, stats):
    run.stop_asked = run.step == 30
    end_step(run, stats)
common.Run.end_step = end_step_and_stop
try:
    train_dcgan.train("--path=imgs", "--width=8", "--out=run")
except KeyboardInterrupt:
    pass
status = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
print(int(status["RssAnon"].split()[0]) / 1e3)
"""
STEPS = """
import time, common, train_dcgan
times, end_step = [], common.Run.end_step
def timed(run, stats):
    end_step(run, stats)
    stats["loss_g"].item()
    times.append(time.perf_counter())
    run.stop_asked = run.step == 8
common.Run.end_step = timed
try:
    sizes = ["--image_size={size}", "--width=64", "--batch_size=64"]
    train_dcgan.train("--dataset=glyphs", *sizes, "--augment=none", "--r1=0")
except KeyboardInterrupt:
    pass
print(min(b - a for a, b in zip(times, times[1:])))
"""


def scale():
    """Tables of growth with the number of images and with their size."""
    rng = np.random.default_rng(0)
    print("images   decoded/s   cache MB   warm start s   memory while training MB")
    for n in (2_000, 20_000, 200_000):
        os.chdir(tempfile.mkdtemp())
        Path("imgs").mkdir()
        for i in range(2_000):
            tile = rng.integers(256, size=(8, 8, 3), dtype=np.uint8)
            Image.fromarray(tile).resize((64, 64)).save(f"imgs/{i:06d}.jpg")
        for i in range(2_000, n):  # the same 2,000 by other names
            os.link(f"imgs/{i % 2_000:06d}.jpg", f"imgs/{i:06d}.jpg")
        cold, size = child(LOAD)
        warm = min(child(LOAD)[0] for _ in range(3))
        (memory,) = child(TRAIN)
        print(f"{n:<9}{n / cold:<12.0f}{size:<11.0f}{warm:<15.2f}{memory:.0f}", flush=True)
    print("image size   best step s")
    for size in (32, 64, 128):
        print(f"{size:<13}{child(STEPS.replace('{size}', str(size)))[0]:.3f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    what = ["dcgan", "fcgan", "balanced", "fid", "scale"]
    parser.add_argument("what", choices=what)
    parser.add_argument("--path", type=Path, help="folder of .jpg images or MNIST")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", help="of fid")
    parser.add_argument(
        "--compile", action="store_true", help="of dcgan, fcgan: with torch.compile"
    )
    args = parser.parse_args()
    if args.what in what[:3] and not args.path:
        parser.error("--path is missing")
    args.path = args.path and args.path.resolve()
    if args.what == "dcgan":
        duel([plain_dcgan, our_dcgan], args, images_per_step=64, steps=4)
    elif args.what == "fcgan":
        duel([plain_fcgan, our_fcgan], args, images_per_step=128, steps=100)
    elif args.what == "balanced":
        duel([plain_balanced, our_balanced], args, images_per_step=50, steps=1, blocks=5)
    elif args.what == "fid":
        duel([plain_features, our_features], args, images_per_step=16, steps=2, blocks=6)
        distances()
    else:
        scale()


if __name__ == "__main__":
    main()
