"""A run that can be left alone: one process a folder, the same images, pictures in time, and words
instead of tracebacks or silence."""

import errno
import io
import math
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, write_images
from PIL import Image
from test_run import SMALL, STATS, assert_equal, read, run_main

import common
import fid
import generate
import train_balanced
import train_dcgan
import train_fcgan


def call(monkeypatch, module, *argv, code=None):
    """Run a script's main as if `argv` had been typed; the exit code must be `code`."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
    try:
        module.main()
        assert code is None
    except SystemExit as exit:
        assert exit.code == code


def at_step(monkeypatch, number, act):
    """Let act() happen in training before the step with this number, counted from 1."""
    step, calls = train_dcgan.train_step, []

    def counted(*arguments):
        calls.append(None)
        if len(calls) == number:
            act()
        return step(*arguments)

    monkeypatch.setattr(train_dcgan, "train_step", counted)


def step_of(run):
    return common.load_file(run / "checkpoint.pt")["step"]


# -------------------------------------------------------- what only shows or records ends no run


class Stream(io.StringIO):
    """A standard output that fails from some moment on."""

    error = None

    def write(self, text):
        if self.error:
            raise self.error
        return super().write(text)


LOST = {
    "samples moved away": lambda run, out: shutil.move(run / "samples", "moved"),
    "samples held": lambda run, out: (
        shutil.move(run / "samples", "moved"),
        (run / "samples").touch(),
    ),
    "metrics.csv held": lambda run, out: (
        os.rename(run / "metrics.csv", "held.csv"),
        (run / "metrics.csv").mkdir(),  # for whom may write everywhere, too
    ),
    "terminal gone": lambda run, out: setattr(out, "error", OSError(errno.EIO, "gone")),
    "dead pipe": lambda run, out: setattr(out, "error", BrokenPipeError(errno.EPIPE, "dead")),
    "closed": lambda run, out: out.close(),
}


@pytest.mark.parametrize("what", LOST)
def test_what_only_shows_or_records_ends_no_run(what, imgs, monkeypatch):
    out = Stream()
    monkeypatch.setattr(sys, "stdout", out)
    at_step(monkeypatch, 4, lambda: LOST[what](Path("run"), out))
    monkeypatch.setattr(common, "MINUTE", -1)
    run = train_dcgan.train(**SMALL, out="run")
    assert step_of(run) == 18 and (run / "generator_0006.pt").exists()
    if what.endswith("held"):
        name = what.split()[0]
        assert out.getvalue().count(f"WARNING: training goes on without {name}: ") == 1
    else:
        assert (run / "samples/epoch_0006.png").exists()
    if what != "metrics.csv held":
        assert len(read(run)) == 18


def test_a_checkpoint_that_cannot_be_written_stops_the_run(imgs, monkeypatch):
    at_step(monkeypatch, 4, lambda: shutil.move("run", "moved"))
    monkeypatch.setattr(common, "MINUTE", -1)
    with pytest.raises(common.UserError, match="cannot write run/checkpoint.pt"):
        train_dcgan.train(**SMALL, out="run")
    assert step_of(Path("moved")) == 3


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_one_signal_stops_and_the_second_does_what_it_ever_did(name, imgs, monkeypatch):
    number, noted = getattr(signal, name), []
    own = lambda *_: noted.append(number)
    before = signal.signal(number, own)
    at_step(monkeypatch, 2, lambda: [signal.raise_signal(number) for _ in range(2)])
    try:
        with pytest.raises(KeyboardInterrupt):
            train_dcgan.train(**SMALL)
        assert signal.getsignal(number) is own
    finally:
        signal.signal(number, before)
    assert noted == [number] and step_of(Path("runs/dcgan-imgs")) == 2


def test_what_nohup_ignores_stays_ignored(imgs, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGHUP))
    try:
        assert step_of(train_dcgan.train(**SMALL | {"epochs": 1})) == 3
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_after_a_run_all_signals_do_what_they_ever_did(imgs):
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
    before = [signal.getsignal(number) for number in numbers]
    train_dcgan.train(**SMALL | {"epochs": 1})
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_grid_that_was_cut_short_is_left_out_of_the_gif(imgs, capsys):
    run = train_dcgan.train(**SMALL | {"epochs": 2})
    grid = run / "samples/epoch_0001.png"
    grid.write_bytes(grid.read_bytes()[:300])
    (run / "losses.png").unlink()
    train_dcgan.train(resume=run, epochs=3)
    assert Image.open(run / "training.gif").n_frames == 3
    assert Image.open(run / "losses.png").width == 900
    assert f"WARNING: training goes on without {grid}: " in capsys.readouterr().out


# --------------------------------------------------- no image goes missing or comes in in silence


def test_links_are_followed_and_what_cannot_be_listed_is_said(imgs, monkeypatch, capsys):
    write_images(Path("far"), 6)
    (imgs / "linked").symlink_to(Path("far").resolve(), True)
    (imgs / "more/loop").symlink_to(imgs.resolve(), True)
    (imgs / "closed").mkdir()
    scandir = os.scandir

    def guarded(folder):
        if str(folder).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", guarded)
    assert len(common.load_images("imgs", 16)) == 30
    out = capsys.readouterr().out
    assert "WARNING: left out, as it cannot be listed: " in out and "'imgs/closed'" in out


def test_what_failed_is_tried_again_at_the_next_start(imgs, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        opened = Image.open

        def unreadable(file):
            if file.name.endswith("001.png"):
                raise PermissionError("not now")
            return opened(file)

        patch.setattr(Image, "open", unreadable)
        for _ in range(2):
            assert len(common.load_images("imgs", 16)) == 23
            assert "1 of 24 files cannot be decoded" in capsys.readouterr().out
    images = common.load_images("imgs", 16)
    assert len(images) == len(images.names) == 24
    assert "cannot be decoded" not in capsys.readouterr().out


def test_whatever_pillow_reads_is_read_from_folders_and_zips():
    Path("mixed").mkdir()
    names = ["a.pgm", "b.PPM", "c.tga", "d.pcx", "e.jp2", "f.ico", "g.dib", "h.apng", "i.jfif"]
    for i, name in enumerate(names):
        image = Image.new("L" if name == "a.pgm" else "RGB", (16, 16), 20 * i)
        image.save(f"mixed/{name}", "JPEG" if name == "i.jfif" else None)
    Path("mixed/readme.txt").write_text("no image")
    Path("mixed/film.mpg").write_text("which Pillow knows by name only")
    images = common.load_images("mixed", 16)
    assert images.names == names
    with zipfile.ZipFile("mixed.zip", "w") as archive:
        for name in names:
            archive.write(f"mixed/{name}", f"./ö .x/../{name}" if name == "c.tga" else f"./{name}")
    assert len(common.load_images("mixed.zip", 16)) == len(names)


def test_what_these_scripts_wrote_is_no_data(imgs, monkeypatch):
    """Also where the images' folder is the current one; what only looks like it is data."""
    monkeypatch.chdir(imgs)
    train_dcgan.train(**SMALL | {"path": ".", "epochs": 1})
    call(monkeypatch, generate, "--interpolate", "--nearest=.", "--img_num=4")
    call(monkeypatch, generate, "--save_path=drawn", "--img_num=4")
    assert len([*Path("generated").glob("*.png")]) == 3 and Path("drawn-grid-2x2.png").exists()
    for folder in (".", "more"):
        Path(folder, "checkpoint.pt").touch()  # of anything
    assert len(common.load_images(".", 16)) == 24


