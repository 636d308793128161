"""Whole runs: what a run's folder holds, resuming, interruptions, settings, bad input."""

import csv
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, write_images
from PIL import Image

import common
import generate
import train_dcgan

SMALL = {"path": "imgs", "image_size": 16, "width": 4, "z_dim": 8, "batch_size": 8, "epochs": 6}


def assert_same_run(a, b):
    """The same bits in checkpoints, snapshots, samples and losses (but not in times)."""
    first, second = (torch.load(Path(run, "checkpoint.pt"), weights_only=True) for run in (a, b))
    for content in (first, second):
        content["config"].pop("epochs")
        content.pop("seconds")
    assert_equal(first, second)
    pictures = sorted(path.relative_to(a) for path in Path(a).glob("samples/*.png"))
    assert pictures == sorted(path.relative_to(b) for path in Path(b).glob("samples/*.png"))
    for name in [*pictures, "training.gif"]:
        assert Path(a, name).read_bytes() == Path(b, name).read_bytes(), name
    timed = ("seconds", "images_per_s")
    rows = [
        [{k: v for k, v in row.items() if k not in timed} for row in read(run)] for run in (a, b)
    ]
    assert rows[0] == rows[1]


def assert_equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def read(run):
    with Path(run, "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_writes_all_its_files(imgs):
    folder = train_dcgan.train(**SMALL, checkpoint=4, sample_every=2)
    assert folder == Path("runs/dcgan-imgs")
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert names == [
        *("checkpoint.pt", "config.ini", "generator_0004.pt", "generator_0006.pt", "losses.png"),
        *("metrics.csv", "samples/epoch_0000.png", "samples/epoch_0002.png"),
        *("samples/epoch_0004.png", "samples/epoch_0006.png", "samples/real.png", "training.gif"),
    ]
    grids = [Image.open(folder / "samples" / f"epoch_{epoch:04d}.png") for epoch in (0, 2, 4, 6)]
    assert {grid.size for grid in grids} == {(8 * 18 + 2, 8 * 18 + 2)}  # 8 x 8 images of 16
    assert len({grid.tobytes() for grid in grids}) == 4
    assert Image.open(folder / "training.gif").n_frames == 4
    assert Image.open(folder / "samples/real.png").size == (5 * 18 + 2, 5 * 18 + 2)  # all 24
    rows = read(folder)
    assert list(rows[0]) == common.COLUMNS
    assert [int(row["step"]) for row in rows] == list(range(1, 19))  # 24 images / 8, 6 epochs
    assert [int(row["epoch"]) for row in rows] == [1 + i // 3 for i in range(18)]
    assert float(rows[-1]["kimg"]) == 18 * 8 / 1000
    assert all(0 < float(row["d_real"]) < 1 and float(row["images_per_s"]) > 0 for row in rows)
    assert train_dcgan.train(**SMALL | {"epochs": 1}) == Path("runs/dcgan-imgs-2")


def test_resume_equals_a_run_that_was_never_interrupted(imgs, capsys):
    settings = SMALL | {"augment": "translation,colour", "k": 1, "lr_decay": 0.9, "flip": True}
    whole = train_dcgan.train(**settings, out="whole")
    parts = train_dcgan.train(**settings | {"epochs": 3}, out="parts")
    train_dcgan.train(resume=parts, epochs=6)
    assert_same_run(whole, parts)
    assert "parts: step 9 to 18, 3 an epoch" in capsys.readouterr().out


def test_ctrl_c_within_an_epoch_saves_and_resume_goes_on(imgs, monkeypatch, capsys):
    whole = train_dcgan.train(**SMALL, out="whole")
    step, calls = train_dcgan.train_step, []

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) in (4, 11):
            signal.raise_signal(signal.SIGINT if len(calls) == 4 else signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(train_dcgan, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_dcgan.train(**SMALL)
    assert "python train_dcgan.py --resume runs/dcgan-imgs" in capsys.readouterr().out
    assert torch.load("runs/dcgan-imgs/checkpoint.pt", weights_only=True)["step"] == 4
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, "--resume")
    assert stop.value.code == 130
    train_dcgan.train(resume=True)
    assert len(calls) == 18
    assert_same_run(whole, "runs/dcgan-imgs")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_stop_in_the_first_step_is_a_stop_too(monkeypatch, capsys):
    write_images(Path("many"), 200)  # 100 steps an epoch, so the first row comes at step 5
    step = train_dcgan.train_step

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(train_dcgan, "train_step", interrupted)
    flags = ["--image_size=16", "--width=4", "--batch_size=2", "--epochs=1"]
    with pytest.raises(SystemExit) as exit:
        run_main(monkeypatch, "--path=many", *flags)
    assert exit.value.code == 130 and "--resume runs/dcgan-many" in capsys.readouterr().out
    monkeypatch.setattr(train_dcgan, "train_step", step)
    assert len(read(train_dcgan.train(resume=True))) == 20


def test_the_newest_run_is_of_this_script_whatever_its_folder_is_called(imgs):
    run = train_dcgan.train(**SMALL | {"epochs": 1}, out="runs/faces")
    other = Path("runs/other")
    shutil.copytree(run, other)
    (other / "config.ini").write_text("[train_other]\n")
    assert common.newest_run() == other and common.newest_run("train_dcgan") == run
    assert train_dcgan.train(resume=True, epochs=2) == run
    assert "epochs = 2\n" in (run / "config.ini").read_text()


def test_the_gif_has_the_grids_in_order_and_at_most_200(imgs, monkeypatch):
    run = train_dcgan.train(**SMALL | {"epochs": 1}, out="run")
    for epoch in range(9_990, 10_200):
        shutil.copy(run / "samples/epoch_0001.png", run / f"samples/epoch_{epoch:04d}.png")
    shown = []
    monkeypatch.setattr(
        common, "save_gif", lambda frames, _: shown.extend(f.filename for f in frames)
    )
    train_dcgan.train(resume=run)
    numbers = [int(Path(name).stem.removeprefix("epoch_")) for name in shown]
    assert len(numbers) == 200 and numbers == sorted(numbers)
    assert numbers[0] == 0 and numbers[-1] == 10_199


def test_resume_forgets_what_came_after_the_checkpoint(imgs):
    """As after a kill: rows and a part of a row that the checkpoint does not know, leftovers."""
    whole = train_dcgan.train(**SMALL, out="whole")
    killed = train_dcgan.train(**SMALL | {"epochs": 3}, out="killed")
    with (killed / "metrics.csv").open("a") as file:
        file.write("10,4,0.08,1,1,1,1,1,1,1\n11,4,0.0")
    (killed / ".checkpoint.pt.77-8.part").write_text("half")
    train_dcgan.train(resume=killed, epochs=6)
    assert_same_run(whole, killed)
    assert not list(killed.glob(".*"))


def test_config_repeats_a_run_and_typed_flags_win(imgs):
    Path("imgs").rename("50% of \"my\" 'imgs' ünï")
    first = train_dcgan.train(
        **SMALL | {"path": "50% of \"my\" 'imgs' ünï", "epochs": 2, "out": "a"}
    )
    again = train_dcgan.train(config="a/config.ini", out="b")
    assert_same_run(first, again)
    shorter = train_dcgan.train(config="a/config.ini", epochs=1, out="c")
    assert len(read(shorter)) == 3
    write_images(Path("other"), 8)
    elsewhere = train_dcgan.train(config="a/config.ini", path="other", out="d")
    assert len(read(elsewhere)) == 2
    assert train_dcgan.get_args(["--config=a/config.ini", "--dataset=glyphs"]).path is None
    Path("hand.ini").write_text("[mine]\npath = a\nepochs = 7\nflip = true\nlrd = 1e-5\n")
    args = train_dcgan.get_args(["--config=hand.ini", "--lrd=2e-5"])
    assert (args.path, args.epochs, args.flip, args.lrd) == ("a", 7, True, 2e-5)


@pytest.mark.parametrize("n, k, batch_size, steps", [(5, 1, 5, 1), (7, 3, 2, 1), (24, 2, 8, 1)])
def test_small_sets_shrink_the_batch(n, k, batch_size, steps, capsys):
    write_images(Path("imgs"), n)
    folder = train_dcgan.train(**SMALL | {"epochs": 1, "k": k})
    assert (f"batches of {batch_size}: " in capsys.readouterr().out) == (batch_size < 8)
    assert [float(row["kimg"]) for row in read(folder)] == [k * batch_size * steps / 1000]


@pytest.mark.parametrize("image_size, mode", [(32, "L"), (64, "RGB"), (128, "RGB")])
def test_sizes_and_channels_train(image_size, mode):
    write_images(Path("imgs"), 8, mode)
    run = train_dcgan.train(**SMALL | {"image_size": image_size, "width": 2, "epochs": 1})
    grid = Image.open(run / "samples/epoch_0001.png")
    assert grid.mode == mode and grid.size == (8 * (image_size + 2) + 2,) * 2
    G, z = generate.load_generator(run)
    images = generate.sample(G, z, range(2))
    assert images.shape == (2, image_size, image_size, 1 if mode == "L" else 3)


def test_each_image_once_an_epoch_in_another_order_each_time(monkeypatch):
    images = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1)
    monkeypatch.setattr(common.Run, "sample", lambda run: None)
    monkeypatch.setattr(common.Run, "save", lambda run: None)
    monkeypatch.setattr(common.Run, "announce", lambda run: None)
    orders = []
    for seed in (0, 0, 1):
        flags = ["--dataset=glyphs", f"--seed={seed}", "--batch_size=2", "--epochs=2"]
        args = train_dcgan.get_args(flags)
        run = common.Run(args, "train_x.py", images, torch.device("cpu"), {}, {})
        order = []
        batches = run.remaining_steps()
        for _ in range(run.steps):
            order += ((next(batches) + 1) * 127.5).ravel().tolist()
            run.step += 1
        orders.append([round(number) for number in order])
    assert all(sorted(order[:10]) == sorted(order[10:]) == list(range(10)) for order in orders)
    assert orders[0] == orders[1] != orders[2] and orders[0][:10] != orders[0][10:]


def test_flip_mirrors_about_half_of_the_images():
    images = np.zeros((400, 2, 2, 1), np.uint8)
    images[:, :, 0] = 255
    args = train_dcgan.get_args(["--flip", "--batch_size=400"])
    run = common.Run(args, "train_x.py", images, torch.device("cpu"), {}, {})
    run.step = 1  # past the untrained samples
    left_is_white = next(run.remaining_steps())[:, 0, 0, 0] == 1
    assert 150 < left_is_white.sum() < 250


def test_losses_that_are_not_finite_stop_the_run_and_leave_the_checkpoint(imgs):
    with pytest.raises(
        common.UserError, match="a (loss|weight) is not finite at step .*lower rates"
    ):
        train_dcgan.train(**SMALL | {"norm": "none", "epochs": 200}, lrd=1e30, lrg=1e30)
    kept = torch.load("runs/dcgan-imgs/checkpoint.pt", weights_only=True)
    assert all(v.isfinite().all() for v in kept["G"].values())


def test_a_changed_copy_trains_resumes_and_generates(imgs):
    """train_mine.py with another Generator: nothing else needs to know."""
    for name in ("common.py", "generate.py"):
        shutil.copy(ROOT / name, name)
    source = (ROOT / "train_dcgan.py").read_text()
    start, end = source.index("class Generator"), source.index("class Discriminator")
    mine = """class Generator(nn.Module):
    def __init__(self, side, depth):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 3 * side * side * depth), nn.Tanh())
        self.shape = depth, 3, side, side

    def forward(self, z):
        return self.net(z).view(-1, *self.shape).float().mean(1)


"""
    source = source[:start] + mine + source[end:]
    old = 'generator_args = size | {"z_dim": args.z_dim, "norm": args.norm, "alpha": args.alpha_g}'
    assert source.count(old) == 1
    source = source.replace(old, 'generator_args = {"side": args.image_size, "depth": 2}')
    Path("train_mine.py").write_text(source)
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    command(sys.executable, "train_mine.py", *flags, "--epochs=2")
    command(sys.executable, "train_mine.py", "--resume", "--epochs=3")
    output = command(sys.executable, "generate.py", "--img_num=4").stdout
    assert "4 images of runs/mine-imgs in generated/mine-imgs" in output
    grid = np.asarray(Image.open("runs/mine-imgs/samples/epoch_0003.png"))
    single = np.asarray(Image.open("generated/mine-imgs/seed0_000003.png"))
    assert (single == grid[2:18, 2 + 3 * 18 : 4 * 18]).all()


def command(*words, code=0):
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    return result


def test_python_use_as_the_readme_shows_it(imgs):
    G, z = generate.load_generator(train_dcgan.train(**SMALL | {"epochs": 1}))
    images = generate.sample(G, z, range(10), seed=0)
    assert images.shape == (10, 16, 16, 3) and images.dtype == np.uint8
    common.save_grid(images, "grid.png")
    assert Image.open("grid.png").size == (4 * 18 + 2, 3 * 18 + 2)
    assert "parameters" in common.summary(G, torch.zeros(1, z["dim"]))


def run_main(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["train_dcgan.py", *argv])
    train_dcgan.main()


BAD = {
    "--path=nowhere": "nowhere does not exist",
    "--path=empty": "no images in empty (looked for .jpg",
    "--path=imgs --image_size=48": "--image_size 48 is not 16, 32, 64, 128 or 256",
    "--path=imgs --out=run": "run holds a run: --resume run goes on, or pass another --out",
    "--resume=empty": "no such file: empty/checkpoint.pt",
    "--resume": "there is no run of train_dcgan.py in runs/",
    "--resume=run --width=8": "--width is 4 in run and cannot change on --resume",
    "--resume=run --out=other": "omit --out and --config",
    "--config=unknown.ini": "--config unknown.ini: unknown setting 'epoch' (known: path,",
    "--config=wrong.ini": "--config wrong.ini: argument --epochs: 'many' is no int of 1 or more",
    "--config=broken.ini": "--config broken.ini: File contains no section headers.",
    "--config=missing.ini": "--config missing.ini: [Errno 2] No such file",
    "--device=cuda:77": "--device cuda:77 is not available here: try cpu",
    "--device=meta": "--device meta is not available here",
    "--width=70000": "'70000' is no int from 1 to 65536",
    "--path=imgs --out=single/a.png": "File exists: 'single/a.png'",
    "--device=toaster": "--device toaster is not available here",
    "--epochs=0": "argument --epochs: '0' is no int of 1 or more",
    "--one_sided=2": "argument --one_sided: '2' is no float from 0 to 1",
    "--lrd=nan": "argument --lrd: 'nan' is no float",
    "--r1=1 --compile": "--compile has no second derivatives for --r1: omit it, or --r1 0",
    "--augment=blur": "argument --augment: 'blur' is not auto, none or some of colour",
    "--epoch=3": "unrecognized arguments: --epoch=3",
    "--path=imgs --dataset=glyphs": "omit one of them",
    "--path=single": "1 images are too few: a step needs 2",
}


def test_bad_input_is_one_line_and_exit_code_2(imgs, monkeypatch, capsys):
    train_dcgan.train(**SMALL | {"epochs": 1}, out="run")
    Path("empty").mkdir()
    Path("single").mkdir()
    Image.new("RGB", (16, 16)).save("single/a.png")
    Path("unknown.ini").write_text("[x]\nepoch = 3\n")
    Path("wrong.ini").write_text("[x]\nepochs = many\n")
    Path("broken.ini").write_text("epochs = 3\n")
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    for flags, message in BAD.items():
        with pytest.raises(SystemExit) as exit:
            run_main(monkeypatch, *flags.split())
        error = capsys.readouterr().err
        assert exit.value.code == 2, flags
        assert error.startswith("error: ") and message in error and error.count("\n") == 1, error
    shutil.rmtree(".cache"), Path(".cache").mkdir()
    assert [path for path in before if ".cache/" not in str(path)] == sorted(Path().rglob("*"))


def test_damaged_checkpoints_are_refused(imgs, monkeypatch, capsys):
    run = train_dcgan.train(**SMALL | {"epochs": 1}, out="run")
    whole = (run / "checkpoint.pt").read_bytes()
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    for change in ({"script": "train_other"}, {"n_images": 3}, {"D": {}}, {"pending": None}):
        torch.save(content | change, run / "checkpoint.pt")
        with pytest.raises(SystemExit):
            run_main(monkeypatch, "--resume=run", "--epochs=2")
        assert capsys.readouterr().err.startswith("error: ")
    for damaged in (b"", whole[:1000], b"x" * 1000):
        (run / "checkpoint.pt").write_bytes(damaged)
        with pytest.raises(common.UserError, match="damaged"):
            train_dcgan.train(resume=run)


def test_advice_by_the_number_of_images(capsys):
    args = {"epochs": 50, "flip": False, "augment": "none"}
    common.advise(400, SimpleNamespace(**args))
    out = capsys.readouterr().out
    assert "20,000 images" in out and "--epochs 750 here" in out
    assert "--flip if" in out and "--augment colour,translation,cutout" in out
    common.advise(400, SimpleNamespace(**args | {"epochs": 750, "flip": True, "augment": "cutout"}))
    out = capsys.readouterr().out
    assert "--epochs" not in out and "--flip" not in out and "--augment" not in out
    assert "--nearest" in out
    common.advise(12_000, SimpleNamespace(**args))
    assert capsys.readouterr().out == ""


FAILING = {
    "D has won": {"lrg": 0.0, "lrd": 0.002},
    "G has collapsed": {"lrg": 0.05, "lrd": 0.0, "norm": "none"},
}


@pytest.mark.parametrize("what", FAILING)
def test_a_failing_run_is_told_once_and_which_flags_help(what, imgs, monkeypatch, capsys):
    monkeypatch.setattr(common, "PATIENCE", 20)
    train_dcgan.train(**SMALL | {"epochs": 40} | FAILING[what])
    out = capsys.readouterr().out
    assert out.count(f"warning: {what}: ") == 1
    assert "Try a lower --lrd or " in out and "--r1 1" in out
