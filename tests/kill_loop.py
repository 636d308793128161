"""Kill a training run again and again; it must end with the bits of one that was left alone.

    python tests/kill_loop.py --kills 30      # about three minutes

A small run (decoding, steps, checkpoints, sample grids, metrics.csv, the GIF) is killed with
SIGKILL at random moments after its start, and each time started again: resumed where a checkpoint
exists, from the beginning where none does. Now and then the cache of decoded images goes too, so
that it is built, and killed, anew.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from conftest import ROOT, write_images

# The script as it is, but with a checkpoint every few rows, so that kills hit some.
START = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import common; common.MINUTE = 0.2; "
START += "import train_dcgan; print('imported', flush=True); train_dcgan.main()"
FLAGS = ["--path=imgs", "--image_size=16", "--width=8", "--batch_size=4", "--checkpoint=1"]


def start(*flags):
    return subprocess.Popen(
        [sys.executable, "-c", START, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    output, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{output[-2000:]}\n{errors[-2000:]}\nexit code {process.returncode}")


def kill_loop(kills, seed=0):
    """Run it in the current folder; returns the two folders and the steps of the checkpoints then.

    Every second kill comes within two seconds of the first steps, the others within three of the
    start, which takes one or two of them; ten epochs a kill are to do.
    """
    chance, steps, epochs = random.Random(seed), [], 10 * kills
    write_images(Path("imgs"), 150)
    finish(start(*FLAGS, f"--epochs={epochs}", "--out=whole"))
    for i in range(kills):
        if chance.random() < 0.3:
            shutil.rmtree(".cache", ignore_errors=True)
        process = start(*again(epochs))
        sign, seconds = ("imported", 3) if i % 2 else ("an epoch", 2)
        while sign not in (line := process.stdout.readline()) and line:
            pass
        time.sleep(chance.uniform(0, seconds))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        checkpoint = Path("killed/checkpoint.pt")
        steps.append(torch.load(checkpoint)["step"] if checkpoint.exists() else None)
    finish(start(*again(epochs)))
    return "whole", "killed", steps


def again(epochs):
    if Path("killed/checkpoint.pt").exists():
        return ["--resume=killed", f"--epochs={epochs}"]
    return [*FLAGS, f"--epochs={epochs}", "--out=killed"]


def main():
    from test_run import assert_same_run

    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    os.chdir(tempfile.mkdtemp())
    whole, killed, steps = kill_loop(args.kills, args.seed)
    print(f"the checkpoint's step after each kill, of {370 * args.kills}: {steps}")
    assert_same_run(whole, killed)
    print(f"{args.kills} kills: the same bits as without")


if __name__ == "__main__":
    main()
