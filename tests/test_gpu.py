"""On a GPU, or on the stand-in for one: nothing waits for it, all lies on it, runs move on and off.

    PYTHONPATH=../shared/gpu python -m pytest -p standin_gpu tests/test_gpu.py

Tests that need neither say so by running everywhere.
"""

import copy
import functools
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import gpu_first
import pytest
import torch
from conftest import ROOT
from test_run import SMALL, assert_same_run, read

import common
import generate
import train_balanced
import train_dcgan
import train_fcgan

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no GPU here, nor the stand-in for one: -p standin_gpu with ../shared/gpu on PYTHONPATH",
)
FULLY = {k: v for k, v in SMALL.items() if k != "width"} | {"hidden_g": "16,8", "hidden_d": "8"}
SCRIPTS = {
    "dcgan": (train_dcgan, SMALL | {"k": 2, "r1": 1.0, "flip": True, "batch_size": 4}),
    "dcgan_by_need": (train_dcgan, SMALL | {"augment": "need", "flip": True, "lr_decay": 0.9}),
    "fcgan": (train_fcgan, FULLY | {"k": 2, "flip": True, "batch_size": 4}),
    "balanced": (train_balanced, SMALL | {"flip": True, "margin": 0.0, "max_extra": 3}),
}


@pytest.fixture
def loop(imgs, monkeypatch):
    """Trains, and returns the run and of each pass of its loop: (waits, a row?, images, stats)."""
    monkeypatch.setattr(common, "MINUTE", float("inf"))
    monkeypatch.setattr(common, "ROWS_PER_EPOCH", 1)  # the last step of an epoch writes one
    passes, runs = [], []
    next_batch, end_step = common.Run.next_batch, common.Run.end_step

    def trained(script, **flags):
        def noting_next_batch(run, images):
            before = waits()
            real = next_batch(run, images)
            passes.append([before, real])
            return real

        def noting_end_step(run, stats):
            end_step(run, stats)
            before, real = passes.pop()
            passes.append((waits() - before, not run.pending, real, stats))
            runs.append(run)

        monkeypatch.setattr(common.Run, "next_batch", noting_next_batch)
        monkeypatch.setattr(common.Run, "end_step", noting_end_step)
        with gpu_first.waiting() as waits:
            script.train(**flags, device="cuda")
        return runs[-1], passes

    return trained


@pytest.fixture
def penalties(monkeypatch):
    """Often enough that a short run records the steps with and without one."""
    monkeypatch.setattr(train_dcgan, "R1_EVERY", 2)


@pytest.fixture
def no_choice(monkeypatch):
    """cuDNN may not choose other kernels from run to run, nor those that add in any order."""
    setup, cudnn = common.setup, torch.backends.cudnn

    def alike(args):
        device = setup(args)
        cudnn.benchmark = False
        return device

    monkeypatch.setattr(common, "setup", alike)
    with cudnn.flags(enabled=True, deterministic=True):
        yield


def replays():
    """How many graphs the stand-in has replayed; a card does not tell."""
    return gpu_first.STANDIN.counts()["replays"] if gpu_first.STANDIN else None


# ----------------------------------------------------------------------------------- on a device


