"""The first ten minutes on a GPU: one command, one table of what only a card can tell.

    python tests/gpu_first.py | tee gpu.txt     # waits, kernels, speed, the same bits, full memory
    python tests/gpu_first.py --small           # the same in little; a test runs it

A row comes from a training script's own train(), with a run in it that yields noise for images,
times the steps and writes nothing. "queued" is the time until a step is launched, "done" until the
GPU has finished it: where they are equal the processor is the limit. A row that fails shows the
error, and the rest goes on. On the stand-in of ../shared/gpu the figures say nothing about speed.
"""

import argparse
import contextlib
import io
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import generate
import train_balanced
import train_dcgan
import train_fcgan

STANDIN = sys.modules.get("standin_gpu")
SETTINGS = {"dataset": "glyphs", "device": "cuda", "image_size": 64, "batch_size": 32, "width": 64}
IMAGES, WARM, ROUNDS = 4800, 20, 100  # of noise; steps before and while the clock runs
CYCLE = train_dcgan.R1_EVERY  # steps whose waits and kernels are counted, a penalty among them


@contextlib.contextmanager
def waiting():
    """Yields a function that tells how often the program has waited for the GPU since."""
    if STANDIN:
        kinds = ("scalars", "d2h", "h2d_blocking")
        total = lambda: sum(STANDIN.counts()[kind] for kind in kinds)
        start = total()
        yield lambda: total() - start
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: sum("called a synchronizing" in str(w.message) for w in seen)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def noise(args):
    """In the place of common.load_data: images of noise."""
    args.fingerprint, side = "noise", args.image_size
    rng = np.random.default_rng(0)
    return rng.integers(256, size=(IMAGES, side, side, 3), dtype=np.uint8), None


class Probe(common.Run):
    """A run that writes nothing: it times the script's steps, then counts waits and kernels."""

    def end_step(self, stats):
        self.step += 1

    def some(self, n):
        for _ in range(n):
            self.each_step()
            yield self.next_batch(self.all)

    def batches(self):
        self.all = torch.from_numpy(self.images).to(self.device)
        for name in ("G", "D") if self.plain else ():  # else the layout of what comes in wins
            inner = self.state[name].layers
            inner.register_forward_pre_hook(lambda _, x: x[0].contiguous())
        yield from self.some(WARM)
        torch.cuda.synchronize()
        start = time.perf_counter()
        yield from self.some(ROUNDS)
        queued = time.perf_counter() - start
        torch.cuda.synchronize()
        done = time.perf_counter() - start
        self.found |= {"queued": queued / ROUNDS * 1e3, "done": done / ROUNDS * 1e3}  # ms
        self.found |= {"speed": self.images_per_step * ROUNDS / done}
        with waiting() as waits:
            yield from self.some(CYCLE)
        self.found |= {"waits": waits() / CYCLE}
        if self.profiled:
            cuda = torch.profiler.ProfilerActivity.CUDA
            with torch.profiler.profile(activities=[cuda]) as seen:
                yield from self.some(CYCLE)
                torch.cuda.synchronize()
            events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
            busy = sum(event.self_device_time_total for event in events) / 1e3
            self.found |= {"kernels": len(events) / CYCLE, "busy": busy / CYCLE}


