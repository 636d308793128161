"""Speed against plain forms of the same work. Run it alone on the machine:

    python tests/benchmark.py step --path imgs/

step: one training step of train_dcgan.py at 64 pixels, width 64, batch 64, and the plain form of
the same networks: float32, default memory format, unfused Adam, textbook loop with BCELoss on
sigmoids, images read with Pillow by a DataLoader with two workers. Both include their data.

Contestants alternate in blocks of a few steps. The best times are compared, since only noise makes
a step slower; medians and worst times tell how much noise there was.
"""

import argparse
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


def duel(contestants, images_per_step, blocks=8, steps=4, pause=2.0):
    """Time generators that do one step each `next`, in turn; prints images/s and the ratio."""
    times = {name: [] for name in contestants}
    for block in range(blocks):
        for name, steps_of in contestants.items():
            time.sleep(pause)  # data loading workers fill their queues and fall silent
            for _ in range(steps):
                start = time.perf_counter()
                next(steps_of)
                if block:  # the first is a warm-up
                    times[name].append(time.perf_counter() - start)
    for name, seconds in times.items():
        best, median, worst = (images_per_step / f(seconds) for f in (min, statistics.median, max))
        print(f"{name:<8} images/s: best {best:.0f}, median {median:.0f}, worst {worst:.0f}")
    first, second = times
    for label, pick in (("best", min), ("median", statistics.median)):
        print(f"{second} over {first}, {label}: {pick(times[first]) / pick(times[second]):.2f}")


class ImageFolder(torch.utils.data.Dataset):
    """One Pillow image and one transform an item."""

    def __init__(self, path, image_size):
        self.files, self.image_size = sorted(Path(path).rglob("*.jpg")), image_size

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        image = Image.open(self.files[i]).convert("RGB").resize((self.image_size,) * 2)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def plain_dcgan(path, device):
    """The step of tutorials, with the networks of train_dcgan.py."""
    G, D = train_dcgan.Generator().to(device), train_dcgan.Discriminator().to(device)
    common.init_weights(G)
    common.init_weights(D)
    opt_d = torch.optim.Adam(D.parameters(), lr=4e-4, betas=(0.5, 0.999))
    opt_g = torch.optim.Adam(G.parameters(), lr=4e-4, betas=(0.5, 0.999))
    data = ImageFolder(path, 64)
    loader = torch.utils.data.DataLoader(data, 64, shuffle=True, num_workers=2, drop_last=True)
    bce = nn.BCELoss()
    ones, zeros = torch.ones(64, device=device), torch.zeros(64, device=device)
    while True:
        for real in loader:
            real = real.to(device)
            D.zero_grad()
            loss_real = bce(torch.sigmoid(D(real)), ones)
            loss_real.backward()
            fake = G(torch.randn(64, 100, device=device))
            loss_fake = bce(torch.sigmoid(D(fake.detach())), zeros)
            loss_fake.backward()
            opt_d.step()
            G.zero_grad()
            loss_g = bce(torch.sigmoid(D(fake)), ones)
            loss_g.backward()
            opt_g.step()
            (loss_real.item(), loss_fake.item(), loss_g.item())  # printed in tutorials
            yield


def our_dcgan(path, device):
    """train_dcgan.train as it is, in a thread that is held at the end of each step."""
    go, done, log = threading.Semaphore(0), threading.Semaphore(0), common.Run.log

    def log_and_wait(run, stats):
        log(run, stats)
        stats["loss_g"].item()  # on a GPU, the end of the step
        done.release()
        go.acquire()

    common.Run.log = log_and_wait
    flags = {"path": str(path), "device": str(device), "sample_every": 10_000}
    threading.Thread(target=train_dcgan.train, kwargs=flags, daemon=True).start()
    done.acquire()
    while True:
        go.release()
        done.acquire()
        yield


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["step"])
    parser.add_argument("--path", required=True, type=Path, help="folder of .jpg images")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    path, device = args.path.resolve(), common.choose_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        duel({"plain": plain_dcgan(path, device), "ours": our_dcgan(path, device)}, 64)


if __name__ == "__main__":
    main()
