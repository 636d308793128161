"""The first two minutes on a GPU: one command, one table of what only a card can tell.

    python tests/gpu_first.py | tee gpu.txt     # the most telling rows first; 100 seconds
    python tests/gpu_first.py --seconds 600     # with more rounds of each
    python tests/gpu_first.py --small           # the same in little; a test runs it

Speeds: a training script's own train() with the step as a CUDA graph, and with --no-graph, beside a
plain loop as everybody writes it, of the same networks, in float32 with its data on the card. The
run yields noise for images, times the steps and writes nothing. Then: the same bits? How often does
a step wait, what does it launch? A row that fails shows the error, one that no longer fits is
skipped, and the rest goes on. On the stand-in of ../shared/gpu figures say nothing about speed.
"""

import argparse
import contextlib
import functools
import io
import os
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
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import fid
import generate
import train_balanced
import train_dcgan
import train_fcgan

STANDIN, HERE = sys.modules.get("standin_gpu"), str(Path(__file__).resolve())
SETTINGS = {"dataset": "glyphs", "device": "cuda", "image_size": 64, "batch_size": 32, "width": 64}
SCRIPTS = {  # with the flags of their rows; balanced without extra updates
    train_dcgan: {"r1": 0.0, "lrd": 2e-4, "lrg": 2e-4},  # as for photographs
    train_fcgan: {"image_size": 28, "width": None, "batch_size": 128},
    train_balanced: {"margin": 1e9, "batch_size": 50, "width": 32},
}
IMAGES, SECONDS = 4800, 1.0  # of noise; how long the clock runs
CYCLE = train_dcgan.R1_EVERY  # steps whose waits and kernels are counted, a penalty among them
WARM = 3 * CYCLE + 2  # steps before the clock runs: a step with a penalty is recorded by then
BITS = 40  # steps of the runs that are compared bit by bit


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


class Operations(TorchDispatchMode):
    """In the block, counts operations by name. Views and marks of the profiler launch nothing."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not function.is_view and name != "_unsafe_view" and "_record_function" not in name:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def noise(args):
    """In the place of common.load_data: images of noise."""
    args.fingerprint, args.classes, side = "noise", [], args.image_size
    rng = np.random.default_rng(0)
    return rng.integers(256, size=(IMAGES, side, side, 3), dtype=np.uint8), None


class Probe(common.Run):
    """A run that writes nothing: it times the script's steps, then counts what is asked for."""

    def end_step(self, stats):
        self.step += 1

    def some(self, n):
        for _ in range(n):
            yield self.next_batch(self.all)

    def batches(self):
        self.all = torch.from_numpy(self.images).to(self.device)
        yield from self.some(WARM)
        torch.cuda.synchronize()
        steps, start = 0, time.perf_counter()
        while steps == 0 or time.perf_counter() < start + SECONDS:
            yield from self.some(10)
            steps += 10
        queued = time.perf_counter() - start
        torch.cuda.synchronize()
        done = time.perf_counter() - start
        self.found |= {"queued": queued / steps * 1e3, "done": done / steps * 1e3}  # ms
        self.found |= {"speed": self.images_per_step * steps / done}
        if not self.counted:
            return
        with waiting() as waits:
            yield from self.some(CYCLE)
        self.found |= {"waits": waits() / CYCLE}
        with Operations() as operations:
            yield from self.some(1)
        self.found |= {"operations": len(operations.names)}
        if not STANDIN:
            cuda = torch.profiler.ProfilerActivity.CUDA
            with torch.profiler.profile(activities=[cuda]) as seen:
                yield from self.some(CYCLE)
                torch.cuda.synchronize()
            events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
            busy = sum(event.self_device_time_total for event in events) / 1e3
            self.found |= {"kernels": len(events) / CYCLE, "busy": busy / CYCLE}


def measure(script, counted=False, **flags):
    """What Probe finds in this script with these flags."""
    flags = {name: v for name, v in (SETTINGS | SCRIPTS[script] | flags).items() if v is not None}
    found = {}

    def probe(*arguments, **state):
        run = Probe(*arguments, **state)
        run.counted, run.found = counted, found
        return run

    with (
        mock.patch.multiple(common, Run=probe, load_data=noise),
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()) as said,
    ):
        script.train(**flags, out=f"{folder}/run")
    if flags.get("graph", True) and "no CUDA graph" in said.getvalue():
        raise RuntimeError(said.getvalue().partition("WARNING: ")[2])
    return found