@needs_gpu
@pytest.mark.parametrize(
    "place, graph", [("on the GPU", True), ("on the GPU", False), ("in a map", True)]
)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_step_waits_for_nothing(name, place, graph, loop, penalties, monkeypatch):
    """Between two rows. In a balanced step each update waits once, to choose the next."""
    if place == "in a map":
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**4, 10**12))
    script, flags = SCRIPTS[name]
    before = replays()
    run, passes = loop(script, **flags, graph=graph)
    assert len(passes) == run.steps == 18
    if gpu_first.STANDIN:  # DCGAN with R1 has two graphs, balanced three, each after three calls
        calls = 18 + sum(int(s["extra_d"] + s["extra_g"]) for *_, s in passes if "bound" in s)
        recorded = {"dcgan": 18 - 6, "dcgan_by_need": 15, "fcgan": 15, "balanced": calls - 9}[name]
        least = recorded if name != "balanced" else 15
        assert least <= replays() - before <= max(recorded, least) if graph else replays() == before
    assert [row for _, row, *_ in passes] == [False, False, True] * 6
    for waits, row, real, stats in passes:
        updates = 1 + stats["extra_d"] + stats["extra_g"] if name == "balanced" else 0
        assert waits > updates if row else waits == updates
        assert real.is_cuda and real.dtype == torch.float32 and -1 <= real.min() <= real.max() <= 1
        assert real.is_contiguous(memory_format=torch.channels_last)
        for value in stats.values():
            assert value.is_cuda and value.dtype == torch.float32 and value.shape == ()
            assert not value.requires_grad
    assert name != "balanced" or max(stats["extra_d"] + stats["extra_g"] for *_, stats in passes)
    augment = run.state.get("augment")
    on_it = [*(augment.buffers() if augment else []), run.indices]
    on_it += [t for net in ("G", "D", "G_ema") for t in run.state[net].state_dict().values()]
    assert all(tensor.is_cuda for tensor in on_it)


@needs_gpu
def test_the_advice_at_the_end_of_a_balanced_epoch_waits_once():
    one = lambda value: torch.full((), float(value), device="cuda")
    stats = [{"bound": one(1), "extra_d": one(i), "extra_g": one(2)} for i in range(9)]
    args = train_balanced.get_args(["--path=x"])
    with gpu_first.waiting() as waits:
        advice = train_balanced.imbalance(stats, args)
    assert advice.startswith("in most steps D stays behind G") and waits() == 1


def strides(tensor):
    return [stride for stride, size in zip(tensor.stride(), tensor.shape) if size > 1]


def in_default_layout(content):
    """A checkpoint's content as one from before channels_last would hold it."""
    if isinstance(content, dict):
        return {key: in_default_layout(part) for key, part in content.items()}
    return content.contiguous() if isinstance(content, torch.Tensor) else content


@needs_gpu
@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_updated_together_has_equal_strides(name, resumed, loop):
    """Else fused Adam refuses on a GPU, and the average takes a launch for each tensor."""
    script, flags = SCRIPTS[name]
    run, _ = loop(script, **flags | {"epochs": 1})
    if resumed:
        path = run.folder / "checkpoint.pt"
        common.save_file(in_default_layout(common.load_file(path)), path)
        run, _ = loop(script, resume=run.folder, epochs=2)
    for net, opt in (("G", "opt_g"), ("D", "opt_d")):
        for p in run.state[net].parameters():
            state = run.state[opt].state[p]
            for beside in (p.grad, state["exp_avg"], state["exp_avg_sq"]):
                assert strides(beside) == strides(p) and beside.is_cuda
            assert state["step"].is_cuda
    snapshot = common.load_file(run.folder / "checkpoint.pt")
    common.save_file(in_default_layout(snapshot), "older.pt")
    loaded = [generate.load_generator(path, run.device)[0] for path in (run.folder, "older.pt")]
    for p, *others in zip(*(n.parameters() for n in (run.state["G"], run.state["G_ema"], *loaded))):
        assert all(strides(other) == strides(p) for other in others)
        assert p.dim() < 4 or p.is_contiguous(memory_format=torch.channels_last)


def weights(run):
    """Of D, and those of G and G_ema that matter: a bias that BatchNorm takes away moves by the
    rounding of a slope that is 0, which Adam makes as large as any other."""
    content = common.load_file(Path(run, "checkpoint.pt"))
    parts = {f"{net}.{k}": v for net in ("G", "D", "G_ema") for k, v in content[net].items()}
    return {name: v for name, v in parts.items() if name.startswith("D.") or v.dim() > 1}


def assert_close(a, b):
    theirs = weights(b)
    for key, value in weights(a).items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=2e-6, msg=key)


