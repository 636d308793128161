"""Any image, any interruption, any file: nothing is lost, nothing is executed, memory is small."""

import io
import json
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, write_images
from kill_loop import kill_loop
from PIL import Image, ImageOps
from test_run import SMALL, assert_same_run, run_main

import common
import generate
import train_dcgan

# ------------------------------------------------------------------------------- kinds of images


def saved(name, image, **options):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    image.save(name, **options)
    return name


def decoded(name, **options):
    with open(name, "rb") as file:
        return common.decode(file, **options)


def red(mode="RGB", size=(20, 20)):
    return Image.new("RGB", size, "red").convert(mode)


def test_kinds_of_images_that_show_red():
    palette = red("P")
    animation = {"save_all": True, "append_images": [Image.new("RGB", (20, 20), "blue")]}
    for name in (
        saved("cmyk.jpg", red("CMYK"), quality=95),
        saved("palette.png", palette),
        saved("animated.gif", red(), **animation),
        saved("lossless.webp", red(), lossless=True),
        saved("animated.webp", red(), lossless=True, **animation),
        saved("Köpfe/кошка.bmp", red()),
        saved("UPPER.JPG", red(), quality=95),
        saved("pages.tiff", red(), **animation),
        saved("tiny.png", red(size=(1, 1))),
        saved("alpha.png", red("RGBA")),
    ):
        pixels = decoded(name, image_size=16)
        assert pixels.shape == (16, 16, 3), name
        assert np.abs(pixels.astype(int) - [255, 0, 0]).max() <= 6, name
    assert len(common.load_images(".", 16)) == 10  # found by their endings, in subfolders too


def test_kinds_of_grey_and_of_transparency():
    half = Image.new("LA", (8, 8), (0, 128))
    assert abs(int(decoded(saved("la.png", half)).mean()) - 127) <= 1
    clear = Image.new("P", (8, 8), 0)
    clear.putpalette([255, 0, 0, 0, 0, 255])
    assert (decoded(saved("clear.png", clear, transparency=0)) == 255).all()
    bits = Image.fromarray(np.eye(8, dtype=bool))
    assert (decoded(saved("bits.png", bits), channels=1)[..., 0] == 255 * np.eye(8)).all()
    deep = Image.fromarray(np.full((8, 8), 257 * 200, np.uint16))
    for name in ("deep.png", "deep.tif"):
        assert (decoded(saved(name, deep)) == 200).all(), name
    for name in ("deep.png", "deep.tif", "bits.png"):
        Path(name).rename(Path("grey", name)) if Path("grey").mkdir(exist_ok=True) is None else None
    assert common.load_images("grey", 16).shape == (3, 16, 16, 1)


def test_a_large_photograph_is_decoded_small(monkeypatch):
    gradient = Image.linear_gradient("L").resize((6000, 4000)).convert("RGB")
    saved("photo.jpg", gradient, quality=80)
    sizes, transpose = [], ImageOps.exif_transpose
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda i: sizes.append(i.size) or transpose(i))
    pixels = decoded("photo.jpg", image_size=64)
    assert sizes == [(750, 500)]  # an eighth: 1 MB instead of 72
    expected = np.asarray(ImageOps.fit(gradient, (64, 64), Image.Resampling.BICUBIC))
    assert np.abs(pixels.astype(int) - expected).max() <= 3


def test_what_cannot_be_decoded_is_listed_and_training_goes_on(imgs, capsys):
    photo = Path(saved("whole.jpg", Image.linear_gradient("L")))
    Path("imgs/cut.jpg").write_bytes(photo.read_bytes()[:2000])
    Path("imgs/empty.png").touch()
    Path("imgs/text.png").write_text("hello")
    header = bytearray(io_bytes(red(size=(2, 2))))
    header[16:24] = (60_000).to_bytes(4, "big") * 2  # declares 60000 x 60000
    Path("imgs/huge.png").write_bytes(header)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = train_dcgan.train(**SMALL | {"epochs": 1})
    assert "4 of 28 files cannot be decoded" in capsys.readouterr().out
    (notes,) = Path(".cache").glob("*.json")
    names = {*json.loads(notes.read_text())["failed"]}
    assert names == {"cut.jpg", "empty.png", "text.png", "huge.png"}
    assert (run / "generator_0001.pt").exists()


