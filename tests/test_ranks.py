"""Several processes under torchrun: the same training, shared; only rank 0 writes."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_run import assert_equal

import common
import train_dcgan

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
WORKER = str(ROOT / "tests/rank_worker.py")
TINY = ["--image_size=16", "--z_dim=8", "--batch_size=12", "--channels=1", "--precision=fp32"]
TINY += ["--device=cpu"]  # wherever: there are more processes than GPUs
PLAIN = ["--norm=none", "--flip"]  # nothing per rank in it, z being the same; R1: no augmentation
STILL = ["--lrd=0", "--lrg=0", "--epochs=1"]
SCENARIOS = [
    ["train_dcgan", *TINY, *PLAIN, *STILL, "--width=4", "--k=2", "--r1=1", "--path=imgs",
     "--out=dcgan"],
    ["train_fcgan", *TINY, *PLAIN, *STILL, "--hidden_g=9", "--hidden_d=9", "--dropout=0",
     "--path=imgs", "--out=fcgan"],
    ["train_balanced", *TINY, "--width=4", "--path=imgs", "--out=balanced", "--epochs=2",
     "--margin=0"],
    ["train_dcgan", *TINY, "--width=4", "--flip", "--path=imgs", "--out=undisturbed",
     "--epochs=3"],
]  # fmt: skip


@pytest.fixture
def grey_levels():
    """A folder imgs/ of 29 images, ramps that begin with the grey level 8 i."""
    Path("imgs").mkdir()
    for i in range(29):
        ramp = np.tile(8 * i + np.arange(16) // 3, (16, 1))
        Image.fromarray(ramp.astype(np.uint8)).save(f"imgs/{i:02d}.png")


def start(launcher, *command, **environment):
    """A process group of its own, as a shell starts one."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [*TORCHRUN, *launcher, *map(str, command)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def finish(process, code=0, timeout=120):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == code, out + err
    return out, err


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def noted(run, ranks):
    return [torch.load(f"{run}-{ranks}-{rank}.pt") for rank in range(ranks)]


def assert_same_tensors(a, b, **tolerance):
    """Of two lists, or dicts, of lists of tensors; to the bit unless a tolerance is given."""
    assert len(a) == len(b) > 0
    for name in a if isinstance(a, dict) else range(len(a)):
        for x, y in zip(a[name], b[name], strict=True):
            torch.testing.assert_close(x, y, **tolerance or {"rtol": 0, "atol": 0})


