"""Shared by the tests: the scripts' folder on sys.path, and small folders of images."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder of its own, as a user would."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def imgs():
    """A folder imgs/ of 24 random colour images, 20 x 16 pixels, some in a subfolder."""
    write_images(Path("imgs"), 24)
    return Path("imgs")


def write_images(folder, n, mode="RGB"):
    rng = np.random.default_rng(0)
    (folder / "more").mkdir(parents=True)
    for i in range(n):
        shape = (16, 20, 3) if mode == "RGB" else (16, 20)
        image = Image.fromarray(rng.integers(256, size=shape, dtype=np.uint8))
        image.save(folder / ("more" if i % 3 == 0 else "") / f"{i:03d}.png")


@pytest.fixture
def real_data():
    """The folder of real images named by GAN_TEST_DATA."""
    if "GAN_TEST_DATA" not in os.environ:
        pytest.skip("GAN_TEST_DATA names no folder with cats.zip and mnist/")
    return Path(ROOT, os.environ["GAN_TEST_DATA"])
