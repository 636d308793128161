"""Whole runs: what a run's folder holds, resuming, interruptions, settings, bad input."""

import csv
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, write_images
from PIL import Image
from torch import nn

import common
import generate
import train_dcgan

STATS = ["loss_d", "loss_g", "d_real", "d_fake", "d_fake_after", "p"]  # of train_dcgan.py
SMALL = {"path": "imgs", "image_size": 16, "width": 4, "z_dim": 8, "batch_size": 8, "epochs": 6}


def assert_same_run(a, b):
    """The same bits in checkpoints, snapshots, samples and losses (but not in times)."""
    first, second = (torch.load(Path(run, "checkpoint.pt"), weights_only=True) for run in (a, b))
    for content in (first, second):
        content["config"].pop("epochs"), content["typed"].pop("epochs")
        content["config"].pop("channels")  # "auto", or what that was, of a resumed run
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
        *(".lock", "checkpoint.pt", "config.ini", "generator_0004.pt", "generator_0006.pt"),
        *("losses.png", "metrics.csv", "samples/epoch_0000.png", "samples/epoch_0002.png"),
        *("samples/epoch_0004.png", "samples/epoch_0006.png", "samples/latest.png"),
        *("samples/real.png", "training.gif"),
    ]
    latest = (folder / "samples/latest.png").read_bytes()
    assert latest == (folder / "samples/epoch_0006.png").read_bytes()
    grids = [Image.open(folder / "samples" / f"epoch_{epoch:04d}.png") for epoch in (0, 2, 4, 6)]
    assert {grid.size for grid in grids} == {(8 * 18 + 2, 8 * 18 + 2)}  # 8 x 8 images of 16
    assert len({grid.tobytes() for grid in grids}) == 4
    assert Image.open(folder / "training.gif").n_frames == 4
    assert Image.open(folder / "samples/real.png").size == (5 * 18 + 2, 5 * 18 + 2)  # all 24
    rows = read(folder)
    assert list(rows[0]) == [*common.COLUMNS, *STATS]
    assert [int(row["step"]) for row in rows] == list(range(1, 19))  # 24 images / 8, 6 epochs
    assert [int(row["epoch"]) for row in rows] == [1 + i // 3 for i in range(18)]
    assert float(rows[-1]["kimg"]) == 18 * 8 / 1000
    assert all(0 < float(row["d_real"]) < 1 and float(row["images_per_s"]) > 0 for row in rows)
    assert train_dcgan.train(**SMALL | {"epochs": 1}) == Path("runs/dcgan-imgs-2")


def test_by_itself_a_run_keeps_about_100_grids_and_10_snapshots(imgs, monkeypatch):
    monkeypatch.setattr(common, "GRIDS", 4)
    monkeypatch.setattr(common, "SNAPSHOTS", 2)
    run = train_dcgan.train(**SMALL | {"epochs": 10})
    grids = [path.stem[-2:] for path in sorted(run.glob("samples/epoch_*.png"))]
    assert grids == ["00", "03", "06", "09", "10"]
    assert [path.stem[-2:] for path in sorted(run.glob("*_*.pt"))] == ["05", "10"]


def test_after_a_minute_a_row_brings_the_latest_grid_and_a_checkpoint(imgs, monkeypatch):
    monkeypatch.setattr(common, "MINUTE", -1)
    seen, saved, step = [], [], train_dcgan.train_step
    run = Path("runs/dcgan-imgs")
    latest = run / "samples/latest.png"

    def looked_at(*arguments):
        seen.append(latest.read_bytes())
        saved.append(common.load_file(run / "checkpoint.pt")["step"])
        return step(*arguments)

    monkeypatch.setattr(train_dcgan, "train_step", looked_at)
    train_dcgan.train(**SMALL, sample_every=6, checkpoint=6)
    assert len({*seen, latest.read_bytes()}) == 19  # before each of 18 steps, and at the end
    assert saved == [*range(18)]
    assert len(list(run.glob("samples/epoch_*.png"))) == 2
    monkeypatch.setattr(common, "MINUTE", 60)
    seen.clear(), saved.clear()
    train_dcgan.train(resume=run, epochs=8)
    assert saved == [18] * 6 and len({*seen}) == 1  # not yet


@pytest.mark.parametrize("steps, expected", [(3, [1, 2, 3]), (100, range(5, 101, 5))])
def test_rows_come_at_fixed_steps(steps, expected, monkeypatch):
    """Not by the clock: else kills would move them."""
    write_images(Path("many"), 2 * steps)
    stats = dict.fromkeys(STATS, torch.tensor(0.5))
    monkeypatch.setattr(train_dcgan, "train_step", lambda *_: stats)
    run = train_dcgan.train(**SMALL | {"path": "many", "batch_size": 2, "epochs": 2})
    expected = [*expected, *(steps + step for step in expected)]
    assert [int(row["step"]) for row in read(run)] == expected
    monkeypatch.setattr(common, "ROW_STEPS", 2)
    short = train_dcgan.train(**SMALL | {"path": "many", "batch_size": 2, "epochs": 1})
    assert [int(row["step"]) for row in read(short)][:2] == ([1, 2] if steps == 3 else [2, 4])


def test_resume_equals_a_run_that_was_never_interrupted(imgs, capsys):
    settings = SMALL | {"lr_decay": 0.9, "flip": True}
    whole = train_dcgan.train(**settings, out="whole")
    parts = train_dcgan.train(**settings | {"epochs": 3}, out="parts")
    train_dcgan.train(resume=parts, epochs=6)
    assert_same_run(whole, parts)
    assert "parts: step 9 to 18, 3 an epoch" in capsys.readouterr().out


def test_augmentation_by_need_is_a_curve_and_survives_a_resume(imgs, monkeypatch):
    """Its state is a part of the run: with p at 0 again, other bits would follow."""
    monkeypatch.setattr(train_dcgan, "PACE", 100)  # images for p to go from 0 to 1
    monkeypatch.setattr(train_dcgan, "TARGET", 0.1)
    settings = SMALL | {"lrd": 0.01, "lrg": 0.0, "epochs": 8}
    whole = train_dcgan.train(**settings, out="whole")
    parts = train_dcgan.train(**settings | {"epochs": 5}, out="parts")
    state = common.load_file(parts / "checkpoint.pt")["augment"]
    assert state["p"] > 0 and state["p"] == pytest.approx(float(read(parts)[-1]["p"]))
    train_dcgan.train(resume=parts, epochs=8)
    assert_same_run(whole, parts)
    ps = [float(row["p"]) for row in read(whole)]
    assert ps[0] == 0 and max(ps) > 0.3 and max(ps) <= train_dcgan.MOST + 1e-6
    assert max(abs(b - a) for a, b in zip(ps, ps[1:])) <= 8 / 100 + 1e-6
    panels = []
    monkeypatch.setattr(common, "save_curves", lambda drawn, *_: panels.extend(drawn))
    train_dcgan.train(resume=parts, epochs=9)
    (curve,) = [curves["p"] for _, _, curves in panels if "p" in curves]
    assert curve[: len(ps)] == ps and len(curve) == 27


def test_ctrl_c_within_an_epoch_saves_and_resume_goes_on(imgs, monkeypatch, capsys):
    plain = SMALL | {"graph": False}  # which a step that counts its calls is
    whole = train_dcgan.train(**plain, out="whole")
    step, calls = train_dcgan.train_step, []

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) in (4, 11):
            signal.raise_signal(signal.SIGINT if len(calls) == 4 else signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(train_dcgan, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_dcgan.train(**plain)
    out = capsys.readouterr().out
    assert "python train_dcgan.py --resume runs/dcgan-imgs" in out
    assert out.index("saved: runs/dcgan-imgs/checkpoint.pt at step 4") < out.index("stopped;")
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
    steps = [int(row["step"]) for row in read(train_dcgan.train(resume=True))]
    assert steps == [1, *range(5, 101, 5)]  # a row more, at the stop


def test_the_newest_run_is_of_this_script_whatever_its_folder_is_called(imgs):
    run = train_dcgan.train(**SMALL | {"epochs": 1}, out="runs/faces")
    other = Path("runs/other")
    shutil.copytree(run, other)
    (other / "config.ini").write_text("[train_other]\n")
    assert common.newest_run() == other and common.newest_run("train_dcgan") == run
    assert train_dcgan.train(resume=True, epochs=2) == run
    assert "epochs = 2\n" in (run / "config.ini").read_text()


def test_the_gif_has_the_grids_in_order_and_at_most_60(imgs, monkeypatch):
    run = train_dcgan.train(**SMALL | {"epochs": 1}, out="run")
    for epoch in range(9_990, 10_200):  # its number is its colour
        colour = epoch // 256, epoch % 256, 0
        Image.new("RGB", (8, 8), colour).save(run / f"samples/epoch_{epoch:04d}.png")
    shown = []
    monkeypatch.setattr(common, "save_gif", lambda frames, _: shown.extend(frames))
    train_dcgan.train(resume=run, epochs=2)
    numbers = [256 * f.getpixel((0, 0))[0] + f.getpixel((0, 0))[1] for f in shown if f.width == 8]
    assert len(shown) == 60 and shown[0].width > 8 and len(numbers) > 50
    assert numbers == sorted(numbers) and numbers[-1] == 10_199


def test_an_animation_stays_below_its_limit():
    """Of noise, which no format makes smaller; 10 MB by default, smaller here."""
    rng = np.random.default_rng(0)
    noise = rng.integers(256, size=(20, 100, 150, 3), dtype=np.uint8)
    common.save_gif([*map(Image.fromarray, noise)], "large.gif")
    assert Image.open("large.gif").size == (150, 100)
    common.save_gif([*map(Image.fromarray, noise)], "small.gif", limit=50_000)
    small = Image.open("small.gif")
    assert 20_000 < Path("small.gif").stat().st_size < 50_000
    assert small.n_frames == 20 and small.size[0] / small.size[1] == pytest.approx(1.5, rel=0.1)


def test_resume_forgets_what_came_after_the_checkpoint(imgs):
    """As after a kill: rows and a part of a row that the checkpoint does not know, leftovers."""
    whole = train_dcgan.train(**SMALL, out="whole")
    killed = train_dcgan.train(**SMALL | {"epochs": 3}, out="killed")
    with (killed / "metrics.csv").open("a") as file:
        file.write(f"10,4,0.08{',1' * 8}\n11,4,0.0")
    (killed / ".checkpoint.pt.77-8.part").write_text("half")
    train_dcgan.train(resume=killed, epochs=6)
    assert_same_run(whole, killed)
    assert [path.name for path in killed.glob(".*")] == [".lock"]


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


def run_of(images, *flags):
    """A Run of these images without networks."""
    args = train_dcgan.get_args(["--dataset=glyphs", *flags])
    latent = {"dim": 1, "distribution": "normal"}
    rest = torch.device("cpu"), {}, latent
    return common.Run(args, "train_x.py", images, *rest, G_ema=nn.Identity())


@pytest.mark.parametrize("tensor", [False, True])  # on the device, or from the memory map
def test_each_image_once_an_epoch_in_another_order_each_time(tensor):
    images = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1)
    orders = []
    for seed in (0, 0, 1):
        run = run_of(images, f"--seed={seed}", "--batch_size=2", "--epochs=2")
        order = []
        for _ in range(run.steps):
            batch = run.next_batch(torch.from_numpy(images) if tensor else images)
            numbers = [round(number) for number in ((batch + 1) * 127.5).ravel().tolist()]
            assert run.indices.tolist() == numbers  # whose labels are labels[run.indices]
            order += numbers
            run.step += 1
        orders.append(order)
    assert all(sorted(order[:10]) == sorted(order[10:]) == list(range(10)) for order in orders)
    assert orders[0] == orders[1] != orders[2] and orders[0][:10] != orders[0][10:]


def test_flip_mirrors_about_half_of_the_images():
    images = np.zeros((400, 2, 2, 1), np.uint8)
    images[:, :, 0] = 255
    left_is_white = run_of(images, "--flip", "--batch_size=400").next_batch(images)[:, 0, 0, 0] == 1
    assert 150 < left_is_white.sum() < 250


def test_what_is_random_in_a_step_follows_from_seed_and_step():
    images = np.zeros((8, 2, 2, 1), np.uint8)
    drawn = {}
    for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0)):
        run = run_of(images, f"--seed={seed}", "--batch_size=4")
        run.step = step
        run.next_batch(images)
        draw = torch.randn(3)
        assert torch.equal(drawn.setdefault((seed, step), draw), draw)
    assert len({tuple(draw.tolist()) for draw in drawn.values()}) == 3