def textbook(script, batch_size):
    """Images a second of a plain loop: float32, images on the card, Adam as it comes, BCELoss."""
    flags = {n: v for n, v in (SETTINGS | SCRIPTS[script]).items() if n in ("image_size", "width")}
    side, device = flags["image_size"], "cuda"
    if script is train_fcgan:
        size = {"image_size": side, "channels": 3}
        G = script.Generator(**size, z_dim=100, hidden=[128, 256, 512, 1024])
        D = script.Discriminator(**size, hidden=[512, 256])
    else:
        G, D = script.Generator(**flags), script.Discriminator(**flags)
    G, D, bce = G.to(device), D.to(device), nn.BCEWithLogitsLoss()
    opts = [torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in (D, G)]
    data = torch.rand(IMAGES, 3, side, side, device=device) * 2 - 1
    ones, zeros = torch.ones(batch_size, device=device), torch.zeros(batch_size, device=device)

    def step():
        real = data[torch.randint(IMAGES, (batch_size,), device=device)]
        fake = G(torch.randn(batch_size, 100, device=device))
        opts[0].zero_grad()
        (bce(D(real), ones) + bce(D(fake.detach()), zeros)).backward()
        opts[0].step()
        opts[1].zero_grad()
        bce(D(fake), ones).backward()
        opts[1].step()

    for _ in range(10):
        step()
    torch.cuda.synchronize()
    steps, start = 0, time.perf_counter()
    while steps == 0 or time.perf_counter() < start + SECONDS:
        for _ in range(10):
            step()
        steps += 10
    torch.cuda.synchronize()
    return steps * batch_size / (time.perf_counter() - start)


def row(name, tell, needs=4.0):
    """A line of the table: what `tell` returns, or the error that it ends with; nothing that no
    longer fits, `needs` being seconds that it may take."""
    if time.monotonic() + needs > row.end:
        row.skipped += 1
        return print(f"{name:<60} skipped: no time left", flush=True)
    try:
        what = tell()
    except Exception as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    print(f"{name:<60} {what}", flush=True)
    torch.cuda.empty_cache()


row.end, row.skipped = float("inf"), 0


def speeds(script, batch_size=None, **flags):
    """Rows of graph, plain steps, plain loop; the batch is the script's own where none is given."""
    n = batch_size or (SETTINGS | SCRIPTS[script])["batch_size"]
    name = f"{script.__name__}, batch {n}" + "".join(f", {k} {v}" for k, v in flags.items())
    form = "{speed:9,.0f} images/s, {queued:6.2f} ms queued, {done:6.2f} done"
    for graph in (True, False):
        tell = lambda: form.format(**measure(script, batch_size=n, graph=graph, **flags))
        row(f"{name}: {'graph' if graph else '--no-graph'}", tell)
    if not flags:
        row(f"{name}: a plain loop", lambda: f"{textbook(script, n):9,.0f} images/s")


def counts(script, **flags):
    """What a step waits for, launches, and consists of."""
    for graph in (True, False):

        def tell():
            found = measure(script, counted=True, graph=graph, **flags)
            expected = "1 expected" if script is train_balanced else "0 expected"
            parts = [f"{found['waits']:g} waits, {expected}"]
            parts += [f"{found['operations']} operations"]
            if "kernels" in found:
                parts += ["{kernels:.0f} kernels, {busy:.2f} ms in {done:.2f}".format(**found)]
            return "; ".join(parts)

        words = "".join(f", {k} {v}" for k, v in flags.items())
        how = "graph" if graph else "--no-graph"
        row(f"a step of {script.__name__}{words}: {how}", tell)


def trained(out, benchmark=True, **flags):
    """The folder of a short run on noise."""
    setup = common.setup

    def chosen(args):
        device = setup(args)
        torch.backends.cudnn.benchmark = benchmark
        return device

    epochs = max(1, round(BITS * SETTINGS["batch_size"] / IMAGES))
    flags = SETTINGS | SCRIPTS[train_dcgan] | {"epochs": epochs, "sample_every": 10**6} | flags
    with (
        mock.patch.multiple(common, setup=chosen, load_data=noise),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        if "resume" in flags:
            flags = {name: flags[name] for name in ("resume", "epochs")}
            return train_dcgan.train(**flags)
        return train_dcgan.train(**flags, out=out)


def difference(a, b):
    """Of two runs: "the same bits", or by how much their weights differ."""
    a, b = (common.load_file(Path(run, "checkpoint.pt")) for run in (a, b))
    pairs = [(a[net][name], b[net][name]) for net in ("G", "D", "G_ema") for name in a[net]]
    apart = max((x.double() - y.double()).abs().max().item() for x, y in pairs)
    return f"weights differ by up to {apart:.2g}" if apart else "the same bits"


def elsewhere(out, benchmark):
    """As `trained`, in a process of its own."""
    launcher = ["-m", "standin_gpu"] if STANDIN else []
    words = ["--run", str(out), *["--benchmark"] * benchmark, *["--small"] * (IMAGES < 4800)]
    command = [sys.executable, *launcher, HERE, *words]
    environment = os.environ | (
        {"PYTHONPATH": str(Path(STANDIN.__file__).parent)} if STANDIN else {}
    )
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-160:])
    return Path(out)