def io_bytes(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_damaged_zip(imgs, monkeypatch, capsys):
    with zipfile.ZipFile("imgs.zip", "w") as archive:
        for path in sorted(imgs.rglob("*.png")):
            archive.write(path)
    whole = bytearray(Path("imgs.zip").read_bytes())
    whole[200] ^= 255  # in the pixels of the first image: its checksum fails
    Path("imgs.zip").write_bytes(whole)
    assert len(common.load_images("imgs.zip", 16)) == 23
    whole[-22 + 12 : -22 + 16] = b"\xff" * 4  # the directory claims to be larger than the file
    Path("broken.zip").write_bytes(whole)
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--path=broken.zip")
    assert capsys.readouterr().err.count("\n") == 1


def test_odd_file_names(imgs):
    odd = [b"imgs/new\nline.png", b"imgs/caf\xe9.png", b"imgs/-flag.png", b"imgs/%s ''.png"]
    for name in odd:
        Path(os.fsdecode(name)).write_bytes(b"no image")
    Path("imgs/dangling.png").symlink_to("nowhere.png")
    assert len(common.load_images("imgs", 16)) == 24
    (notes,) = Path(".cache").glob("*.json")
    failed = json.loads(notes.read_text())["failed"]
    assert failed.pop("dangling.png").startswith("[Errno 2]")
    assert {os.fsencode(f"imgs/{name}") for name in failed} == {*odd}
    assert all("cannot identify" in why for why in failed.values())


# ------------------------------------------------------------------------ cache, disk and memory


def python(code, **kwargs):
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    return subprocess.Popen([sys.executable, "-c", start + code], **kwargs)


def test_two_runs_build_the_cache_at_the_same_moment():
    write_images(Path("imgs"), 600)
    code = "import common; print(common.load_images('imgs', 16).sum())"
    both = [python(code, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = {process.communicate()[0].splitlines()[-1] for process in both}
    assert sums == {str(common.load_images("imgs", 16).sum())}
    assert len(list(Path(".cache").iterdir())) == 2  # the array and its notes


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small tmpfs is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_line_and_leaves_what_was_there(imgs, tiny_disk, monkeypatch, capsys):
    write_images(Path("many"), 400)
    with pytest.raises(SystemExit) as exit:
        run_main(monkeypatch, "--path=many", "--image_size=32", f"--cache={tiny_disk}")
    error = capsys.readouterr().err
    assert exit.value.code == 2 and "No space left" in error and "another --cache" in error
    assert not list(tiny_disk.iterdir())

    flags = SMALL | {"epochs": 1, "out": tiny_disk / "run"}
    run = train_dcgan.train(**flags)
    before = (run / "checkpoint.pt").read_bytes()
    (tiny_disk / "filler").write_bytes(bytes(shutil.disk_usage(tiny_disk).free - 2**14))
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        run_main(monkeypatch, f"--resume={run}", "--epochs=300")
    assert exit.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    common.load_file(run / "checkpoint.pt")  # whole: the one from before, or a later one
    assert not list(run.rglob("*.part"))
    (tiny_disk / "filler").unlink()
    assert len(before) > 0 and train_dcgan.train(resume=run, epochs=2) == run


def test_a_read_only_place_is_one_line(imgs, tiny_disk, monkeypatch, capsys):
    run = train_dcgan.train(**SMALL | {"epochs": 1, "out": tiny_disk / "run"})
    before = {path: path.read_bytes() for path in run.rglob("*.*")}
    capsys.readouterr()
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    for flags in (
        ["--path=imgs", f"--cache={tiny_disk}/cache", "--image_size=32"],
        ["--path=imgs", f"--out={tiny_disk}/other", "--image_size=16"],
        [f"--resume={run}", "--epochs=2"],
    ):
        with pytest.raises(SystemExit) as exit:
            run_main(monkeypatch, *flags)
        error = capsys.readouterr().err
        assert exit.value.code == 2 and "Read-only file system" in error and error.count("\n") == 1
    assert {path: path.read_bytes() for path in run.rglob("*.*")} == before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon from /proc")
def test_training_from_a_memory_map_takes_no_memory_for_the_images():
    """2,560 images, 31 MB: mapped, they add next to nothing to the anonymous memory."""
    code = """
import re, zlib, numpy as np, common, train_dcgan
n = int(sys.argv[1])
images = np.lib.format.open_memmap("images.npy", "w+", np.uint8, (n, 64, 64, 3))
images[:] = np.arange(64, dtype=np.uint8)[:, None]
del images
def load_data(args):
    args.fingerprint = "made up"
    return np.load("images.npy", mmap_mode="r"), None
common.load_data = load_data
try:
    images = np.load("images.npy", mmap_mode="r")
    images[0] = 0
except ValueError:
    print("read-only")
train_dcgan.train(dataset="glyphs", image_size=64, width=4, epochs=2560 // n)
print("anonymous", re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""
    anonymous = []
    for n in (640, 2_560):
        start = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        done = subprocess.run(
            [sys.executable, "-c", start + code, str(n)], capture_output=True, text=True
        )
        assert "read-only" in done.stdout, done.stderr
        anonymous.append(int(done.stdout.split("anonymous")[1]) / 1024)
    assert anonymous[1] - anonymous[0] < 15, anonymous  # MB


def test_out_of_memory_says_which_flags_help(imgs, monkeypatch, capsys):
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes")):  # fmt: skip

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(train_dcgan, "train_step", fail)
        with pytest.raises(SystemExit) as exit:
            run_main(monkeypatch, "--path=imgs", "--image_size=16", "--width=4")
        message = capsys.readouterr().err
        assert exit.value.code == 2 and "--batch_size" in message and "--width" in message


# ------------------------------------------------------------------- kills, and files of strangers


def test_kills_at_random_moments():
    """The short form of kill_loop.py."""
    whole, killed, steps = kill_loop(kills=2, seed=1)
    assert_same_run(whole, killed)
    assert len(steps) == 2


class Trap:
    """Pickled, it would write a file when loaded."""

    def __reduce__(self):
        return open, ("trapped", "w")


def test_files_of_strangers(imgs, monkeypatch, capsys):
    """One line, exit code 2, nothing executed: for --resume and for generate.py."""
    run = train_dcgan.train(**SMALL | {"epochs": 1})
    path = run / "checkpoint.pt"
    whole, content = path.read_bytes(), torch.load(path, weights_only=True)
    first, *others = content["G_ema"]
    huge = torch.zeros(1).expand(10**12)
    config, unneeded = content["config"], {"z": {"dim": -3, "distribution": "normal"}}
    fine = [  # to go on with a finished run: not needed, or typed words that mean the same
        unneeded,
        {"typed": {"precision": ["fp32", "bf16"]}, "z": {}},
        {"config": config | {"batch_size": [8]}, "z": {}},
        {"config": config | {"k": None}, "z": {}},
    ]
    changes = [
        {"G_ema": Trap()},
        {"opt_d": Trap(), "G_ema": Trap()},
        {"script": "train_dcgan; import os"},
        {"script": None},
        *fine,
        {"z": []},
        {"config": 3, "generator_args": {"image_size": 16, "width": 10**9}},
        {"generator_args": content["generator_args"] | {"width": 10**6}, "config": None},
        {"generator_args": [1], "config": {}},
        {"G_ema": content["G_ema"] | {first: torch.zeros(3)}, "G": {}},
        {"G_ema": {name: content["G_ema"][name] for name in others}, "D": content["G"]},
        {"G_ema": content["G_ema"] | {first: 3}, "opt_g": content["opt_d"]},
        {"G_ema": content["G_ema"] | {first: huge}, "step": "7"},
        {"typed": 3, "z": {}},
        {"typed": {"epochs": [1]}, "G_ema": {}},
        {"origin": [0], "z": {}},
        {"origin": "abc", "z": {}},
        {"pace": None, "epoch": "three", "z": {}},
        {"config": config | {"augment": 3}, "z": {}},
        {"config": config | {"k": [[1]]}, "z": {}},
        {"config": config | {"seed": -1}, "z": {}},
        {"config": config | {"width": 10**9}, "z": {}},
        {"n_images": None, "fingerprint": "other", "z": {}},
        {"seconds": "long", "z": {}},
        {"fingerprint": 3, "z": {}},
    ]
    damaged = [b"", b"PK", whole[: len(whole) // 2], whole[:-10], bytes(1000), declared_huge(whole)]
    rng = np.random.default_rng(1)
    flipped = [
        whole[:i] + bytes([whole[i] ^ 0x55]) + whole[i + 1 :]
        for i in rng.integers(len(whole), size=20)
    ]
    spared, harmless = [], 0
    for change in (*changes, *damaged, *flipped):
        if isinstance(change, bytes):
            path.write_bytes(change)
        else:
            torch.save(content | change, path)
        for main, script, flags in (
            (train_dcgan.main, "train_dcgan.py", [f"--resume={run}", "--epochs=1"]),
            (generate.main, "generate.py", [f"--load_path={run}", "--save_path=out/a"]),
        ):
            monkeypatch.setattr(sys, "argv", [script, *flags])
            try:
                main()
                # flipped bits of the archive's lists do no harm; resuming needs a part of a file
                if change in flipped:
                    harmless += 1
                else:
                    assert isinstance(change, dict) and main is train_dcgan.main, change
                    spared.append(change)
            except SystemExit as exit:
                error = capsys.readouterr().err
                assert exit.code == 2 and error.count("\n") == 1, (change, error)
    assert harmless < 20 and spared == fine
    assert not Path("trapped").exists()


def declared_huge(whole):
    """The same archive, its directory claiming that a member holds four gigabytes."""
    content = bytearray(whole)
    entry = content.index(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = b"\xf0\xff\xff\xff"
    return bytes(content)


def test_no_scripts_fork_shell_or_links():
    for name in ("common.py", "generate.py", "train_dcgan.py", "train_fcgan.py"):
        source = (ROOT / name).read_text().replace("is_symlink(", "")
        words = ("fork", "os.system", "shell=True", "symlink(", "symlink_to", "pickle.load")
        for word in (*words, "eval(", "exec("):
            assert word not in source.replace(".eval()", "").replace("exec_module(", ""), (
                name,
                word,
            )
        assert "weights_only=True" in source or "torch.load(" not in source
