"""What stands in the rows and pictures of a run, and which files of a folder are its images.

Seconds are those of a clock that the tests move.
"""

import csv
import shutil
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CURVE_COLOURS, curve_rows, write_images
from PIL import Image, ImageDraw

import common
import train_balanced
import train_dcgan
import train_fcgan

SMALL = {"path": "imgs", "image_size": 16, "width": 4, "z_dim": 8, "batch_size": 8, "epochs": 6}
SMALL |= {"device": "cpu"}  # a CUDA graph would call a step of the tests only once
STEP_SECONDS = 0.5  # of a training step, by the clock of the tests


def read(run):
    """The rows of metrics.csv as dicts of floats."""
    with Path(run, "metrics.csv").open() as file:
        return [{name: float(x) for name, x in row.items()} for row in csv.DictReader(file)]


# ------------------------------------------------------------------------------------------ rows


def counting_step(*_, calls=None):
    """A step whose statistics are its number, counted from 1, and ten times that."""
    calls.append(None)
    number = torch.tensor(float(len(calls)))
    return {"loss_d": number, "loss_g": 10 * number}


@pytest.fixture
def many():
    """A folder of 120 images: 60 steps of two images each."""
    write_images(Path("many"), 120)
    return SMALL | {"path": "many", "batch_size": 2, "epochs": 2}


def steps_of_rows(rows):
    """For each row the numbers of the steps since the row before."""
    ends = [0, *(int(row["step"]) for row in rows)]
    return [np.arange(first + 1, last + 1) for first, last in zip(ends, ends[1:])]


def test_a_row_holds_the_mean_over_its_steps(many, monkeypatch):
    calls = []
    monkeypatch.setattr(train_dcgan, "train_step", lambda *_: counting_step(calls=calls))
    rows = read(train_dcgan.train(**many))
    groups = steps_of_rows(rows)
    assert rows[-1]["step"] == len(calls) == 120 and max(map(len, groups)) >= 3
    assert [row["loss_d"] for row in rows] == pytest.approx([g.mean() for g in groups])
    assert [row["loss_g"] for row in rows] == pytest.approx([10 * g.mean() for g in groups])
    assert [row["kimg"] for row in rows] == pytest.approx([2 * g[-1] / 1000 for g in groups])
    assert [row["epoch"] for row in rows] == [1 if g[-1] <= 60 else 2 for g in groups]


def test_means_are_by_name_whatever_the_order_of_the_statistics(many, monkeypatch):
    """A copy may return its dict in another order at some steps."""
    calls = []

    def step(*_):
        stats = counting_step(calls=calls)
        return dict(reversed(stats.items())) if len(calls) % 2 else stats

    monkeypatch.setattr(train_dcgan, "train_step", step)
    rows = read(train_dcgan.train(**many))
    means = [group.mean() for group in steps_of_rows(rows)]
    assert [row["loss_d"] for row in rows] == pytest.approx(means)
    assert [row["loss_g"] for row in rows] == pytest.approx([10 * mean for mean in means])