def test_a_folder_of_photographs_is_no_place_for_samples(imgs, monkeypatch, capsys):
    train_dcgan.train(**SMALL | {"epochs": 1})
    before = sorted(Path().rglob("*"))
    for folder in ("imgs", "imgs/more"):
        call(monkeypatch, generate, f"--save_path={folder}", code=2)
        error = capsys.readouterr().err
        assert error == f"error: {folder} holds other files: pass another --save_path\n"
    assert sorted(Path().rglob("*")) == before


NOTES = '{{"fingerprint": "x", "duplicates": 0, "auto": 3, "channels": 3, "failed": {}}}'


@pytest.mark.parametrize(
    "content",
    [
        np.zeros((12, 16, 16, 3), np.uint8),
        np.zeros((24, 8, 8, 3), np.uint8),
        np.zeros((24, 16, 16, 2), np.uint8),
        np.zeros((24, 16, 16, 3), np.float32),
        np.zeros((24, 16, 16), np.uint8),
        *("", "3", "[]", "{}", NOTES.format(3), NOTES.format('["000.png"]'), "\xff"),
    ],
    ids=lambda content: str(getattr(content, "shape", content)),
)
def test_a_cache_that_does_not_fit_is_made_anew(content, imgs):
    first = np.array(common.load_images("imgs", 16))
    (cached,), (notes,) = (list(Path(".cache").glob(f"*.{end}")) for end in ("npy", "json"))
    if isinstance(content, str):
        notes.write_text(content, encoding="latin-1")
    else:
        np.save(cached, content)
    again = common.load_images("imgs", 16)
    np.testing.assert_array_equal(again, first)
    assert len(again.names) == 24


# --------------------------------------------------------------- words, environments and streams

EMPTY = [
    (train_dcgan, "--path", ""),
    (train_dcgan, "--path="),
    (train_fcgan, "--path=imgs", "--out", ""),
    (train_balanced, "--path=imgs", "--cache="),
    (train_dcgan, "--path=imgs", "--label", "1", ""),
    (generate, "--load_path="),
    (generate, "--img_num=4", "--nearest", ""),
    (fid, "imgs", ""),
]


@pytest.mark.parametrize("words", EMPTY, ids=lambda words: " ".join(words[1:]))
def test_an_empty_word_is_one_line(words, imgs, monkeypatch, capsys):
    """As of "$UNSET"."""
    stop = [] if words[0] in (generate, fid) else ["--summary"]  # where it is taken, after all
    call(monkeypatch, words[0], *stop, *words[1:], code=2)
    error = capsys.readouterr().err
    flag = [word for word in words[1:] if word][-1].rstrip("=")
    assert "the value is empty" in error and error.count("\n") == 1
    assert flag in error
    assert {*os.listdir()} <= {"imgs"}