def test_two_machines_and_three_processes_train_as_one_does(grey_levels):
    job = json.dumps(SCENARIOS)
    subprocess.run([sys.executable, WORKER, job], check=True, capture_output=True)
    for run in ("dcgan", "fcgan", "balanced", "undisturbed"):
        Path(run).rename(f"{run}-of-1")
    shutil.rmtree(".cache")  # for rank 0 alone to build again
    finish(start(["--standalone", "--nproc_per_node=3"], WORKER, job))
    for run in ("dcgan", "fcgan", "balanced", "undisturbed"):
        Path(run).rename(f"{run}-of-3")
    shutil.rmtree(".cache")
    there = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1"]
    there += [f"--master_port={free_port()}"]
    machines = [start([*there, f"--node_rank={rank}"], WORKER, job) for rank in range(2)]
    (out, _), (silence, _) = map(finish, machines)
    silence = [line for line in silence.splitlines() if not line.startswith("[Gloo]")]
    assert "2 processes" in out and not silence

    for run in ("dcgan", "fcgan", "balanced", "undisturbed"):
        (alone,) = noted(run, 1)
        for ranks in (2, 3):
            parts = noted(run, ranks)
            for part in parts[1:]:
                assert part["written"] == [] and part["step"] == alone["step"]
                assert_same_tensors(part["weights"], parts[0]["weights"])
                assert_same_tensors(part["averaged"], parts[0]["averaged"])
            own = [[torch.stack(each).mean(0) for each in zip(*grads, strict=True)]
                   for grads in zip(*(part["own"] for part in parts), strict=True)]  # fmt: skip
            assert_same_tensors(parts[0]["averaged"], own, rtol=1e-5, atol=1e-7)
            together = torch.cat([part["numbers"] for part in parts])
            assert len(together) == len(set(together.tolist())) == 24  # each once an epoch
            assert set(together.tolist()) == set(alone["numbers"].tolist())
            for part in (alone, *parts):
                levels = (part["seen"][:, 0, 0, 0] + 1) * 127.5
                assert torch.equal(levels.round().long() // 8, part["numbers"])
            if run in ("dcgan", "fcgan"):  # nothing random enters: the gradients of one process
                for part in parts:
                    assert_same_tensors(part["averaged"], alone["own"], rtol=1e-4, atol=1e-6)
                rows = [np.loadtxt(f"{name}/metrics.csv", delimiter=",", skiprows=1, ndmin=2)
                        for name in (f"{run}-of-1", f"{run}-of-3", run)]  # fmt: skip
                assert rows[0].shape == rows[1].shape == rows[2].shape
                for row in rows[1:]:
                    np.testing.assert_allclose(row[:, 5:10], rows[0][:, 5:10], rtol=1e-4)
            else:  # z, augmentation and dropout are each rank's own
                assert not torch.equal(parts[0]["own"][-1][0], parts[1]["own"][-1][0])
    assert Path("undisturbed/losses.png").exists()

    # a worker killed at some step is started again and ends with the same bits
    disturbed = [word.replace("undisturbed", "disturbed") for word in SCENARIOS[-1]] + ["--resume"]
    launcher, event = (
        ["--standalone", "--nproc_per_node=2", "--max_restarts=1"],
        random.randint(1, 5),
    )
    print("killed at the end of step", event)
    out, _ = finish(start(launcher, WORKER, json.dumps([disturbed]), EVENT=f"kill {event}"))
    begun, again = map(int, re.findall(r"^disturbed: step (\d) to 6", out, re.M))
    assert begun == 0 and again in (event - 1, event)  # or rank 0 was ended as it saved
    assert_same_run("undisturbed", "disturbed")

    # one alone under torchrun ends with the bits of a plain process
    shutil.rmtree("undisturbed")
    finish(start(["--standalone", "--nproc_per_node=1"], WORKER, json.dumps(SCENARIOS[-1:])))
    assert_same_run("undisturbed-of-1", "undisturbed")


def assert_same_run(a, b):
    """The same bits in networks, optimisers, augmentation and losses."""
    kept = [common.load_file(f"{run}/checkpoint.pt") for run in (a, b)]
    for name in ("G", "D", "G_ema", "opt_d", "opt_g", "augment"):
        assert_equal(kept[0][name], kept[1][name])
    losses = [
        [line.split(",")[5:] for line in Path(run, "metrics.csv").read_text().splitlines()]
        for run in (a, b)
    ]
    assert losses[0] == losses[1] and len(losses[0]) > 3


def test_an_error_in_one_rank_ends_all_with_the_reason_on_screen(grey_levels):
    launcher, job = ["--standalone", "--nproc_per_node=2"], json.dumps(SCENARIOS[-1:])
    started = time.monotonic()
    _, err = finish(start(launcher, WORKER, job, EVENT="raise 3"), code=1)
    assert "rank 1 has had enough" in err and time.monotonic() - started < 60
    assert common.load_file("undisturbed/checkpoint.pt")["step"] == 3


def test_a_batch_that_does_not_divide_is_refused_before_a_folder_is_made(grey_levels):
    flags = ["--path=imgs", "--batch_size=7", "--device=cpu"]
    launcher = ["--standalone", "--nproc_per_node=2"]
    _, err = finish(start(launcher, ROOT / "train_dcgan.py", *flags), code=1)
    assert "error: --batch_size 7 does not divide by 2 processes\n" in err
    assert not Path("runs").exists() and not Path(".cache").exists()


def test_ctrl_c_ends_all_ranks_at_the_same_step_with_a_checkpoint(grey_levels):
    scenario = [*SCENARIOS[-1][:-1], "--epochs=100000"]
    process = start(["--standalone", "--nproc_per_node=2"], WORKER, json.dumps([scenario]))
    metrics = Path("undisturbed/metrics.csv")
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, _ = process.communicate(timeout=60)
    assert "to go on: python train_dcgan.py --resume undisturbed" in out
    steps = [part["step"] for part in noted("undisturbed", 2)]
    assert steps[0] == steps[1] == common.load_file("undisturbed/checkpoint.pt")["step"]


def test_several_speak_as_one_and_one_alone_can_resume(grey_levels):
    launcher, flags = ["--standalone", "--nproc_per_node=2"], ["--path=imgs", "--width=4"]
    out, _ = finish(start(launcher, ROOT / "train_dcgan.py", *flags, *TINY, "--epochs=1"))
    assert "on cpu, 2 processes" in out and out.count("epoch 1/1, ") == 1
    train_dcgan.train(resume="newest", epochs=2)
    assert common.load_file("runs/dcgan-imgs/checkpoint.pt")["step"] == 4