class Clock:
    """In the place of the module time in common.py; moves only when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        fake = types.SimpleNamespace(**vars(time) | {"perf_counter": lambda: self.now})
        monkeypatch.setattr(common, "time", fake)

    def costs(self, monkeypatch, owner, name, seconds):
        """A call of this function takes so many seconds."""
        function = getattr(owner, name)

        def slow(*args, **kwargs):
            self.now += seconds
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, slow)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock(monkeypatch)
    calls = []
    monkeypatch.setattr(train_dcgan, "train_step", lambda *_: counting_step(calls=calls))
    clock.costs(monkeypatch, train_dcgan, "train_step", STEP_SECONDS)
    return clock


def test_seconds_and_speed_are_those_of_the_clock(many, clock):
    rows = read(train_dcgan.train(**many))
    assert [row["images_per_s"] for row in rows] == pytest.approx([2 / STEP_SECONDS] * len(rows))
    steps = [row["step"] for row in rows]
    assert [row["seconds"] for row in rows] == pytest.approx([STEP_SECONDS * s for s in steps])


def test_the_speed_of_each_row_is_its_own(many, clock, monkeypatch):
    """From the second epoch on a step takes three times as long."""
    step = train_dcgan.train_step

    def slower(*args):
        clock.now += 2 * STEP_SECONDS * (args[-1].epochs == 2)
        return step(*args)

    monkeypatch.setattr(train_dcgan, "train_step", slower)
    run = train_dcgan.train(**many | {"epochs": 1})
    rows = read(train_dcgan.train(resume=run, epochs=2))
    expected = [2 / STEP_SECONDS if row["epoch"] == 1 else 2 / STEP_SECONDS / 3 for row in rows]
    assert [row["images_per_s"] for row in rows] == pytest.approx(expected)
    assert {row["epoch"] for row in rows} == {1, 2}


def test_seconds_go_on_after_a_resume_and_leave_out_the_time_between(many, clock):
    run = train_dcgan.train(**many | {"epochs": 1})
    clock.now += 100_000
    rows = read(train_dcgan.train(resume=run, epochs=2))
    assert rows[-1]["step"] == 120
    expected = [STEP_SECONDS * row["step"] for row in rows]
    assert [row["seconds"] for row in rows] == pytest.approx(expected)


def test_what_is_written_between_steps_slows_no_row(many, clock, monkeypatch):
    """The speed is that of steps alone, in the first row of a start too."""
    clock.costs(monkeypatch, common, "atomic_write", 7)
    clock.costs(monkeypatch, common, "save_grid", 7)
    run = train_dcgan.train(**many | {"epochs": 1})
    rows = read(train_dcgan.train(resume=run, epochs=2))
    assert [row["images_per_s"] for row in rows] == pytest.approx([2 / STEP_SECONDS] * len(rows))


@pytest.mark.parametrize("script", [train_dcgan, train_fcgan, train_balanced])
@pytest.mark.parametrize("net", ["G", "D"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_stops_the_run(script, net, value, imgs, monkeypatch):
    """The losses may stay finite, as where ReLU hides it; the checkpoint stays as it was."""
    step, sizes = script.train_step, {"hidden_g": "6", "hidden_d": "6"}
    sizes = sizes if script is train_fcgan else {"width": 4}

    def spoiled(G, D, *others):
        stats = step(G, D, *others)
        parameter = [*{"G": G, "D": D}[net].parameters()][-1]
        with torch.no_grad():
            parameter.view(-1)[-1] = value
        return {name: torch.zeros(()) for name in stats}

    monkeypatch.setattr(script, "train_step", spoiled)
    settings = {
        name: SMALL[name] for name in ("path", "image_size", "z_dim", "batch_size", "device")
    }
    with pytest.raises(common.UserError, match="not finite") as error:
        script.train(**settings | sizes, epochs=2, out="run")
    assert "\n" not in str(error.value)
    checkpoint = common.load_checkpoint("run")
    assert checkpoint["step"] == 0
    assert all(value.isfinite().all() for value in checkpoint[net].values())


# -------------------------------------------------------------------------------------- pictures

BLUE, RED, *_ = CURVE_COLOURS


def test_curves_are_the_right_way_up_and_not_mirrored():
    """Low for nine tenths, then up: also told from a turn by half a circle."""
    x = np.arange(11)
    rising = [0.0] * 10 + [1.0]
    common.save_curves([("title", x, {"y": rising})], "curves.png", "x")
    line = curve_rows("curves.png", BLUE)
    (columns,) = np.nonzero(np.isfinite(line))
    first, last = columns[0], columns[-1]
    assert last - first > 500  # as wide as the panel, about
    corner = first + 0.9 * (last - first)
    assert np.nanmin(line[first : int(corner) - 3]) > 200  # low
    end = line[int(corner) + 3 : last - 1]
    assert end[0] > end[-1] + 100 and (np.diff(end) < 0).all()  # up to the right


def test_each_curve_has_its_values_its_colour_and_its_place():
    x = [0, 1, 2, 3, 4]
    panels = [("above", x, {"a": [0, 1, 2, 3, 4], "b": [4, 3, 2, 1, 0]})]
    panels += [("below", x, {"c": [1, 0, 0, 0, 0]})]
    common.save_curves(panels, "curves.png", "x")
    blue, red = (curve_rows("curves.png", colour) for colour in (BLUE, RED))
    columns = np.nonzero(np.isfinite(blue) & np.isfinite(red))[0]
    left, right = columns[len(columns) // 8], columns[-len(columns) // 8]
    assert blue[left] > red[left] + 50 and red[right] > blue[right] + 50
    below = curve_rows("curves.png", BLUE, panel=1)
    (columns,) = np.nonzero(np.isfinite(below))
    assert below[columns[0] + 5] < below[columns[-1] - 5] - 50  # falls
    assert np.isnan(curve_rows("curves.png", RED, panel=1)).all()


@pytest.fixture
def texts(monkeypatch):
    """What is written into pictures: [(x, y, text), ...]."""
    noted, text = [], ImageDraw.ImageDraw.text

    def noting(draw, xy, string, *args, **kwargs):
        noted.append((*xy, string))
        return text(draw, xy, string, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noting)
    return noted


def test_the_scale_of_a_constant_has_different_ticks(texts):
    common.save_curves([("p", [10, 20], {"p": [0, 0]})], "curves.png", "kimg")
    ticks = [string for x, _, string in texts if x < 70]
    assert ticks == ["0", "0.25", "0.5", "0.75", "1"]


def test_the_scales_of_curves_grow_upwards_and_to_the_right(texts):
    common.save_curves([("title", [10, 20], {"curve": [100, 500]})], "curves.png", "kimg")
    on_y = sorted((y, float(s)) for x, y, s in texts if s in ("100", "200", "300", "400", "500"))
    assert [value for _, value in on_y] == [500, 400, 300, 200, 100]  # from the top
    on_x = sorted((x, float(s)) for x, y, s in texts if s in ("10", "12.5", "15", "17.5", "20"))
    assert [value for _, value in on_x] == [10, 12.5, 15, 17.5, 20]
    assert {"title", "curve", "kimg"} < {string for *_, string in texts}


def test_the_curves_of_a_run_are_the_columns_of_its_rows(many, drawn_panels, monkeypatch):
    calls = []
    monkeypatch.setattr(train_dcgan, "train_step", lambda *_: counting_step(calls=calls))
    run = train_dcgan.train(**many)
    rows = read(run)
    ((title, x, curves),) = drawn_panels
    assert title == "loss" and x == pytest.approx([row["kimg"] for row in rows])
    assert [*curves] == ["loss_d", "loss_g"]
    for name, values in curves.items():
        assert values == pytest.approx([row[name] for row in rows])
    line = curve_rows(run / "losses.png", RED)  # loss_g rises from step to step
    line = line[np.isfinite(line)]
    assert line[0] - line[-1] > 150 and (np.diff(line) <= 0.5).all()


def colours_of(gif):
    """The pixel in the middle of each frame of an animation."""
    with Image.open(gif) as animation:
        frames = []
        for number in range(animation.n_frames):
            animation.seek(number)
            middle = animation.width // 2, animation.height // 2
            frames.append(animation.convert("RGB").getpixel(middle))
        return frames


def test_an_animation_loops_for_ever_and_has_its_frames_in_order():
    colours = [(250 - 25 * i, 10, 25 * i) for i in range(10)]
    common.save_gif([Image.new("RGB", (32, 24), colour) for colour in colours], "colours.gif")
    found = np.array(colours_of("colours.gif"))
    assert found.shape == (10, 3) and np.abs(found - colours).max() <= 4
    with Image.open("colours.gif") as animation:
        assert animation.info["loop"] == 0  # for ever
        durations = []
        for number in range(animation.n_frames):
            animation.seek(number)
            durations.append(animation.info["duration"])
    assert len({*durations[:-1]}) == 1 and 0 < durations[0] < durations[-1]  # rests on the last


def test_the_animation_of_a_run_shows_its_grids_in_order(imgs, monkeypatch):
    """The generator's images are replaced by planes of the grey level 40 times the epoch."""
    save_samples, generate_images = common.Run.save_samples, common.generate_images
    epochs = []

    def noted(run, grid):
        epochs.append(run.epoch)
        save_samples(run, grid)

    def grey(G, z):
        return np.full_like(generate_images(G, z), 40 * epochs[-1])

    monkeypatch.setattr(common.Run, "save_samples", noted)
    monkeypatch.setattr(common, "generate_images", grey)
    run = train_dcgan.train(**SMALL | {"epochs": 5}, sample_every=1)
    with Image.open(run / "training.gif") as animation:
        assert animation.info["loop"] == 0 and animation.n_frames == 6
    with Image.open(run / "samples/epoch_0003.png") as grid:
        assert grid.convert("RGB").getpixel((10, 10)) == (120, 120, 120)
    centres = []
    with Image.open(run / "training.gif") as animation:
        for number in range(6):
            animation.seek(number)
            centres.append(animation.convert("L").getpixel((10, 10)))
    assert np.abs(np.array(centres) - [0, 40, 80, 120, 160, 200]).max() <= 4