def test_a_path_may_begin_with_the_home_folder(imgs, monkeypatch):
    home = Path("home").resolve()
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    shutil.move("imgs", home / "imgs")
    flags = SMALL | {"path": "~/imgs", "epochs": 1}
    assert train_dcgan.train(**flags, out="~/run", cache="~/cache") == home / "run"
    train_dcgan.train("--resume=~/run", "--epochs=2")
    words = ["--save_path=~/drawn", "--nearest=~/imgs", "--cache=~/cache", "--img_num=4"]
    call(monkeypatch, generate, "--load_path=~/run", *words)
    args = train_dcgan.get_args(["--config=~/run/config.ini", "--data_dir=~/data"])
    assert (args.path, args.data_dir) == (f"{home}/imgs", f"{home}/data")
    assert {*os.listdir(home)} >= {"run", "imgs", "cache", "drawn", "drawn-nearest.png"}
    assert os.listdir() == ["home"] and step_of(home / "run") == 6


@pytest.mark.parametrize(
    "rank, size, expected",
    [
        (None, None, (0, 1)),
        ("0", None, (0, 1)),
        (None, "4", (0, 1)),
        ("", "", (0, 1)),
        ("one", "2", (0, 1)),
        ("2", "2", (0, 1)),
        ("0", "1", (0, 1)),
        ("1", "2", (1, 2)),
    ],
)
def test_what_a_scheduler_sets_is_no_torchrun(rank, size, expected, monkeypatch):
    for name, value in (("RANK", rank), ("WORLD_SIZE", size)):
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, False)
    assert common.ranks() == expected


@pytest.mark.parametrize("port", [None, "x"])
def test_processes_without_a_place_to_meet_are_one_line(port, imgs, monkeypatch, capsys):
    monkeypatch.setattr(common, "WORLD_SIZE", 2)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", port) if port else monkeypatch.delenv("MASTER_PORT", False)
    call(monkeypatch, train_dcgan, "--path=imgs", "--device=cpu", code=2)
    error = capsys.readouterr().err
    assert "MASTER_PORT" in error and "use torchrun, or unset" in error
    assert error.count("\n") == 1


class Bare:
    """What some windows put in the place of a standard output."""

    def write(self, text):
        return len(text)

    def flush(self):
        pass


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS = {"none": lambda: None, "closed": closed, "bare": Bare}


@pytest.mark.parametrize("kind", STREAMS)
def test_any_standard_output_will_do(kind, imgs, monkeypatch):
    monkeypatch.setattr(sys, "stdout", STREAMS[kind]())
    call(monkeypatch, train_dcgan, "--path=imgs", "--image_size=16", "--width=4", "--epochs=1")
    assert step_of(Path("runs/dcgan-imgs")) == 1
    call(monkeypatch, generate, "--img_num=4")
    assert len(list(Path("generated/dcgan-imgs").glob("*.png"))) == 4