@needs_gpu
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_graph_computes_what_plain_steps_do_and_resumes_to_the_bit(
    name, imgs, penalties, no_choice
):
    script, flags = SCRIPTS[name]
    flags = flags | {"precision": "fp32", "device": "cuda"}
    before = replays()
    whole = script.train(**flags, out="whole")
    recorded = replays()
    plain = script.train(**flags, out="plain", graph=False)
    if gpu_first.STANDIN:
        assert recorded >= before + 12 and replays() == recorded
    assert_close(whole, plain)
    first, last = weights(script.train(**flags | {"epochs": 1}, out="first")), weights(whole)
    moved = max((last[key] - first[key]).abs().max() for key in last)
    assert moved > 1e-3  # a step that does nothing would agree too
    assert [*read(whole)[0]] == [*read(plain)[0]]
    for ours, other in zip(read(whole), read(plain), strict=True):
        for column in {*ours} - {"seconds", "images_per_s"}:
            assert float(ours[column]) == pytest.approx(float(other[column]), abs=1e-4), column
    parts = script.train(**flags | {"epochs": 4}, out="parts")
    before = replays()
    script.train(resume=parts, epochs=6)
    assert_same_run(whole, parts)
    assert not gpu_first.STANDIN or replays() > before or name == "dcgan"  # 6 steps, two graphs


@needs_gpu
@pytest.mark.parametrize("name", ["dcgan_by_need", "balanced"])
def test_a_run_goes_from_graph_to_plain_and_back(name, imgs, no_choice):
    """A checkpoint does not know of it, and the rates fall on where they were."""
    script, flags = SCRIPTS[name]
    flags = flags | {"precision": "fp32", "device": "cuda"}
    plain = script.train(**flags, out="plain", graph=False)
    mixed = script.train(**flags | {"epochs": 2}, out="mixed")
    before = replays()
    script.train(resume=mixed, epochs=4, graph=False)
    assert replays() == before
    script.train(resume=mixed, epochs=6, graph=True)
    assert not gpu_first.STANDIN or replays() > before
    assert_close(plain, mixed)
    saved = [common.load_file(Path(run, "checkpoint.pt")) for run in (plain, mixed)]
    for opt in ("opt_d", "opt_g"):
        groups = [content[opt]["param_groups"] for content in saved]
        assert groups[0] == groups[1] and isinstance(groups[0][0]["lr"], float)


@needs_gpu
def test_a_batch_of_another_size_has_a_graph_of_its_own(imgs):
    """As after more images were put into the folder of a step that is kept."""
    device = torch.device("cuda")
    net = torch.nn.Linear(4, 1).to(device)
    opt = torch.optim.SGD(net.parameters(), 0.1)

    def train_step(net, opt, x, double=False):
        loss = net(x).square().mean() * (2 if double else 1)
        opt.zero_grad()
        loss.backward()
        opt.step()
        return {"loss": loss.detach(), "twice": torch.stack([loss.detach()] * 2)}

    args = types.SimpleNamespace(graph=True)
    step, before = common.Recorded(train_step, device, args), replays()
    twin = copy.deepcopy(net)
    other = torch.optim.SGD(twin.parameters(), 0.1)
    held = []
    for i in range(40):
        x = torch.randn(3 + i % 2, 4, device=device)
        stats = [step(net, opt, x, double=i % 4 > 1), train_step(twin, other, x, i % 4 > 1)]
        for name, shape in (("loss", ()), ("twice", (2,))):
            assert stats[0][name].shape == shape
            torch.testing.assert_close(stats[0][name], stats[1][name])
        held.append((stats[0]["loss"], stats[0]["loss"].item()))
    for tensor, number in held:  # a later replay does not write into what was returned
        assert tensor.item() == number
    assert not gpu_first.STANDIN or replays() - before == 40 - 4 * 3
    torch.testing.assert_close(net.weight, twin.weight)


class Callable:
    def __call__(self, net, opt, x, weight):
        opt.zero_grad()
        loss = weight * net(x).square().mean()
        loss.backward()
        opt.step()
        return {"loss": loss.detach()}