def test_a_grid_has_its_images_row_by_row_with_a_margin():
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    common.save_grid(images, "grid.png", 3)
    pixels = np.asarray(Image.open("grid.png"))[..., 0]
    assert pixels.shape == (2 * 6 + 2, 3 * 6 + 2)
    assert pixels[4::6, 4::6].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (pixels[:2] == 255).all() and (pixels[:, :2] == 255).all()


# -------------------------------------------------------------------------------- what is left out


def zipped(folder):
    return Path(shutil.make_archive(folder, "zip", folder))


@pytest.mark.parametrize("litter", ["@eaDir", "@eaDir/SYNOFILE_THUMB", "__MACOSX", ".hidden"])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_what_systems_leave_in_folders_is_no_image(litter, kind, imgs):
    expected = common.load_images(imgs, 16)[1]
    for place in (imgs / litter, imgs / "more" / litter):
        place.mkdir(parents=True)
        shutil.copy(imgs / "001.png", place / "thumb.png")
    path = imgs if kind == "folder" else zipped("imgs")
    images, names = common.load_images(path, 16)
    assert len(images) == 24 and names == expected


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_files_that_are_left_out_are_named(kind, imgs, capsys):
    Path(imgs, "notes.txt").write_text("not an image")
    Path(imgs, "more/film.mp4").write_bytes(b"neither")
    images, _ = common.load_images(imgs if kind == "folder" else zipped("imgs"), 16)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert "notes.txt" in line and "film.mp4" in line and ".png" not in line and len(images) == 24


def test_a_folder_without_anything_else_says_nothing_of_it(imgs, capsys):
    common.load_images(imgs, 16)
    assert "left out" not in capsys.readouterr().out


def test_a_run_that_is_left_out_of_a_folder_is_named(imgs, capsys):
    train_dcgan.train(**SMALL | {"epochs": 1}, out="imgs/experiment")
    capsys.readouterr()
    images, _ = common.load_images(imgs, 16)
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(images) == 24 and any("experiment" in line for line in lines)