def test_names_that_a_terminal_cannot_show(imgs, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    train_dcgan.train(**SMALL | {"epochs": 1}, out="кошка")
    assert rb"\u043a\u043e\u0448\u043a\u0430: step 0 to 3" in stream.buffer.getvalue()


@pytest.mark.parametrize("flag", ["lr_decay=1e200", "lrd=1e400", "alpha=1e200", "r1=1e200"])
def test_numbers_without_end_are_one_line(flag, imgs, monkeypatch, capsys):
    flags = "--path=imgs", "--image_size=16", "--width=4", "--epochs=2", f"--{flag}"
    call(monkeypatch, train_dcgan, *flags, code=2)
    assert capsys.readouterr().err.count("\n") == 1


# -------------------------------------------------------------------------- a run knows what it is


def contents(folder, *patterns):
    return {p: p.read_bytes() for pattern in patterns for p in folder.glob(pattern)}


def test_with_more_images_epochs_count_on_and_nothing_is_overwritten(imgs, capsys):
    run = train_dcgan.train(**SMALL)  # 6 epochs of 3 steps
    before = contents(run, "generator_*.pt", "samples/epoch_*.png")
    for path in list(imgs.glob("*.png")):
        Image.open(path).rotate(180).save(imgs / f"turned_{path.name}")  # 40 images: 5 steps
    with pytest.raises(common.UserError, match="learned from 24 images, and these 40 are others"):
        train_dcgan.train(resume=run, epochs=8)
    train_dcgan.train(resume=run, epochs=8, path="imgs")
    out = capsys.readouterr().out
    assert f"{run} has learned from 24 images, and goes on with these 40" in out
    assert f"{run}: step 18 to 28, 5 an epoch" in out
    after = contents(run, "generator_*.pt", "samples/epoch_*.png")
    assert before.items() <= after.items()
    names = ["generator_0007.pt", "generator_0008.pt", "epoch_0007.png", "epoch_0008.png"]
    assert sorted(path.name for path in after.keys() - before.keys()) == sorted(names)
    rows = read(run)
    assert [int(row["step"]) for row in rows] == [*range(1, 29)]
    assert [int(row["epoch"]) for row in rows][15:] == [6] * 3 + [7] * 5 + [8] * 5
    seen = [1000 * float(row["kimg"]) for row in rows]
    assert np.allclose(np.diff(seen), 8) and seen[0] == 8
    again = train_dcgan.train(resume=run, epochs=9)  # these are the run's now
    assert step_of(again) == 33


OTHER_PIXELS = {
    "another picture": lambda path: Image.new("RGB", (20, 16), "red").save(path),
    "another order": lambda path: path.rename(path.with_name("z.png")),
    "one less": lambda path: path.unlink(),
    "one more": lambda path: Image.new("RGB", (20, 16), "red").save(path.with_name("x.png")),
}
SAME_PIXELS = {
    "renamed": lambda path: path.rename(path.with_name("001_a.png")),
    "saved again": lambda path: Image.open(path).save(path, compress_level=0),
    "a stray file": lambda path: path.with_name("notes.txt").write_text("no image"),
    "another date": lambda path: os.utime(path, (1, 1)),
}


@pytest.mark.parametrize("change", OTHER_PIXELS | SAME_PIXELS)
def test_a_run_knows_its_images_by_their_pixels(change, imgs, monkeypatch, capsys):
    run = train_dcgan.train(**SMALL | {"epochs": 1})
    (OTHER_PIXELS | SAME_PIXELS)[change](imgs / "001.png")
    if change in SAME_PIXELS:
        train_dcgan.train(resume=run, epochs=2)
        assert "goes on with these" not in capsys.readouterr().out
    else:
        call(monkeypatch, train_dcgan, f"--resume={run}", "--epochs=2", code=2)
        error = capsys.readouterr().err
        n = {"one less": 23, "one more": 25}.get(change, 24)
        assert f"learned from 24 images, and these {n} are others: " in error
        assert "--path beside --resume" in error and error.count("\n") == 1
        assert step_of(run) == 3
        call(monkeypatch, train_dcgan, f"--resume={run}", "--epochs=2", "--path=imgs")
    assert step_of(run) == (5 if change == "one less" else 6)


def test_a_colour_image_among_grey_ones_changes_no_run():
    write_images(Path("imgs"), 16, "L")
    run = train_dcgan.train(**SMALL | {"epochs": 1})
    Image.new("RGB", (20, 16), "red").save("imgs/red.png")
    train_dcgan.train(resume=run, epochs=2, path="imgs")
    assert step_of(run) == 4 and Image.open(run / "samples/latest.png").mode == "L"


def test_a_snapshot_is_no_checkpoint(imgs, monkeypatch, capsys):
    run = train_dcgan.train(**SMALL | {"epochs": 2}, checkpoint=1)
    call(monkeypatch, train_dcgan, f"--resume={run}/generator_0001.pt", "--epochs=3", code=2)
    error = capsys.readouterr().err
    assert f"generator_0001.pt is a snapshot: --resume {run} goes on from its run\n" in error
    assert step_of(run) == 6
    train_dcgan.train(resume=run / "checkpoint.pt", epochs=3)
    assert step_of(run) == 9


def test_a_run_of_a_relative_path_says_so_elsewhere(imgs, monkeypatch, capsys):
    run = train_dcgan.train(**SMALL | {"epochs": 1}).resolve()
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    call(monkeypatch, train_dcgan, f"--resume={run}", "--epochs=2", code=2)
    error = capsys.readouterr().err
    assert f"{run} is of --path imgs, not there seen from here: type --path" in error
    train_dcgan.train(resume=run, epochs=2, path="../imgs")
    assert step_of(run) == 6


FOREIGN = {
    "a line of words": lambda lines: [*lines[:2], "sum;of;all", *lines[2:]],
    "an empty line": lambda lines: [*lines[:2], "", *lines[2:]],
    "a byte order mark": lambda lines: ["\ufeff" + lines[0], *lines[1:]],
    "a row too short": lambda lines: [*lines, "1,1,0.0"],
    "zeros of a power cut": lambda lines: [*lines, "\0" * 40],
    "no row at all": lambda lines: lines[:1],
    "nothing": lambda lines: [],
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_lines_that_are_no_rows_are_dropped(kind, imgs):
    run = train_dcgan.train(**SMALL | {"epochs": 1})
    path = run / "metrics.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(FOREIGN[kind](lines)), encoding="utf-8")
    train_dcgan.train(resume=run, epochs=2)
    rows = path.read_text().splitlines()
    kept = [] if kind in ("no row at all", "nothing") else lines[1:]
    assert rows[: 1 + len(kept)] == [lines[0], *kept] and len(rows) == 4 + len(kept)
    assert [int(row["step"]) for row in read(run)][-3:] == [4, 5, 6]


def test_of_two_starts_at_one_moment_the_second_takes_the_next_number(imgs, monkeypatch):
    Path("runs").mkdir()
    mkdir, others = Path.mkdir, iter([1, 2])

    def raced(path, *options, **more):
        if path.name.startswith("dcgan-imgs") and next(others, None):
            mkdir(path, parents=True)  # by another process
        return mkdir(path, *options, **more)

    monkeypatch.setattr(Path, "mkdir", raced)
    assert train_dcgan.train(**SMALL | {"epochs": 1}) == Path("runs/dcgan-imgs-3")


def test_out_and_resume_begin_a_run_or_go_on_with_it(imgs, monkeypatch, capsys):
    """The same command each time, as by torchrun's restarts and a cluster's requeued jobs."""
    flags = [f"--{name}={value}" for name, value in (SMALL | {"epochs": 2}).items()]
    words = [*flags, "--out=runs/x", "--resume"]
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(signal.SIGTERM))
        call(patch, train_dcgan, *words, code=130)
    assert step_of(Path("runs/x")) == 2
    call(monkeypatch, train_dcgan, *words)
    assert step_of(Path("runs/x")) == 6
    call(monkeypatch, train_dcgan, *words)
    assert "has reached epoch 2 of 2: nothing to do" in capsys.readouterr().out
    assert os.listdir("runs") == ["x"]
    whole = train_dcgan.train(**SMALL | {"epochs": 2}, out="whole")
    a, b = (common.load_file(run / "checkpoint.pt") for run in (whole, Path("runs/x")))
    for name in ("G", "D", "G_ema", "opt_d", "opt_g"):
        assert_equal(a[name], b[name])


def test_a_run_of_before_can_be_drawn_from_but_not_resumed(imgs, monkeypatch, capsys):
    run = train_dcgan.train(**SMALL | {"epochs": 1})
    content = common.load_file(run / "checkpoint.pt")
    for name in ("origin", "pace", "epoch", "images_seen"):
        del content[name]
    common.save_file(content, run / "checkpoint.pt")
    call(monkeypatch, train_dcgan, f"--resume={run}", "--epochs=2", code=2)
    error = capsys.readouterr().err
    assert error == f"error: {run} is of an older version: it can be drawn from, but not resumed\n"
    call(monkeypatch, generate, f"--load_path={run}", "--img_num=4")
    assert len(list(Path("generated/dcgan-imgs").glob("*.png"))) == 4


# ---------------------------------------------------------------------- files are whole and true


@pytest.mark.parametrize("name", ["checkpoint.pt", "generator_0001.pt"])
def test_one_flipped_bit_is_noticed(name, imgs, monkeypatch, capsys):
    run = train_dcgan.train(**SMALL | {"epochs": 1})
    whole = (run / name).read_bytes()
    with zipfile.ZipFile(run / name) as archive:
        parts = [archive.read(member) for member in archive.namelist() if "/data/" in member]
    for part in sorted(parts, key=len)[-5:]:
        place = whole.index(part) + len(part) // 2
        flipped = whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :]
        (run / name).write_bytes(flipped)
        with pytest.raises(common.UserError, match="damaged .*checksum of its part"):
            common.load_file(run / name)
    call(monkeypatch, generate, f"--load_path={run / name}", code=2)
    assert "checksum" in capsys.readouterr().err and not Path("generated").exists()


