"""The yardstick, the comparison of recipes, and the variants that did not win."""

import argparse
import shutil
from pathlib import Path

import disturbances
import numpy as np
import pytest
import quality
import torch
import train_variants
from conftest import write_images
from PIL import Image
from test_run import SMALL, assert_equal

import common
import train_dcgan


@pytest.fixture
def scenes(monkeypatch):
    """A folder of 400 made-up landscapes, and a yardstick that has little time to learn them."""
    rng = np.random.default_rng(0)
    Path("scenes").mkdir()
    for i in range(400):
        sky, ground, horizon = rng.integers(150, 256, 3), rng.integers(0, 100, 3), 6 + i % 5
        image = np.empty((16, 16, 3))
        image[:horizon], image[horizon:] = sky, ground
        image = (image + rng.normal(scale=5, size=image.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(image).save(f"scenes/{i}.png")
    monkeypatch.setitem(quality.SEEN, "turns", 16_000)
    monkeypatch.setattr(quality, "SAMPLES", 200)
    return "scenes"


def test_every_disturbance_is_farther_than_other_real_images(scenes):
    for i in range(25):
        shutil.copy(f"scenes/{i}.png", f"scenes/copy_{i}.png")
    yardstick = quality.Yardstick(scenes, 16, "auto")
    learned, others = ({i.tobytes() for i in part} for part in (yardstick.other, yardstick.images))
    assert len(learned) == len(others) == 200 and not learned & others
    other, _ = yardstick.distance(yardstick.other)
    assert yardstick.distance(yardstick.images)[0] == pytest.approx(0, abs=1e-6)
    for kind in disturbances.KINDS:
        weak, strong = (disturbances.disturb(yardstick.images, kind, level) for level in (0.4, 1))
        weak, strong = yardstick.distance(weak)[0], yardstick.distance(strong)[0]
        assert 3 * other < weak and other < strong, kind
    (file,) = Path(".cache").glob("yardstick-*.pt")
    trained = file.stat().st_mtime_ns
    quality.Yardstick(scenes, 16, "auto")
    assert file.stat().st_mtime_ns == trained


def test_a_judge_that_cannot_judge_is_none(imgs, monkeypatch):
    with pytest.raises(SystemExit, match="24 images are too few"):
        quality.Yardstick("imgs", 16, "auto")
    monkeypatch.setitem(quality.SEEN, "turns", 1000)
    write_images(Path("noise"), 300)  # which has no upper side
    with pytest.raises(SystemExit, match="no judge"):
        quality.Yardstick("noise", 16, "auto")


def test_recipes_are_trained_to_each_number_of_images_and_measured_once(scenes, capsys):
    small = "--image_size 16 --width 4 --z_dim 8 --batch_size 40"
    args = argparse.Namespace(
        data=scenes, data_dir="", cache=".cache", image_size=16, train=0, only=None,
        kimg=[0.8, 0.4], seeds=[1], out=Path("out"),
        recipes=[f"plain: train_dcgan.py {small}", f"r1: train_variants.py {small} --r1 1"],
    )  # fmt: skip
    quality.compare(args)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert len(table) == 2 * 2 * 3  # recipes, numbers of images, generators of a checkpoint
    steps = [common.load_file(f"out/plain-s1/epochs_{n}.pt")["step"] for n in (1, 2)]
    assert steps == [10, 20]

    kept = common.load_file("out/r1-s1/epochs_1.pt")
    G = train_variants.Generator(**kept["generator_args"]).eval()
    G.load_state_dict(kept["G"])
    images = common.generate(G, common.latents(kept["z"], 0, range(200)))
    expected = quality.Yardstick(scenes, 16, "3").distance(images)[0]
    (row,) = [line for line in table if line.startswith("| r1 | raw | 0.4 ")]
    assert float(row.split("|")[5].split()[0]) == pytest.approx(expected, rel=0.01)

    times = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}
    quality.compare(args)
    assert times == {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}


def test_what_recipes_learn_from_is_kept_from_the_judge(scenes, capsys):
    for i in range(25):
        shutil.copy(f"scenes/{i}.png", f"scenes/copy_{i}.png")
    args = argparse.Namespace(
        data=scenes, data_dir="", cache=".cache", image_size=16, train=100, only=["averaged"],
        kimg=[0.2], seeds=[0], out=Path("out"),
        recipes=["few: train_dcgan.py --image_size 16 --width 4 --z_dim 8 --batch_size 50"],
    )  # fmt: skip
    quality.compare(args)
    assert "other real images" in capsys.readouterr().out
    kept = common.load_file("out/few-s0/epochs_2.pt")
    assert (kept["n_images"], kept["step"]) == (100, 4)
    yardstick = quality.Yardstick(scenes, 16, "auto", train=100)
    parts = common.load_images("out/train-100", 16), yardstick.other, yardstick.images
    trained, learned, judged = ({image.tobytes() for image in part} for part in parts)
    assert (len(trained), len(learned), len(judged)) == (100, 150, 150)
    assert len(trained | learned | judged) == 400


@pytest.mark.parametrize("r1", [{}, {"norm_d": "none", "every": 16, "init": "xavier"}])
def test_variants_without_flags_are_train_dcgan(r1, imgs):
    rates = {"lrd": 3e-4, "lrg": 3e-4, "one_sided": 0.1, "lr_decay": 0.5, "r1": float(bool(r1))}
    runs = train_dcgan.train(**SMALL | rates), train_variants.train(**SMALL | rates | r1)
    first, second = (torch.load(run / "checkpoint.pt", weights_only=True) for run in runs)
    for name in ("G", "D", "G_ema", "opt_d", "opt_g"):
        assert_equal(first[name], second[name])


@pytest.mark.parametrize(
    "flags",
    [
        {"upsample": True, "emas": [0.9]},
        {"spectral": True, "norm_d": "none"},
        {"norm_d": "none", "r1": 1.0, "every": 2},
        {"norm": "none", "norm_d": "none", "relativistic": True, "r1": 1.0, "r2": 1.0},
        {"hold": 0.03},
    ],
)
def test_each_variant_changes_what_is_learned_and_resumes(flags, imgs):
    plain = train_variants.train(**SMALL | {"epochs": 2})
    run = train_variants.train(**SMALL | flags | {"epochs": 1})
    train_variants.train(resume=run, epochs=2)
    whole = train_variants.train(**SMALL | flags | {"epochs": 2})
    plain, run, whole = (common.load_file(f / "checkpoint.pt")["G"] for f in (plain, run, whole))
    assert_equal(run, whole)
    assert not torch.equal(plain["project.weight"], whole["project.weight"])
