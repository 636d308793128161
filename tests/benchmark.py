"""Speed against plain forms of the same work. Run it alone on the machine:

    python tests/benchmark.py dcgan --path imgs/       # a folder of .jpg
    python tests/benchmark.py fcgan --path data/       # the folder of MNIST

dcgan: a training step of train_dcgan.py at 64 pixels, width 64, batch 64, and the plain form of the
same networks: float32, default memory format, unfused Adam, textbook loop with BCELoss on sigmoids,
images read with Pillow by a DataLoader with two workers.
fcgan: likewise train_fcgan.py on MNIST, batch 128; the plain form makes one Pillow image and one
transform an item, as torchvision's MNIST does, in a DataLoader without workers, its default.

Contestants alternate in blocks of steps, their data included. The best times are compared, since
only noise makes a step slower; medians and worst times tell how much noise there was.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
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
        print(f"{name:<12} images/s: best {best:.0f}, median {median:.0f}, worst {worst:.0f}")
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


def plain(G, D, items, image_size, batch_size, lr, workers, device):
    """The steps of tutorials; yields after each."""
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
            fake = G(torch.randn(batch_size, 100, device=device))
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
    go, done, log = threading.Semaphore(0), threading.Semaphore(0), common.Run.log

    def log_and_wait(run, stats):
        log(run, stats)
        stats["loss_g"].item()  # on a GPU, the end of the step
        done.release()
        go.acquire()

    common.Run.log = log_and_wait
    threading.Thread(target=train, kwargs=flags | {"sample_every": 10_000}, daemon=True).start()
    done.acquire()
    while True:
        go.release()
        done.acquire()
        yield


def plain_dcgan(args):
    G, D = train_dcgan.Generator(), train_dcgan.Discriminator()
    common.init_weights(G)
    common.init_weights(D)
    files = sorted(args.path.rglob("*.jpg"))
    return plain(G, D, files, 64, 64, 4e-4, 2, common.choose_device(args.device))


def our_dcgan(args):
    flags = {"path": args.path, "device": args.device, "image_size": 64, "width": 64}
    return ours(train_dcgan.train, **flags)


def plain_fcgan(args):
    shape = {"image_size": 28, "channels": 1, "alpha": 0.2}
    G = train_fcgan.Generator(**shape, z_dim=100, hidden=[128, 256, 512, 1024], norm="none")
    D = train_fcgan.Discriminator(**shape, hidden=[512, 256], dropout=0)
    images, _ = common.read_dataset("mnist", args.path)
    return plain(G, D, images, 28, 128, 2e-4, 0, common.choose_device(args.device))


def our_fcgan(args):
    flags = {"dataset": "mnist", "data_dir": args.path, "device": args.device}
    flags |= {"norm": "none", "dropout": 0}  # as published
    return ours(train_fcgan.train, **flags)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", choices=["dcgan", "fcgan"])
    parser.add_argument("--path", required=True, type=Path, help="folder of .jpg images or MNIST")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    args.path = args.path.resolve()
    if args.what == "dcgan":
        duel([plain_dcgan, our_dcgan], args, images_per_step=64, steps=4)
    else:
        duel([plain_fcgan, our_fcgan], args, images_per_step=128, steps=100)


if __name__ == "__main__":
    main()