def test_a_full_disk_leaves_no_half_image_and_blocks_no_folder(imgs, monkeypatch, capsys):
    run = train_dcgan.train(**SMALL | {"epochs": 1})
    for fine in range(4):  # files until the disk is full
        with monkeypatch.context() as patch:
            fsync, left = os.fsync, iter(range(fine))

            def full(file, fsync=fsync, left=left):
                if next(left, None) is None:
                    raise OSError(errno.ENOSPC, "No space left on device")
                fsync(file)

            patch.setattr(os, "fsync", full)
            call(patch, generate, f"--load_path={run}", "--img_num=9", code=2)
        error = capsys.readouterr().err
        assert "No space left" in error and error.count("\n") == 1
        files = [path for path in Path("generated").rglob("*") if path.is_file()]
        assert len(files) == fine and all(path.stat().st_size for path in files)
    call(monkeypatch, generate, f"--load_path={run}", "--img_num=9")
    assert len(list(Path("generated/dcgan-imgs").glob("*.png"))) == 9


def test_a_run_whose_name_is_no_text(imgs, monkeypatch):
    run = train_dcgan.train(**SMALL | {"epochs": 1}, out=os.fsdecode(b"runs/caf\xe9"))
    for n in (2, 4):  # the second time into a folder of its own
        call(monkeypatch, generate, f"--load_path={run}", f"--img_num={n}", "--save_path=mine")
        assert len(list(Path("mine").glob("*.png"))) == n


def test_images_to_compare_with_are_looked_at_first(imgs, monkeypatch, capsys):
    train_dcgan.train(**SMALL | {"epochs": 1})
    call(monkeypatch, generate, "--nearest=imsg", code=2)
    assert "imsg does not exist" in capsys.readouterr().err and not Path("generated").exists()