STEPS = {  # and whether a graph is made, or a line says why not
    "an object": (functools.partial(Callable(), weight=2), False),
    "any arguments": (lambda *given: Callable()(*given, 2), False),
    "a function": (lambda net, opt, x: Callable()(net, opt, x, 2), True),
}


@needs_gpu
@pytest.mark.parametrize("name", STEPS)
def test_whatever_can_be_called_can_be_a_step(name, capsys):
    function, recorded = STEPS[name]
    device, before, weights = torch.device("cuda"), replays(), []
    for graph in (True, False):
        torch.manual_seed(0)
        net = torch.nn.Linear(4, 1).to(device)
        opt = torch.optim.SGD(net.parameters(), 0.1)
        step = common.Recorded(function, device, types.SimpleNamespace(graph=graph))
        for _ in range(8):
            step(net, opt, torch.randn(3, 4, device=device))
        weights.append(net.weight.detach())
    torch.testing.assert_close(*weights)
    assert ("WARNING: no CUDA graph" in capsys.readouterr().out) != recorded
    assert not gpu_first.STANDIN or replays() - before == 5 * recorded


@needs_gpu
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_gpu_too_small_for_the_images_trains_from_the_map_to_the_same_bits(
    name, imgs, monkeypatch
):
    script, flags = SCRIPTS[name]
    took, next_batch = [], common.Run.next_batch
    noting = lambda run, images: (took.append(type(images)), next_batch(run, images))[1]
    monkeypatch.setattr(common.Run, "next_batch", noting)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        whole = script.train(**flags, out="whole")
        assert {*took} == {torch.Tensor}
        took.clear()
        size = 24 * 16 * 16 * 3  # bytes: a quarter of the free memory is theirs at most
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * size, 10**12))
        small = script.train(**flags, out="small")
    assert torch.Tensor not in took
    if gpu_first.STANDIN:
        assert_same_run(whole, small)
    else:  # cuDNN may have chosen other kernels
        assert len(read(whole)) == len(read(small))


