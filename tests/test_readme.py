"""What the README, docs/recipes.md and docs/results.md say can be typed and clicked.

Their commands run in order, in short form; those for several processes are parsed here and run by
test_ranks.py.
"""

import functools
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, write_images
from test_datasets import cifar10_archive, mnist_files
from test_fid import SmallNetwork

import common
import fid
import generate
import train_balanced
import train_dcgan
import train_fcgan

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {name: (ROOT / "docs" / name).read_text(encoding="utf-8")
        for name in ("recipes.md", "results.md")}  # fmt: skip
SCRIPTS = {
    f"{script.__name__}.py": script
    for script in (train_dcgan, train_fcgan, train_balanced, generate, fid)
}
*BLOCKS, VARIANT = re.findall(r"```python\n(.*?)```", README, re.S)  # the last: a variant's losses
FOLDERS = ("imgs", "faces", "cats", "cats400", "celeba", "pokemon")


def commands():
    """Each line of a code block and each `command` in the text that names a script and flags."""
    text = "\n".join([README, *DOCS.values()]).replace("\\\n", " ")
    line = r"^    (?:\.venv/bin/|.*&& \.venv/bin/)?(?:python|torchrun .*?) (\w+\.py.*)$"
    inline = r"`(?:python )?(\w+\.py [^`\n]+)`"
    for match in re.finditer(f"{line}|{inline}", text, re.M):
        words = shlex.split(match[1] or match[2], comments=True)
        if words[0] in SCRIPTS:
            yield words, "torchrun" in match[0]


def shortened(script, flags):
    if script == "fid.py":
        return [*flags, "--features", "random", "--img_num", "8"]
    if script == "generate.py":
        return flags
    if "--resume" in flags:
        return [*flags, "--epochs", "2"]
    size = ["--image_size", "16"] + (["--width", "4"] if script != "train_fcgan.py" else [])
    return [*flags, "--epochs", "1", *size]


@pytest.fixture
def prepared(monkeypatch):
    """The folders and data sets of the README, tiny; a small network in the place of Inception."""
    Path("docs").symlink_to(ROOT / "docs")  # generators to draw with
    for name in FOLDERS:
        write_images(Path(name), 24)
    for name in ("cats", "dogs"):
        write_images(Path("animals", name), 12)
    for name in ("faces", "cats"):
        shutil.make_archive(name, "zip", name)
    Path("data").mkdir()
    for name, content in mnist_files().items():
        Path("data", name).write_bytes(content)
    Path("data/cifar-10-binary.tar.gz").write_bytes(cifar10_archive())
    read = common.read_dataset

    def some(*args):
        images, labels = read(*args)
        return images[:200], labels[:200]

    monkeypatch.setattr(common, "read_dataset", some)
    monkeypatch.setattr(common, "draw_glyphs", functools.partial(common.draw_glyphs, n=100))
    monkeypatch.setattr(fid, "Inception", SmallNetwork)


def test_every_command_runs(prepared, monkeypatch, capsys):
    monkeypatch.setattr(fid, "frechet_distance", lambda *_: 1.0)  # seconds each; see test_fid.py
    ran = 0
    for (script, *flags), in_processes in commands():
        if in_processes:  # understood; tests/test_ranks.py runs such commands
            SCRIPTS[script].get_args(flags)
            continue
        monkeypatch.setattr(sys, "argv", [script, *shortened(script, flags)])
        try:
            SCRIPTS[script].main()
        except SystemExit as exit:
            assert exit.code in (None, 0), f"{script} {flags}: {capsys.readouterr().err}"
        for snapshot in Path("runs").glob("*/generator_0001.pt"):
            shutil.copy(snapshot, snapshot.with_name("generator_0050.pt"))  # which the text names
        ran += 1
    assert ran > 40


def test_the_lines_of_python_run(prepared):
    scope = {"images": np.zeros((8, 16, 16, 3), np.uint8)}
    for block in BLOCKS:
        block = block.replace("epochs=50", "epochs=1, image_size=16, width=4")
        block = block.replace("epochs=100", "epochs=2").replace("_0050", "_0001")
        exec(block.replace("load_inception()", 'load_inception("random")'), scope)
    assert scope["images"].shape == (64, 16, 16, 3) and Path("grid.png").exists()


def test_a_copied_and_changed_script_trains_and_generates(imgs):
    script = (ROOT / "train_dcgan.py").read_text()
    for line in VARIANT.splitlines():
        name = line.partition(" = ")[0]
        script, found = re.subn(rf"^( +){name} = .*", rf"\1{line}", script, flags=re.M)
        assert found == 1, name
    Path("train_hinge.py").write_text(script)
    for name in ("common.py", "generate.py"):
        shutil.copy(ROOT / name, name)
    small = shlex.split("--epochs 1 --image_size 16 --width 4")
    run = functools.partial(subprocess.run, check=True)
    run([sys.executable, "train_hinge.py", "--path", "imgs", *small])
    run([sys.executable, "generate.py"])
    assert len(list(Path("generated/hinge-imgs").glob("*.png"))) == 16


def test_files_and_pictures_exist():
    files = [ROOT / name for name in re.findall(r"^\| `([\w.]+\.py)`", README, re.M)]
    for folder, text in ((ROOT, README), *((ROOT / "docs", text) for text in DOCS.values())):
        files += [folder / name for name in re.findall(r"\]\(([\w./-]+)[#)]", text)]
    assert len(files) > 20 and not [file for file in files if not file.exists()]


def test_it_is_short_and_begins_with_a_picture():
    lines = README.splitlines()
    assert len(lines) <= 280 and lines[2].startswith("![")
    assert README.index("docs/results.md") < README.index("## Start")
    assert README.index("docs/recipes.md") < README.index("## Start")


@pytest.mark.parametrize("name, shape", [("cats", (64, 64, 3)), ("digits", (32, 32, 1))])
def test_the_generators_in_the_repository_draw(name, shape):
    G, z = generate.load_generator(ROOT / f"docs/{name}.pt")
    images = generate.sample(G, z, range(16))
    assert images.shape == (16, *shape)
    assert (
        36 < images.astype(float).std(0).mean() < 90
    )  # grey levels, as photographs and digits vary


def test_both_setup_lines_are_there():
    setup = "python3 -m venv .venv && .venv/bin/pip install -r"
    assert f"{setup} requirements.txt && .venv/bin/python train_dcgan.py\n" in README
    assert f"{setup} tests/requirements.txt && .venv/bin/python -m pytest\n" in README