def test_losses_that_are_not_finite_stop_the_run_and_leave_the_checkpoint(imgs):
    with pytest.raises(
        common.UserError, match="a loss or weight is not finite at step .*lower rates"
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
    assert "parameters" in common.summary(G)


def run_main(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["train_dcgan.py", *argv])
    train_dcgan.main()


BAD = {
    "--path=nowhere": "nowhere does not exist",
    "--path=empty": "no images in empty (looked for whatever Pillow reads, .jpg",
    "--path=imgs --image_size=48": "--image_size 48 is not 16, 32, 64, 128 or 256",
    "--path=imgs --out=run": "run holds a run: --resume run goes on, or pass another --out",
    "--resume=empty": "no such file: empty/checkpoint.pt",
    "--resume": "there is no run of train_dcgan.py in runs/",
    "--resume=run --width=8": "--width is 4 in run and cannot change on --resume",
    "--resume=run --out=other": "omit --out and --config",
    "--config=unknown.ini": "--config unknown.ini: unknown setting 'epoch' (known: ",
    "--config=wrong.ini": "--config wrong.ini: argument --epochs: 'many' is no int from 1",
    "--config=broken.ini": "--config broken.ini: Source contains parsing errors",
    "--config=switch.ini": "--config switch.ini: argument --flip/--no-flip: write true or false",
    "--path=imgs --out=imgs": "--out imgs lies in --path: its pictures would be trained on",
    "--path=imgs --out=imgs/run": "--out imgs/run lies in --path",
    "--path=imgs --label=7": "--label 7: the classes of these images are none",
    "--path=kinds --label a c": "--label c: the classes of these images are 0 a, 1 b",
    "--path=kinds --label=2": "--label 2: the classes of these images are 0 a, 1 b",
    "--config=missing.ini": "--config missing.ini: [Errno 2] No such file",
    "--device=cuda:77": "--device cuda:77: ",
    "--device=meta": "; try cpu, or fewer processes",
    "--width=70000": "'70000' is no int from 1 to 65536",
    "--path=imgs --out=single/a.png": "File exists: 'single/a.png'",
    "--device=toaster": "--device toaster: Expected one of cpu, cuda",
    "--epochs=0": "argument --epochs: '0' is no int from 1 to 1000000000",
    "--one_sided=2": "argument --one_sided: '2' is no float from 0 to 1",
    "--lrd=nan": "argument --lrd: 'nan' is no float",
    "--r1=1 --compile": "--compile has no second derivatives for --r1: omit it, or --r1 0",
    "--augment=blur": "argument --augment: invalid choice: 'blur' (choose from 'need', 'none')",
    "--epoch=3": "unrecognized arguments: --epoch=3",
    "--path=imgs --dataset=glyphs": "omit one of them",
    "--path=single": "1 images are too few: a step needs 2",
}


def test_bad_input_is_one_line_and_exit_code_2(imgs, monkeypatch, capsys):
    train_dcgan.train(**SMALL | {"epochs": 1}, out="run")
    Path("empty").mkdir()
    Path("single").mkdir()
    Image.new("RGB", (16, 16)).save("single/a.png")
    for kind in ("a", "b"):
        Path("kinds", kind).mkdir(parents=True)
        shutil.copy("single/a.png", f"kinds/{kind}/1.png")
    Path("unknown.ini").write_text("[x]\nepoch = 3\n")
    Path("wrong.ini").write_text("[x]\nepochs = many\n")
    Path("broken.ini").write_text("[x]\nepochs\n")
    Path("switch.ini").write_text("[x]\nflip = perhaps\n")
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
    capsys.readouterr()
    for change in (
        {"script": "train_other"},
        {"step": None},
        {"D": {}},
        {"opt_d": {}},
        {"augment": {}},
        {"origin": [0]},
        {"pace": None},
        {"opt_g": with_moments(content["opt_g"], lambda m: torch.zeros(3, *m.shape)[0, None])},
        {"opt_g": with_moments(content["opt_g"], lambda m: torch.zeros(7))},
    ):
        torch.save(content | change, run / "checkpoint.pt")
        with pytest.raises(SystemExit) as exit:
            run_main(monkeypatch, "--resume=run", "--epochs=2")
        error = capsys.readouterr().err
        assert exit.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        assert len(read(run)) == 3  # nothing was trained
    for damaged in (b"", whole[:1000], b"x" * 1000):
        (run / "checkpoint.pt").write_bytes(damaged)
        with pytest.raises(common.UserError, match="damaged"):
            train_dcgan.train(resume=run)


def with_moments(state, change):
    """An optimiser's state with changed moments; the numbers of steps stay."""
    changed = {
        p: {name: change(v) if v.dim() else v for name, v in held.items()}
        for p, held in state["state"].items()
    }
    return state | {"state": changed}


def test_moments_of_one_number_shown_many_times_do_no_harm(imgs):
    """Used as they are, the next fused step is a segmentation fault: so in its own process."""
    run = train_dcgan.train(**SMALL | {"epochs": 1}, out="run")
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    once = with_moments(content["opt_d"], lambda moment: torch.zeros(1).expand(moment.shape))
    torch.save(content | {"opt_d": once}, run / "checkpoint.pt")
    command(sys.executable, str(ROOT / "train_dcgan.py"), "--resume=run", "--epochs=2")
    assert [int(row["step"]) for row in read(run)] == [1, 2, 3, 4, 5, 6]


def test_moments_in_another_layout_resume_to_the_same_bits(imgs):
    whole = train_dcgan.train(**SMALL | {"epochs": 2}, out="whole")
    run = train_dcgan.train(**SMALL | {"epochs": 1}, out="run")
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    turned = lambda m: m.transpose(0, -1).contiguous().transpose(0, -1)
    content |= {name: with_moments(content[name], turned) for name in ("opt_d", "opt_g")}
    torch.save(content, run / "checkpoint.pt")
    train_dcgan.train(resume=run, epochs=2)
    assert_same_run(whole, run)


def test_a_run_goes_on_in_the_same_process_after_an_error_in_a_copy(imgs, monkeypatch):
    """As in a notebook, which keeps the traceback."""
    step, calls = train_dcgan.train_step, []

    def faulty(*arguments):
        calls.append(None)
        return step(*arguments) if len(calls) < 3 else 1 / 0

    monkeypatch.setattr(train_dcgan, "train_step", faulty)
    with pytest.raises(ZeroDivisionError) as kept:
        train_dcgan.train(**SMALL)
    monkeypatch.setattr(train_dcgan, "train_step", step)
    assert train_dcgan.train(resume="runs/dcgan-imgs") == Path("runs/dcgan-imgs") and kept
    assert len(read("runs/dcgan-imgs")) == 18


def test_a_finished_run_says_so_and_changes_nothing(imgs, monkeypatch, capsys):
    run = train_dcgan.train(**SMALL | {"epochs": 2}, out="run")
    before = {path: path.read_bytes() for path in run.rglob("*.*")}
    for flags in (["--resume=run"], ["--resume=run", "--epochs=1"], ["--resume=run/checkpoint.pt"]):
        capsys.readouterr()
        run_main(monkeypatch, *flags)
        out = capsys.readouterr().out
        assert "run has reached epoch 2 of " in out and "nothing to do" in out
        assert "python train_dcgan.py --resume run --epochs " in out
        assert {path: path.read_bytes() for path in run.rglob("*.*")} == before


def test_resume_alone_says_which_run_it_took(imgs, capsys):
    run = train_dcgan.train(**SMALL | {"epochs": 1})
    train_dcgan.train(resume=True, epochs=2)
    assert f"{run} is the newest run of train_dcgan.py in runs/" in capsys.readouterr().out


def test_hints_can_be_typed_whatever_the_path(imgs, capsys):
    run = train_dcgan.train(**SMALL | {"epochs": 1}, out="my run's")
    train_dcgan.train(resume=run)
    hint = capsys.readouterr().out.split("To go on: ")[1].split("\n")[0]
    assert shlex.split(hint)[:4] == ["python", "train_dcgan.py", "--resume", "my run's"]


def test_what_was_not_typed_is_settled_anew_for_other_data(imgs):
    """config.ini keeps what was typed; the checkpoint, what was settled."""
    run = train_dcgan.train(**SMALL | {"epochs": 1}, out="run")
    kept = common.load_file(run / "checkpoint.pt")
    assert (kept["config"]["r1"], kept["typed"]["r1"]) == (0.0, None)
    lines = (run / "config.ini").read_text().splitlines()
    assert {"r1 = null", "init = null", 'precision = "auto"', "sample_every = null"} <= {*lines}
    args = train_dcgan.get_args([f"--config={run}/config.ini", "--dataset=mnist"])
    assert (args.dataset, args.path, args.r1, args.init) == ("mnist", None, 1.0, "xavier")
    assert (args.width, args.image_size) == (4, 16)  # which were typed


def test_statistics_of_a_copy_that_changed_get_a_file_of_their_own(imgs, monkeypatch):
    """Five own statistics and more are drawn; rows of 11 cells never stand below 10 headings."""
    run = train_dcgan.train(**SMALL | {"epochs": 1}, out="run")
    step = train_dcgan.train_step

    def more(*arguments):
        return step(*arguments) | {f"own_{i}": i * arguments[5].mean() for i in range(6)}

    monkeypatch.setattr(train_dcgan, "train_step", more)
    train_dcgan.train(resume=run, epochs=2)
    old = (run / "metrics_to_3.csv").read_text().splitlines()
    new = (run / "metrics.csv").read_text().splitlines()
    assert len(old) == len(new) == 4
    assert old[0] == ",".join([*common.COLUMNS, *STATS])
    assert new[0] == ",".join([*common.COLUMNS, *STATS, *(f"own_{i}" for i in range(6))])
    assert {line.count(",") for line in old} == {10} and {line.count(",") for line in new} == {16}
    assert Image.open(run / "losses.png").size[1] > 600


def test_a_critic_with_a_negative_loss_has_not_won(imgs, monkeypatch, capsys):
    monkeypatch.setattr(common, "PATIENCE", 5)
    step = train_dcgan.train_step
    negative = lambda *arguments: step(*arguments) | {"loss_d": arguments[5].new_full((), -3.0)}
    monkeypatch.setattr(train_dcgan, "train_step", negative)
    train_dcgan.train(**SMALL)
    assert "D has won" not in capsys.readouterr().out


def test_what_could_not_be_loaded_again_is_refused_at_once(imgs, monkeypatch):
    write = common.Run.write

    def with_numpy(run, **what):
        run.generator_args["width"] = np.int64(4)
        write(run, **what)

    monkeypatch.setattr(common.Run, "write", with_numpy)
    with pytest.raises(common.UserError, match=r"cannot save .*generator_args.*numpy") as error:
        train_dcgan.train(**SMALL)
    assert "\n" not in str(error.value)
    assert not [*Path("runs").rglob("metrics.csv"), *Path("runs").rglob("*.pt")]


def test_a_failing_run_is_told_once_and_where_help_is(imgs, monkeypatch, capsys):
    monkeypatch.setattr(common, "PATIENCE", 20)
    train_dcgan.train(**SMALL | {"epochs": 40, "lrg": 0.0, "lrd": 0.002})
    out = capsys.readouterr().out
    assert out.count("WARNING: D has won: ") == 1
    assert 'See README, "When it does not work"' in out.split("WARNING: D has won: ")[1]