def on_the_cpu(*command, code=0):
    """A process of its own, as on a machine without a GPU."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, command)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == code, result.stderr
    return result


def saved_on(run):
    weights = torch.load(run / "checkpoint.pt", weights_only=True)["G_ema"].values()
    return {weight.device.type for weight in weights}


@needs_gpu
@pytest.mark.parametrize("name", ["dcgan", "balanced"])
def test_a_run_goes_from_the_gpu_to_the_cpu_and_back(name, imgs):
    script, flags = SCRIPTS[name]
    flags = flags | {"precision": "fp32"}
    moved = script.train(**flags | {"epochs": 2}, out="moved")
    assert saved_on(moved) == {"cuda"}
    out = on_the_cpu(script.__file__, "--resume=moved", "--epochs=4", "--device=cpu").stdout
    assert "moved: step 6 to 12, 3 an epoch" in out and "on cpu" in out
    assert saved_on(moved) == {"cpu"}
    script.train(resume=moved, epochs=6, device="cuda")
    assert [int(row["step"]) for row in read(moved)] == [*range(1, 19)]
    if gpu_first.STANDIN:  # whose kernels are the CPU's
        whole = script.train(**flags, out="whole")
        a, b = (common.load_file(run / "checkpoint.pt")["G_ema"] for run in (whole, moved))
        for key, value in a.items():  # 18 steps have moved them by some 1e-3
            torch.testing.assert_close(value, b[key], rtol=0, atol=1e-4)
    on_the_cpu(ROOT / "generate.py", "--load_path=moved", "--img_num=4")
    assert len([*Path("generated/moved").glob("*.png")]) == 4


@needs_gpu
@pytest.mark.parametrize("typed", ["auto", "bf16"])
def test_a_run_in_bf16_goes_on_in_fp32_where_there_is_no_bf16(typed, imgs, monkeypatch, capsys):
    answer = lambda bf16: lambda including_emulation=True: bf16 or including_emulation
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer(True))
    flags = SMALL | {"precision": typed, "epochs": 1}
    run = train_dcgan.train(**flags, out="run")
    precision = lambda run: common.load_file(Path(run, "checkpoint.pt"))["config"]["precision"]
    assert precision(run) == "bf16"
    capsys.readouterr()
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer(False))
    monkeypatch.setattr(torch, "autocast", None)  # must not be called
    train_dcgan.train(resume=run, epochs=2)
    out = capsys.readouterr().out
    assert "going on in fp32, the run was in bf16 until now" in out
    assert ("this GPU does not multiply in bf16" in out) == (typed == "bf16")
    assert precision(run) == "fp32" and len(read(run)) == 6
    again = train_dcgan.train(config=run / "config.ini", out="again")
    assert precision(again) == "fp32"
    monkeypatch.undo()


@needs_gpu
@pytest.mark.parametrize("name", SCRIPTS)
def test_generate_draws_the_last_grid_again(name, imgs, monkeypatch):
    script, flags = SCRIPTS[name]
    run = script.train(**flags | {"epochs": 2}, out="run")
    argv = ["generate.py", "--load_path=run", "--img_num=64", "--grid_size=8"]
    monkeypatch.setattr(sys, "argv", argv)
    generate.main()
    grid = (run / "samples/epoch_0002.png").read_bytes()
    assert Path("generated/run-grid-8x8.png").read_bytes() == grid
    assert (run / "samples/epoch_0000.png").read_bytes() != grid


@needs_gpu
def test_the_first_minutes_on_a_card_as_one_command(monkeypatch):
    launcher = ["-m", "standin_gpu"] if gpu_first.STANDIN else []
    if gpu_first.STANDIN:
        monkeypatch.setenv("PYTHONPATH", str(Path(gpu_first.STANDIN.__file__).parent))
    command = [sys.executable, *launcher, gpu_first.__file__, "--small", "--seconds=400"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = {line[:60].strip(): line[61:] for line in result.stdout.splitlines()}
    assert len(rows) > 30 and not [what for what in rows.values() if "Error" in what]
    steps = {name: what for name, what in rows.items() if name.startswith("a step of")}
    assert len(steps) == 8
    for name, what in steps.items():
        waits, _, operations = what.partition("; ")
        assert waits[0] == ("1" if "balanced" in name else "0"), name
        assert int(operations.split()[0]) > 100
    first = [*rows][3:6]  # the most telling ones
    assert [name.rpartition(": ")[2] for name in first] == ["graph", "--no-graph", "a plain loop"]
    assert sum("images/s" in what for what in rows.values()) >= 17
    assert torch.__version__ in rows["python, torch"]
    assert result.stdout.endswith(" 0 rows skipped\n")
    if gpu_first.STANDIN:
        assert sum(what == "the same bits" for what in rows.values()) == 5
        assert float(rows["graph and --no-graph"].rpartition(" ")[2]) < 1e-6


def test_a_row_that_no_longer_fits_is_skipped_and_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu_first.row, "skipped", 0)
    monkeypatch.setattr(gpu_first.row, "end", time.monotonic() + 60)
    gpu_first.row("first", lambda: "7 images/s")
    gpu_first.row("second", lambda: 1 / 0)
    gpu_first.row("third", lambda: pytest.fail("made"), 100)
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["first", "7 images/s"],
        ["second", "ZeroDivisionError: division by zero"],
        ["third", "skipped: no time left"],
    ]
    assert gpu_first.row.skipped == 1


# -------------------------------------------------------------------------------------- anywhere


def test_without_a_gpu_the_first_minutes_are_one_line():
    result = on_the_cpu(gpu_first.__file__, code=2)
    assert result.stdout == "" and result.stderr.startswith("no GPU that this torch can use")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("torch_for, card, reason", [
    (None, True, "this torch is built for CPUs: https://pytorch.org"),
    ("12.8", True, "no driver that fits CUDA 12.8, see nvidia-smi"),
    ("12.8", False, "no driver that fits CUDA 12.8, see nvidia-smi"),
    (None, False, None),
])  # fmt: skip
def test_a_gpu_that_cannot_be_used_is_one_loud_line(torch_for, card, reason, monkeypatch, capsys):
    Path("bin").mkdir()
    Path("bin/nvidia-smi").write_text("#!/bin/sh\n")
    Path("bin/nvidia-smi").chmod(0o755 if card else 0o644)
    monkeypatch.setenv("PATH", str(Path("bin").resolve()))
    monkeypatch.setattr(torch.version, "cuda", torch_for)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert common.choose_device("auto") == torch.device("cpu")
    out = capsys.readouterr().out
    assert out.startswith("WARNING: no GPU is used") == bool(reason) and (reason or "") in out
    assert out.count("\n") == bool(reason)
    common.choose_device("cpu")  # chosen, so not worth a word
    assert capsys.readouterr().out == ""


LATER = "\nCUDA kernel errors might be asynchronously reported at some other API call\nCompile with"
CAUSES = {
    "torch is too old": "CUDA error: no kernel image is available for execution on the device"
    + LATER,
    "busy": "CUDA error: CUDA-capable device(s) is/are busy or unavailable" + LATER,
    "full": "CUDA error: out of memory" + LATER,
    "the driver is too old": "The NVIDIA driver on your system is too old (found version 11040).",
    "none": "Torch not compiled with CUDA enabled",
}


@pytest.mark.parametrize("cause", CAUSES)
def test_why_a_gpu_cannot_be_used_is_said_in_its_own_words(cause, imgs, monkeypatch, capsys):
    def fails(*shape, device=None):
        raise (AssertionError if cause == "none" else RuntimeError)(CAUSES[cause])

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "zeros", fails)
    monkeypatch.setattr(sys, "argv", ["train_dcgan.py", "--path=imgs", "--device=cuda"])
    with pytest.raises(SystemExit) as stop:
        train_dcgan.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "try cpu" in error
    assert CAUSES[cause].partition("\n")[0] in error and "--batch_size" not in error


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),  # cuDNN 9
    RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] data. DefaultCPUAllocator: not enough memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: str(error)[:60])
def test_every_kind_of_full_memory_is_one_line_and_exit_code_2(error, imgs, monkeypatch, capsys):
    def full(*_):
        raise error

    monkeypatch.setattr(train_dcgan, "train_step", full)
    flags = ["--path=imgs", "--image_size=16", "--width=4", "--out=run"]
    monkeypatch.setattr(sys, "argv", ["train_dcgan.py", *flags])
    with pytest.raises(SystemExit) as stop:
        train_dcgan.main()
    assert stop.value.code == 2
    line = "error: out of memory: lower --batch_size, --width or --image_size\n"
    assert capsys.readouterr().err == line


def test_other_errors_of_a_gpu_stay_what_they_are(capsys):
    with pytest.raises(RuntimeError, match="illegal memory access"):
        with common.exit_codes():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


class Recorder(torch.overrides.TorchFunctionMode):
    """Notes what is made on a GPU, and makes it on the CPU."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if "cuda" in str(kwargs.get("device")):
            self.calls.append(f"{function.__name__} {kwargs.pop('device')}")
        return function(*args, **kwargs)