def test_pictures_of_another_kind_replace_none(imgs, monkeypatch):
    train_dcgan.train(**SMALL | {"epochs": 1})
    call(monkeypatch, generate, "--img_num=4", "--grid_size=5")
    before = Path("generated/dcgan-imgs-grid-5x5.png").read_bytes()
    call(monkeypatch, generate, "--img_num=4", "--interpolate")
    names = {path.name for path in Path("generated").glob("*.*")}
    expected = ["grid-5x5.png", "grid-2x2.png", "interpolation.png", "interpolation.gif"]
    assert names == {f"dcgan-imgs-{name}" for name in expected}
    assert Path("generated/dcgan-imgs-grid-5x5.png").read_bytes() == before


def test_a_loaded_generator_can_be_pickled(imgs, monkeypatch):
    run = train_dcgan.train(**SMALL | {"epochs": 1})
    monkeypatch.delitem(sys.modules, "train_dcgan")  # as where nobody has imported it
    G, z = generate.load_generator(run)
    again = pickle.loads(pickle.dumps(G))
    np.testing.assert_array_equal(*(generate.sample(net, z, range(3)) for net in (G, again)))


# ------------------------------------------------------------------------------------ what is said


@pytest.mark.parametrize("path", ["imgs", "my imgs"])
def test_the_end_says_where_to_look_and_what_comes_next(path, imgs, capsys):
    imgs.rename(path)
    run = train_dcgan.train(**SMALL | {"path": path, "epochs": 1})
    done = capsys.readouterr().out.splitlines()[-1]
    assert done.startswith("done: look at ") and "then generate.py draws" in done
    assert (run / "samples/latest.png").exists() and f"{run}/samples/latest.png" in done
    command = done.split(", and ")[1].removesuffix(" measures them")
    assert shlex.split(command) == ["fid.py", path, str(run)]


def test_the_settings_of_the_start_can_be_typed(capsys):
    """Those that were settled, too: a list of classes, switches, odd names."""
    for kind in ("cats", "wild dogs", "birds"):
        Path("my imgs", kind).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(f"my imgs/{kind}/{i}.png")
    flags = {"path": "my imgs", "label": ["cats", "wild dogs"], "flip": True, "epochs": 1}
    run = train_dcgan.train(**SMALL | flags)
    (line,) = [ln for ln in capsys.readouterr().out.splitlines() if ln.startswith("settings: ")]
    script, *words = shlex.split(line.removeprefix("settings: ").removeprefix("python "))
    assert script == "train_dcgan.py"
    assert words[words.index("--label") + 1 :][:2] == ["cats", "wild dogs"]
    typed = common.settings_of(train_dcgan.get_args(words))
    assert typed == common.load_file(run / "checkpoint.pt")["config"]


@pytest.mark.parametrize("script", [train_dcgan, train_fcgan, train_balanced, generate, fid])
def test_help_names_a_value_or_a_rule(script, monkeypatch, capsys):
    call(monkeypatch, script, "--help", code=0)
    out = capsys.readouterr().out
    assert "None" not in out and "SUPPRESS" not in out and "default" in out


def test_a_curve_that_never_moves_is_no_panel(imgs, monkeypatch):
    step, drawn = train_dcgan.train_step, []
    still = lambda *arguments: step(*arguments) | {"still": torch.tensor(3.0)}
    monkeypatch.setattr(train_dcgan, "train_step", still)
    monkeypatch.setattr(common, "save_curves", lambda panels, *_: drawn.extend(panels))
    run = train_dcgan.train(**SMALL | {"epochs": 2})
    names = {name for _, _, curves in drawn for name in curves}
    assert {"loss_d", "loss_g", "d_real"} <= names and "still" in read(run)[0]
    assert "still" not in names
    assert [title for title, *_ in drawn] == ["loss", "d"]  # names that begin alike


@pytest.mark.parametrize(
    "low, high", [(0, 1), (0.13, 0.97), (3, 17), (1e-5, 2e-5), (-1, 1), (0, 999), (5, 5.01)]
)
def test_ticks_are_round(low, high):
    found = common.ticks(low, high)
    step = found[1] - found[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)
    np.testing.assert_allclose(found / step, np.round(found / step), atol=1e-6)
    assert found[0] <= low + 1e-9 and high <= found[-1] + 1e-9 and 3 <= len(found) <= 8


# ------------------------------------------------------------------------------------- identity


