"""generate.py: the same image for the same seed and number, and the pictures beside them."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

import common
import generate
import train_dcgan


@pytest.fixture
def run(imgs):
    settings = {"image_size": 16, "width": 4, "z_dim": 8, "batch_size": 8, "epochs": 1}
    return train_dcgan.train(path="imgs", **settings)


def call(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, argv)])
    generate.main()


def pixels(path):
    return np.asarray(Image.open(path))


def test_an_image_is_the_same_whatever_is_made_beside_it(run, monkeypatch):
    call(monkeypatch, "--img_num=70", "--save_path=many")
    call(monkeypatch, "--img_num=3", "--save_path=few", "--load_path", run / "generator_0001.pt")
    count = lambda folder: len(list(Path(folder).glob("*.png")))
    assert count("many") == 70 and count("few") == 3
    for i in range(3):
        name = f"seed0_{i:06d}.png"
        assert Path("many", name).read_bytes() == Path("few", name).read_bytes()
    call(monkeypatch, "--img_num=3", "--seed=1", "--save_path=few")
    assert count("few") == 6
    assert (pixels("few/seed1_000000.png") != pixels("few/seed0_000000.png")).any()


def test_the_grid_shows_the_singles_and_lies_beside_their_folder(run, monkeypatch):
    call(monkeypatch, "--img_num=9", "--grid_size=2")
    assert len(list(Path("generated/dcgan-imgs").glob("*.png"))) == 9
    grid = pixels("generated/dcgan-imgs-grid-2x2.png")
    assert grid.shape == (2 * 18 + 2, 2 * 18 + 2, 3)
    for i, (top, left) in enumerate([(2, 2), (2, 20), (20, 2), (20, 20)]):
        single = pixels(f"generated/dcgan-imgs/seed0_{i:06d}.png")
        assert (grid[top : top + 16, left : left + 16] == single).all()


def test_save_path_may_be_the_current_folder(run, monkeypatch, tmp_path, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    call(monkeypatch, "--img_num=4", f"--load_path={tmp_path / run}", "--save_path=.")
    assert len(list(Path().glob("seed0_*.png"))) == 4 and (tmp_path / "here-grid-2x2.png").exists()
    call(monkeypatch, "--img_num=2", f"--load_path={tmp_path / run}", "--save_path=.")
    assert "holds 4 images now: others were there before" in capsys.readouterr().out


def test_interpolation_goes_from_image_to_image(run, monkeypatch):
    call(monkeypatch, "--interpolate")
    rows = pixels("generated/dcgan-imgs-interpolation.png")
    assert rows.shape == (8 * 18 + 2, 10 * 18 + 2, 3)
    for i in range(8):
        first, last = rows[2 + 18 * i :][:16, 2:18], rows[2 + 18 * i :][:16, 2 + 9 * 18 :][:, :16]
        for ours, number in ((first, i), (last, i + 1)):
            single = pixels(f"generated/dcgan-imgs/seed0_{number:06d}.png")
            assert np.abs(ours.astype(int) - single).max() <= 1  # sines round
    assert Image.open("generated/dcgan-imgs-interpolation.gif").n_frames > 40


def test_slerp_keeps_the_length_and_uniform_latents_go_straight():
    normal = {"dim": 500, "distribution": "normal"}
    a, b = common.latents(normal, 0, range(2))
    path = generate.interpolations(normal, 0, 2)
    torch.testing.assert_close(path[0], a)
    torch.testing.assert_close(path[-1], b)
    assert (path.norm(dim=1) / a.norm() - 1).abs().max() < 0.1
    uniform = {"dim": 500, "distribution": "uniform"}
    path = generate.interpolations(uniform, 0, 2)
    torch.testing.assert_close(path[3], path[0] * 2 / 3 + path[-1] / 3)


def test_nearest_finds_a_copy(run, monkeypatch):
    rng = np.random.default_rng(0)
    others = rng.integers(256, size=(3000, 4, 4, 3), dtype=np.uint8)
    images = others[[2999, 5, 1024]].copy()
    images[:, 0, 0] ^= 1
    found, distances = generate.nearest(images, others)
    np.testing.assert_array_equal(found, others[[2999, 5, 1024]])
    np.testing.assert_allclose(distances, (3 / 48) ** 0.5, rtol=1e-3)  # 3 of 48 numbers, by 1
    call(monkeypatch, "--nearest=imgs", "--img_num=4")
    pairs = pixels("generated/dcgan-imgs-nearest.png")
    assert pairs.shape == (2 + 2 * (16 + 14 + 2), 2 + 2 * (32 + 2), 3)  # 14 for the distance
    drawn = pixels("generated/dcgan-imgs/seed0_000000.png")
    assert (pairs[2:18, 2:18] == drawn).all()
    real = common.load_images("imgs", 16)
    distances = np.sqrt(((real - drawn.astype(float)) ** 2).mean((1, 2, 3)))
    assert (pairs[2:18, 18:34] == real[distances.argmin()]).all()
    written = np.full((14, 32, 3), 255, np.uint8)
    line = Image.new("L", (32, 14), 255)
    font = ImageFont.load_default(11)
    place = {"fill": 0, "font": font, "anchor": "mm"}
    ImageDraw.Draw(line).text((16, 7), f"{distances.min():.1f}", **place)
    written[:] = np.asarray(line)[..., None]
    assert (pairs[18:32, 2:34] == written).all() and written.min() < 128


@pytest.mark.parametrize("flip", [True, False])
def test_a_mirrored_copy_is_found_where_the_run_mirrored(flip, imgs, monkeypatch):
    rng = np.random.default_rng(0)
    others = rng.integers(256, size=(1500, 4, 4, 3), dtype=np.uint8)
    images = np.stack([others[1200][:, ::-1], others[7]])
    found, distances = generate.nearest(images, others, flip)
    assert (found[0] == images[0]).all() == flip and (distances[0] == 0) == flip
    assert (found[1] == images[1]).all() and distances[1] == 0
    settings = {"image_size": 16, "width": 4, "z_dim": 8, "batch_size": 8, "epochs": 1}
    train_dcgan.train(path="imgs", flip=flip, **settings)
    asked, nearest = [], generate.nearest
    noting = lambda *given: asked.append(given[2]) or nearest(*given)
    monkeypatch.setattr(generate, "nearest", noting)
    call(monkeypatch, "--nearest=imgs", "--img_num=4")
    assert asked == [flip]


def test_images_of_another_run_are_not_overwritten(run, monkeypatch, capsys):
    call(monkeypatch, "--img_num=2", "--save_path=mine")
    before = {path: path.read_bytes() for path in Path("mine").iterdir()}
    settings = {"image_size": 16, "width": 4, "z_dim": 8, "batch_size": 8, "epochs": 1}
    other = train_dcgan.train(path="imgs", seed=1, **settings)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, f"--load_path={other}", "--img_num=2", "--save_path=mine")
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1
    assert f"mine holds images of {run.resolve()}: pass another --save_path" in error
    assert before == {path: path.read_bytes() for path in Path("mine").iterdir()}
    call(monkeypatch, f"--load_path={run}", "--img_num=3", "--save_path=mine")  # its own: more
    assert len(list(Path("mine").glob("*.png"))) == 3


def test_many_images_show_their_progress(run, monkeypatch, capsys):
    call(monkeypatch, "--img_num=130", "--save_path=many")
    assert "130 of 130 images" in capsys.readouterr().out


def test_label_needs_a_generator_that_knows_classes(run, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, "--label=7")
    assert exit.value.code == 2 and not Path("generated").exists()
    assert capsys.readouterr().err == "error: --label 7: the classes of these images are none\n"


def test_a_class_is_asked_for_by_its_number(run, monkeypatch, capsys):
    """Of a snapshot whose latents end in one of three classes."""
    snapshot = torch.load(run / "generator_0001.pt", weights_only=True)
    latent = {"dim": 5, "distribution": "normal", "classes": 3}
    torch.save(snapshot | {"z": latent}, "classes.pt")
    G, z = generate.load_generator("classes.pt")
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(common, "generate", lambda G, z: asked.append(z))
        generate.sample(G, z, range(6), seed=3)
        generate.sample(G, z, range(6), seed=3, label=2)
    assert asked[0][:, 5:].argmax(1).tolist() == [0, 1, 2, 0, 1, 2]
    assert asked[1][:, 5:].argmax(1).tolist() == [2] * 6
    assert torch.equal(asked[0][:, :5], asked[1][:, :5])
    for label in (0, 2):
        call(monkeypatch, "--load_path=classes.pt", f"--label={label}", f"--save_path=of{label}")
    names = [path.name for path in Path("of0").glob("*.png")]
    assert len(names) == 16
    assert all((pixels(f"of0/{name}") != pixels(f"of2/{name}")).any() for name in names)
    with pytest.raises(SystemExit):
        call(monkeypatch, "--load_path=classes.pt", "--label=3")
    error = capsys.readouterr().err
    assert error == "error: --label 3: the classes of these images are 0 0, 1 1, 2 2\n"


def test_a_class_is_asked_for_by_its_name(run, monkeypatch, capsys):
    snapshot = torch.load(run / "generator_0001.pt", weights_only=True)
    latent = {"dim": 5, "distribution": "normal", "classes": 3, "names": ["7", "cats", "dogs"]}
    torch.save(snapshot | {"z": latent}, "names.pt")
    for label in ("cats", "1", "7", "0"):  # a name comes before a number
        words = f"--label={label}", f"--save_path=of-{label}", "--img_num=1", "--grid_size=1"
        call(monkeypatch, "--load_path=names.pt", *words)
    drawn = {label: pixels(f"of-{label}/seed0_000000.png") for label in ("cats", "1", "7", "0")}
    assert (drawn["cats"] == drawn["1"]).all() and (drawn["7"] == drawn["0"]).all()
    assert (drawn["cats"] != drawn["7"]).any()
    with pytest.raises(SystemExit):
        call(monkeypatch, "--load_path=names.pt", "--label=birds")
    assert "the classes of these images are 0 7, 1 cats, 2 dogs" in capsys.readouterr().err


def test_the_way_between_classes_is_straight():
    latent = {"dim": 5, "distribution": "normal", "classes": 3}
    way = generate.interpolations(latent, 0, 2)[:, 5:]
    share = torch.linspace(0, 1, generate.FRAMES)
    torch.testing.assert_close(way, torch.stack([1 - share, share, 0 * share], 1))


class Trap:
    """Pickled, it would write a file when loaded."""

    def __reduce__(self):
        return open, ("trapped", "w")


def test_only_snapshots_of_scripts_beside_it_are_accepted(run, monkeypatch, capsys):
    snapshot = torch.load(run / "generator_0001.pt", weights_only=True)
    bad = {
        "os": {"script": "os"},
        "path": {"script": "../train_dcgan"},
        "missing": {"script": "train_nothing"},
        "arguments": {"generator_args": {"height": 3}},
        "shapes": {"generator_args": snapshot["generator_args"] | {"width": 8}},
        "trap": {"G_ema": Trap()},
    }
    for name, change in bad.items():
        torch.save(snapshot | change, f"{name}.pt")
        with pytest.raises(SystemExit) as exit:
            call(monkeypatch, f"--load_path={name}.pt")
        assert exit.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not Path("trapped").exists() and not Path("generated").exists()
    with pytest.raises(common.UserError, match="no such file"):
        generate.load_generator("nowhere.pt")
    torch.save({"a": 1}, "other.pt")
    with pytest.raises(common.UserError, match="neither a checkpoint nor a snapshot"):
        generate.load_generator("other.pt")