@pytest.mark.parametrize(
    "name, local_rank, chosen",
    [
        ("cuda", "3", 3),
        ("auto", "1", 1),
        ("cuda:0", "2", 2),
        ("cuda:1", None, 1),
        ("cuda", None, 0),
    ],
)
def test_the_gpu_of_a_process_is_set_before_any_is_touched(name, local_rank, chosen, monkeypatch):
    calls, gpu = [], torch.device("cuda", chosen)
    for variable in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        monkeypatch.setattr(common, "WORLD_SIZE", 4)
        monkeypatch.setattr(common, "join_ranks", lambda device: None)
    found = lambda check_available: torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", found)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    asked = lambda including_emulation: calls.append("bf16?") or True
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", asked)
    noted = lambda device: calls.append(f"set_device {torch.device(device)}")
    monkeypatch.setattr(torch.cuda, "set_device", noted)
    args = train_dcgan.get_args([f"--device={name}", "--path=x"])
    with Recorder(calls):
        assert common.setup(args) == gpu
    assert calls[0] == f"set_device {gpu}" and calls[1:] == [f"zeros {gpu}", "bf16?"]


@pytest.mark.parametrize("name, chosen", [("cuda", 0), ("cuda:1", 1)])
def test_a_process_alone_takes_no_hint_of_a_scheduler(name, chosen, monkeypatch):
    calls = []
    monkeypatch.setenv("LOCAL_RANK", "3")  # set for jobs of one process too
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(device.index))
    with Recorder([]):
        assert common.choose_device(name) == torch.device("cuda", chosen)
    assert calls == [chosen]