def held_elsewhere(folder):
    """Another process that holds a run's folder, as if it trained there before its first save."""
    code = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX)"
    )
    code += "; print('held', flush=True); time.sleep(60)"
    words = [sys.executable, "-c", code, str(folder / ".lock")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_second_process_in_a_runs_folder_ends_at_once(imgs, monkeypatch, capsys):
    run = train_dcgan.train(**SMALL | {"epochs": 1})
    before = {path: path.read_bytes() for path in run.rglob("*.*")}
    Path("new").mkdir()
    for folder, flags in ((run, f"--resume={run}"), (Path("new"), "--path=imgs --out=new")):
        other = held_elsewhere(folder)
        with pytest.raises(SystemExit) as exit:
            run_main(monkeypatch, *flags.split(), "--image_size=16", "--width=4", "--epochs=2")
        other.kill()
        error = capsys.readouterr().err
        assert exit.value.code == 2 and error.count("\n") == 1
        assert f"another process trains in {folder}: wait for its end, or begin another" in error
    assert {path: path.read_bytes() for path in run.rglob("*.*")} == before


def test_a_killed_process_leaves_no_lock_and_a_live_one_keeps_it(imgs):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train_dcgan; train_dcgan.main()"
    flags = [f"--{name}={value}" for name, value in (SMALL | {"epochs": 10**6}).items()]
    first = subprocess.Popen(
        [sys.executable, "-c", code, *flags, "--out=run"], stdout=subprocess.PIPE, text=True
    )
    while "epoch" not in (line := first.stdout.readline()):
        assert line, first.wait()
    while not Path("run/checkpoint.pt").exists():
        assert first.poll() is None
    second = subprocess.run(
        [sys.executable, "-c", code, "--resume=run"], capture_output=True, text=True
    )
    assert second.returncode == 2 and "another process trains in run" in second.stderr
    first.kill()
    first.wait()
    step = common.load_file("run/checkpoint.pt")["step"]
    train_dcgan.train(resume="run", epochs=step // 3 + 2)
    assert common.load_file("run/checkpoint.pt")["step"] > step


@pytest.fixture
def no_inception(monkeypatch):
    """For tests that make statistics up: the network takes seconds to build."""
    monkeypatch.setattr(fid, "load_inception", lambda *_: (torch.nn.Identity(), "random"))


def test_fid_takes_the_classes_that_a_run_has_learned(no_inception, monkeypatch, capsys):
    images, labels = common.read_dataset("glyphs")
    chosen = {"dataset": "glyphs", "label": [7], "epochs": 1, "image_size": 16, "width": 4}
    run = train_dcgan.train(**chosen)
    taken = []

    def noting(images, *_):
        taken.append(np.stack([*images]))
        return np.zeros(8), np.eye(8), len(taken[-1])

    monkeypatch.setattr(fid, "feature_stats", noting)
    call(monkeypatch, fid, "glyphs", run, "--features=random", "--img_num=4")
    assert len(taken[0]) == (labels == 7).sum() > 300 and len(taken[1]) == 4
    assert "only the classes count that the run has learned: 7\n" in capsys.readouterr().out


def test_a_name_with_a_slash_is_a_path_and_a_bare_one_the_data_set(
    no_inception, monkeypatch, capsys
):
    write_images(Path("glyphs"), 5)
    counted = []
    monkeypatch.setattr(
        fid,
        "feature_stats",
        lambda images, *_: (np.zeros(8), np.eye(8), counted.append(len([*images])) or 9),
    )
    call(monkeypatch, fid, "./glyphs", "glyphs", "--features=random")
    assert counted == [5, 4800]
    assert "glyphs is the data set; for what lies here by that name type ./glyphs" in (
        capsys.readouterr().out
    )


def test_config_keeps_unset_what_was_settled_for_other_data(imgs, capsys):
    run = train_dcgan.train(dataset="glyphs", label=[1], epochs=1, width=4)
    text = (run / "config.ini").read_text()
    assert "image_size = null\n" in text and 'precision = "auto"\n' in text
    assert "--image_size=32" in capsys.readouterr().out  # settled, as printed at the start
    ini = f"--config={run}/config.ini"
    args = train_dcgan.get_args([ini, "--path=imgs"])
    assert (args.image_size, args.dataset, args.label, args.width) == (64, None, None, 4)
    mnist = train_dcgan.get_args([ini, "--dataset=mnist"])
    assert (mnist.r1, mnist.init) == (1.0, "xavier")


@pytest.mark.parametrize("out", ["imgs", "imgs/run", "imgs/../imgs/a/b"])
def test_a_run_inside_its_images_is_refused(imgs, out, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--path=imgs", f"--out={out}")
    assert f"--out {out} lies in --path" in capsys.readouterr().err
    assert not Path("imgs/run").exists() and not Path(".cache").exists()


def test_a_lone_label_works_with_the_default_data_set(monkeypatch):
    images = np.zeros((20, 28, 28, 1), np.uint8), np.arange(20) % 10
    monkeypatch.setattr(common, "read_dataset", lambda *_: images)
    args = train_fcgan.get_args(["--label", "7"])
    assert len(common.load_data(args)[0]) == 2


# ----------------------------------------------------------------------------------------- pace


def test_about_a_hundred_grids_and_ten_snapshots_unless_typed(monkeypatch):
    write_images(Path("imgs"), 4)
    stats, due, write = dict.fromkeys(STATS, torch.tensor(0.5)), [], common.Run.write

    def noted(run, grid, keep, save):
        due.append((grid, keep))
        if run.step in (0, run.steps):  # the others take their time
            write(run, grid, keep, save)

    monkeypatch.setattr(train_dcgan, "train_step", lambda *_: stats)
    monkeypatch.setattr(common.Run, "write", noted)
    tiny = SMALL | {"batch_size": 4, "epochs": 230}
    for flags, grids, snapshots in (
        ({}, range(75, 102), range(10, 11)),
        ({"sample_every": 50, "checkpoint": 100}, [6], [3]),  # the first and last, too
    ):
        due.clear()
        run = train_dcgan.train(**tiny, **flags)
        grid, keep = (sum(which) for which in zip(*due))
        assert grid in grids and keep in snapshots
        assert (run / "generator_0230.pt").exists() and (run / "samples/epoch_0230.png").exists()


def test_a_stop_says_saved_before_it_draws(imgs, monkeypatch, capsys):
    step = train_dcgan.train_step

    def interrupted(*arguments):
        common.signal.raise_signal(common.signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(train_dcgan, "train_step", interrupted)
    said = []
    monkeypatch.setattr(common.Run, "draw", lambda run: said.append(capsys.readouterr().out))
    with pytest.raises(KeyboardInterrupt):
        train_dcgan.train(**SMALL, out="a b")
    assert "saved: a b/checkpoint.pt at step 1" in said[0]
    assert "--resume 'a b'\n" in capsys.readouterr().out  # can be pasted


def test_the_line_of_progress_fits_80_columns(imgs, capsys):
    train_dcgan.train(**SMALL | {"epochs": 20})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert all(f"{name} 0." in lines[-1] or f"{name} 1." in lines[-1] for name in STATS[:4])
    assert "/20, " in lines[-1] and max(map(len, lines)) <= 80


def test_generate_leaves_the_images_of_another_run_alone(imgs, monkeypatch, capsys):
    runs = [train_dcgan.train(**SMALL | {"epochs": 1}, out=f"{x}/run") for x in "ab"]
    call(monkeypatch, generate, f"--load_path={runs[0]}")
    before = {path: path.read_bytes() for path in Path("generated/run").iterdir()}
    call(monkeypatch, generate, f"--load_path={runs[1]}", code=2)
    error = capsys.readouterr().err
    assert "generated/run holds images of" in error and "--save_path" in error
    assert {path: path.read_bytes() for path in Path("generated/run").iterdir()} == before
    call(monkeypatch, generate, f"--load_path={runs[0]}/generator_0001.pt", "--save_path=x")
    call(monkeypatch, generate, f"--load_path={runs[0]}", "--save_path=x")  # the same run


def test_fid_of_all_snapshots_is_written_as_it_goes(imgs, no_inception, monkeypatch):
    run = train_dcgan.train(**SMALL | {"epochs": 3})
    calls = []

    def stats(images, *_):
        calls.append(len([*images]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return np.zeros(8), np.eye(8), calls[-1]

    monkeypatch.setattr(fid, "feature_stats", stats)
    flags = ["imgs", run, "--all", "--features=random", "--img_num=4"]
    call(monkeypatch, fid, *flags, code=130)
    assert len((run / "fid.csv").read_text().splitlines()) == 1 + 2


def test_one_decoded_copy_of_the_same_images_and_no_stale_ones(imgs, monkeypatch):
    run = train_dcgan.train(**SMALL | {"epochs": 1})
    call(monkeypatch, generate, f"--load_path={run}", "--img_num=4", f"--nearest={imgs.resolve()}")
    cached = list(Path(".cache").glob("*.npy"))
    assert len(cached) == 1
    Image.new("RGB", (16, 16)).save("imgs/new.png")
    assert len(common.load_images("imgs", 16)) == 25
    assert len(list(Path(".cache").glob("*.npy"))) == 1 and not cached[0].exists()
    common.load_images("imgs", 8)  # of another size: kept beside it
    assert len(list(Path(".cache").glob("*.npy"))) == 2


# ---------------------------------------------------------------------------------------- words


def test_compile_without_a_compiler_is_one_line(imgs, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "nowhere")
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--path=imgs", "--compile")
    assert "--compile needs a C++ compiler" in capsys.readouterr().err


def test_samples_removed_by_hand_are_no_reason_to_fail(imgs):
    run = train_dcgan.train(**SMALL | {"epochs": 1})
    shutil.rmtree(run / "samples")
    (run / "metrics.csv").unlink()
    train_dcgan.train(resume=run, epochs=2)
    assert (run / "training.gif").exists() and len(read(run)) == 3


def test_jfif_is_read_and_other_kinds_are_counted(imgs, capsys):
    Image.new("RGB", (16, 16)).save("imgs/a.jfif", "JPEG")
    for name in ("b.heic", "c.NEF"):
        Path("imgs", name).touch()
    assert len(common.load_images("imgs", 16)) == 25
    assert "2 images are left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, flip",
    [
        ("flip = True\nepochs = 7\n", True),
        ("flip: false\nepochs: 7\n", False),
        ("[mine]\nflip = true\nepochs = 7\n", True),
        ("epochs = 7\n[mine]\nflip = true\n", True),
    ],
)
def test_an_ini_written_by_hand_works(text, flip):
    Path("hand.ini").write_text(text)
    args = train_dcgan.get_args(["--config=hand.ini"])
    assert (args.flip, args.epochs) == (flip, 7)


def test_an_ini_that_does_not_work_says_what_to_write():
    Path("hand.ini").write_text("flip = perhaps\n")
    with pytest.raises(common.UserError, match="hand.ini: argument --flip.*: write true or false"):
        train_dcgan.get_args(["--config=hand.ini"])