def bits():
    """Does the graph compute what plain steps do? Do two runs agree, in one process and in two?"""
    row("graph and --no-graph", lambda: difference(trained("g"), trained("p", graph=False)), 8)
    for benchmark in (True, False):
        how = f"cudnn.benchmark {benchmark}"
        first = functools.cache(lambda: trained(f"a{benchmark}", benchmark))
        row(f"two runs, {how}", lambda: difference(first(), trained(f"b{benchmark}", benchmark)), 8)
        name = f"c{benchmark}"
        twin = lambda: difference(first(), elsewhere(name, benchmark))
        row(f"two processes, {how}", twin, 20)
    half = lambda: trained("parts", epochs=1, **{"batch_size": SETTINGS["batch_size"]})
    more = lambda run: trained("parts", resume=run, epochs=2)
    row("--resume", lambda: difference(trained("whole", epochs=2), more(half())), 12)
    row("generate.py on the GPU and the run's last grid", lambda: last_grid("whole", "cuda"))
    row("generate.py on the CPU and the run's last grid", lambda: last_grid("whole", "cpu"))


def last_grid(run, device):
    """generate.py's first images beside the last grid of the run."""
    G, z = generate.load_generator(run, torch.device(device))
    common.save_grid(generate.sample(G, z, range(common.CHUNK)), "again.png")
    grid = common.by_epoch(Path(run, "samples").glob("epoch_*.png"))[-1]
    ours, theirs = (common.decode(path).astype(int) for path in ("again.png", grid))
    apart = np.abs(ours - theirs)
    return f"{(apart > 0).mean():.2%} of the values differ, by up to {apart.max()}"


def beside(small):
    """Images a second of fid.py and of generate.py."""
    rng, n = np.random.default_rng(0), 16 if small else 4096
    images = rng.integers(256, size=(n, 64, 64, 3), dtype=np.uint8)

    def features():
        net, _ = fid.load_inception("random", None, torch.device("cuda"), "fp32")
        with contextlib.redirect_stdout(io.StringIO()):
            fid.feature_stats(images[: n // 8], net)
            start = time.perf_counter()
            fid.feature_stats(images, net)
        return f"{n / (time.perf_counter() - start):9,.0f} images/s"

    def drawn():
        G = train_dcgan.Generator(SETTINGS["image_size"], width=SETTINGS["width"]).cuda().eval()
        z = common.latents({"dim": 100, "distribution": "normal"}, 0, range(n))
        common.generate(G, z[: n // 8])
        start = time.perf_counter()
        common.generate(G, z)
        return f"{n / (time.perf_counter() - start):9,.0f} images/s, the latents apart"

    row("fid.py, features of Inception", features, 10)
    row("generate.py", drawn)


def table(small):
    for times in (1,) if small else (1, 2, 4):
        speeds(train_dcgan, times * SETTINGS["batch_size"])
    bits()
    for script in (train_fcgan, train_balanced):
        speeds(script)
    for script in SCRIPTS:
        counts(script)
    counts(train_dcgan, r1=1.0, k=2, flip=True)
    beside(small)
    for flags in {"augment": "none"}, {"precision": "fp32"}, {"r1": 1.0}:
        speeds(train_dcgan, **flags)
    if not small:
        speeds(train_dcgan, 8 * SETTINGS["batch_size"])
        speeds(train_dcgan, image_size=128)


def main():
    global IMAGES, WARM, SECONDS, BITS, CYCLE
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=100, help="for all rows")
    parser.add_argument("--small", action="store_true", help="small networks, few steps")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # train this run alone, for another
    parser.add_argument("--benchmark", action="store_true", help=argparse.SUPPRESS)
    args, started = parser.parse_args(), time.monotonic()
    if not torch.cuda.is_available():
        print("no GPU that this torch can use: nothing to measure", file=sys.stderr)
        sys.exit(2)
    SECONDS *= max(1, args.seconds / 100)
    if args.small:
        IMAGES, WARM, SECONDS, BITS, CYCLE = 168, 8, 0, 21, 2
        train_dcgan.R1_EVERY = CYCLE
        SETTINGS.update(image_size=16, batch_size=8, width=4)
        for flags in SCRIPTS.values():
            flags.update(image_size=16, batch_size=8)
        SCRIPTS[train_balanced].update(width=4)
    if args.run:
        return trained(args.run, args.benchmark)
    row.end = started + args.seconds
    card, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    memory = "{:,.0f} of {:,.0f} MB free".format(*np.divide(torch.cuda.mem_get_info(), 1e6))
    row("card", lambda: f"{card}, sm_{major}{minor}, {memory}")
    row("python, torch", lambda: f"{platform.python_version()}, {torch.__version__}")
    row("CUDA, cuDNN", lambda: f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        table(args.small)
    taken = time.monotonic() - started
    print(f"{taken:.0f} seconds, {row.skipped} rows skipped", flush=True)


if __name__ == "__main__":
    main()