def test_images_are_drawn_without_tf32_and_with_the_same_kernels_each_time(imgs, monkeypatch):
    """By training and by generate.py, the statistics of BatchNorm included."""
    flags = lambda: (
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic,
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32,
    )  # fmt: skip
    drawn, trained = set(), set()
    forward = train_dcgan.Generator.forward

    def noting(G, z):
        (drawn if not next(G.parameters()).requires_grad else trained).add(flags())
        return forward(G, z)

    monkeypatch.setattr(train_dcgan.Generator, "forward", noting)
    train_dcgan.train(**SMALL | {"epochs": 3, "checkpoint": 1, "sample_every": 2})
    assert trained == {(True, False, True, True)} and drawn == {(False, True, False, False)}
    assert flags() == (True, False, True, True)  # as before


def test_every_generator_that_draws_is_seeded_for_each_step(imgs, monkeypatch):
    """A GPU's own too; the seed of a step follows from its number."""
    gpus = torch.Generator(), torch.Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", gpus)
    seeds, step = [], train_dcgan.train_step

    def noting(*arguments):
        seeds.append({torch.initial_seed(), *(gpu.initial_seed() for gpu in gpus)})
        return step(*arguments)

    monkeypatch.setattr(train_dcgan, "train_step", noting)
    train_dcgan.train(**SMALL | {"epochs": 2}, graph=False)
    assert all(len(seed) == 1 for seed in seeds) and len(set.union(*seeds)) == len(seeds) == 6


def operations_of_a_step(image_size=64):
    """Of train_dcgan.py's in bf16, the average included, and of Augment's forward alone."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args = types.SimpleNamespace(
        k=1, z_dim=8, one_sided=0.0, r1=0.0, precision="bf16", compile=False
    )
    G, D = train_dcgan.Generator(image_size, 3, 8, 4), train_dcgan.Discriminator(image_size, 3, 4)
    G_ema = common.averaged(G, device)
    G, D = common.prepare(G, device, args), common.prepare(D, device, args)
    opts = [torch.optim.Adam(net.parameters(), 1e-3, fused=True) for net in (D, G)]
    augment = train_dcgan.Augment(image_size).to(device)
    real = torch.rand(4, 3, image_size, image_size, device=device)
    real = real.to(memory_format=torch.channels_last)
    for _ in range(2):  # the first makes the moments
        with gpu_first.Operations() as step:
            train_dcgan.train_step(G, D, *opts, augment, real, False, args)
            common.update_ema(G_ema, G, 3, 0.99)
    with gpu_first.Operations() as forward:
        augment(real)
    return step.names, forward.names


def test_a_step_at_64_pixels_is_fewer_than_320_operations_and_augmentation_25():
    """A GPU is bound by their number: it was 406, of which 165 were augmentation."""
    step, augment = operations_of_a_step()
    assert len(augment) <= 25, augment
    assert 200 < len(step) < 320, sorted(step)
    assert step.count("_fused_adam_") == 2 and step.count("_foreach_lerp_") == 1