def measure(script, plain=False, profiled=False, each_step=lambda: None, **flags):
    """What Probe finds in this script with these flags; `plain`: not in channels_last."""
    if script is train_fcgan:
        flags = {"image_size": 28, "width": None} | flags
    flags = {name: v for name, v in (SETTINGS | flags).items() if v is not None}
    found = {}

    def probe(*arguments, **state):
        run = Probe(*arguments, **state)
        run.plain, run.profiled, run.each_step, run.found = plain, profiled, each_step, found
        return run

    layout = torch.contiguous_format if plain else torch.channels_last
    with (
        mock.patch.multiple(common, Run=probe, load_data=noise),
        mock.patch.object(torch, "channels_last", layout),
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        script.train(**flags, out=f"{folder}/run")
    return found


def row(name, tell):
    """A line of the table: what `tell` returns, or the error that it ends with."""
    try:
        what = tell()
    except Exception as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    print(f"{name:<62} {what}", flush=True)
    torch.cuda.empty_cache()


def steps(small):
    """Waits, kernels, and speed by layout, precision, batch and what else costs time."""

    def speed(name, script=train_dcgan, **flags):
        form = "{speed:9,.0f} images/s, {queued:6.2f} ms queued, {done:6.2f} done"
        row(name, lambda: form.format(**measure(script, **flags)))

    scripts = {train_dcgan: {"k": 2, "r1": 1.0}, train_fcgan: {}, train_balanced: {"margin": 1e9}}
    for script, flags in scripts.items():
        expected = "1, .item()," if script is train_balanced else "0"
        waits = lambda: f"{measure(script, flip=True, **flags)['waits']:g}; {expected} expected"
        row(f"waits a step: {script.__name__}, {flags}", waits)
    for script in () if STANDIN else scripts:
        form = "{kernels:.0f}, {busy:.2f} ms of work in {done:.2f} ms"
        kernels = lambda: form.format(**measure(script, profiled=True))
        row(f"kernels a step: {script.__name__}", kernels)
    for precision in ("bf16", "fp32"):
        for plain in (False, True):
            for times in (1,) if small else (1, 2, 4):
                n, layout = times * SETTINGS["batch_size"], "default" if plain else "channels_last"
                flags = {"precision": precision, "plain": plain, "batch_size": n}
                speed(f"dcgan {precision} {layout}, batch {n}", **flags)
    variants = [{"augment": "none"}, {"augment": "need"}, {"augment": ",".join(common.KINDS)}]
    variants += [{"k": 2}, {"flip": True}] + [{"compile": True}] * (not small)
    for flags in variants:
        speed(f"dcgan {flags}", **flags)
    for every in (10**9, CYCLE, 1):
        with mock.patch.object(train_dcgan, "R1_EVERY", every):
            speed(f"dcgan --r1 1, a penalty every {every} steps", r1=1.0)
    speed("dcgan, torch.manual_seed in each step", each_step=lambda: torch.manual_seed(0))
    speed("fcgan", train_fcgan)
    speed("balanced, no extra updates", train_balanced, margin=1e9)


def trained(**flags):
    with contextlib.redirect_stdout(io.StringIO()):
        return train_dcgan.train(**flags)


def difference(a, b):
    """Of two runs: "the same bits", or by how much their weights differ."""
    a, b = (common.load_file(Path(run, "checkpoint.pt")) for run in (a, b))
    pairs = [(a[net][name], b[net][name]) for net in ("G", "D", "G_ema") for name in a[net]]
    apart = max((x.double() - y.double()).abs().max().item() for x, y in pairs)
    return f"weights differ by up to {apart:.2g}" if apart else "the same bits"


def last_grid(device):
    """generate.py's first images beside the last grid of the run."""
    G, z = generate.load_generator("whole", torch.device(device))
    common.save_grid(generate.sample(G, z, range(common.CHUNK)), "again.png")
    grid = common.by_epoch(Path("whole/samples").glob("epoch_*.png"))[-1]
    ours, theirs = (common.decode(path).astype(int) for path in ("again.png", grid))
    apart = np.abs(ours - theirs)
    return f"{(apart > 0).mean():.2%} of the values differ, by up to {apart.max()}"


def bits():
    """Do two runs, one in two parts, and images drawn later agree?"""
    flags = SETTINGS | {"epochs": 2}
    pair = lambda a, b: difference(trained(**flags, out=a), trained(**flags, out=b))
    parts = lambda: trained(**flags | {"epochs": 1}, out="parts")
    with mock.patch.object(common, "load_data", noise):
        row("two runs", lambda: pair("whole", "twin"))
        row("--resume", lambda: difference("whole", trained(resume=parts(), epochs=2)))
        with torch.backends.cudnn.flags(enabled=True, deterministic=True):
            row("two runs with cudnn.deterministic", lambda: pair("exact", "exact-twin"))
    row("generate.py on the GPU and the last grid", lambda: last_grid("cuda"))
    row("generate.py on the CPU and the last grid", lambda: last_grid("cpu"))


def processes():
    """In processes of their own: a GPU that is nearly full, and torchrun."""

    def ends(*command):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        lines = done.stderr.splitlines() or [""]
        return f"exit code {done.returncode}, {len(lines)} lines, the last: {lines[-1][:90]}"

    script, large = train_dcgan.__file__, ("--image_size=128", "--batch_size=1024")
    for left in (4000, 1000, 600, 400, 200):  # MB: cuDNN's buffers, cuBLAS's, the context's
        room = max(0, torch.cuda.mem_get_info()[0] - left * 10**6)
        ballast = torch.empty(room, dtype=torch.uint8, device="cuda")
        row(f"{left} MB free", lambda: ends(script, *large, f"--out=full-{left}"))
        del ballast
        torch.cuda.empty_cache()
    torchrun = "-m", "torch.distributed.run", "--nproc_per_node=1"
    row("torchrun", lambda: ends(*torchrun, script, "--epochs=1", "--out=ranks"))


def main():
    global IMAGES, WARM, ROUNDS
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="small networks, few steps")
    small = parser.parse_args().small
    if not torch.cuda.is_available():
        print("no GPU that this torch can use: nothing to measure", file=sys.stderr)
        sys.exit(2)
    if small:
        IMAGES, WARM, ROUNDS = 168, 1, 2
        SETTINGS.update(image_size=16, batch_size=8, width=4)
    card, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    memory = "{:,.0f} of {:,.0f} MB free".format(*np.divide(torch.cuda.mem_get_info(), 1e6))
    row("card", lambda: f"{card}, sm_{major}{minor}, {memory}")
    row("python, torch", lambda: f"{platform.python_version()}, {torch.__version__}")
    row("CUDA, cuDNN", lambda: f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        steps(small)
        bits()
        if not small and not STANDIN:
            processes()


if __name__ == "__main__":
    main()
