"""What people's folders, files and habits do to a run: each case once went wrong in silence."""

import os
import shutil
import sys
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, write_images
from PIL import EpsImagePlugin, ImageFont
from torch import nn

import common
import generate
import train_dcgan
import train_fcgan

SMALL = {"image_size": 16, "width": 4, "z_dim": 8, "batch_size": 8, "epochs": 1, "device": "cpu"}


def train(**flags):
    return train_dcgan.train(**SMALL | flags)


def resume(run, **flags):
    return train_dcgan.train(resume=run, device="cpu", **flags)


def main(module, monkeypatch, *argv):
    """Run a command line; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
    try:
        module.main()
    except SystemExit as exit:
        return exit.code
    return 0


def found_in(path):
    return common.list_images(path)[0]


# --------------------------------------------------------------------------- what is in a folder


def test_postscript_under_any_name_starts_no_program(imgs, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("started"))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    for name in ("cat.png", "cat.jpg", "cat.eps", "cat.ps", "cat.iim"):
        (imgs / name).write_bytes(script)
    images, names = common.load_images("imgs", 16)
    assert len(images) == 24 and not any("cat" in name for name in names)
    assert not {".eps", ".ps", ".iim"} & {*common.IMAGE_EXTENSIONS}
    run = train(path="imgs")
    (run / "samples/epoch_0000.png").write_bytes(script)  # of a stranger's run
    resume(run, epochs=2)


def test_runs_and_generated_images_are_left_out_of_a_folder_and_of_a_zip(monkeypatch, capsys):
    write_images(Path("pics/imgs"), 24)
    monkeypatch.chdir("pics")
    train(path="imgs")
    assert main(generate, monkeypatch, "--img_num=4", "--interpolate", "--nearest=imgs") == 0
    assert main(generate, monkeypatch, "--img_num=4", "--interpolate", "--save_path=drawn") == 0
    monkeypatch.chdir("..")
    assert len([*Path("pics").glob("drawn-*")]) == 3
    with zipfile.ZipFile("pics.zip", "w") as archive:
        for path in sorted(Path("pics").rglob("*")):
            archive.write(path)
    capsys.readouterr()
    for path in ("pics", "pics.zip"):
        assert len(found_in(path)) == 24
        out = capsys.readouterr().out
        assert "left out, runs and generated images: " in out and "drawn-grid-2x2.png" in out
    assert len(found_in("pics/drawn")) == 4  # asked for by its own name
    with pytest.raises(common.UserError, match="no images in pics/generated .*left out, runs and"):
        found_in("pics/generated")  # the folder above the samples holds only grids


def test_a_file_called_checkpoint_makes_no_run(capsys):
    for name in ("cats", "dogs"):
        write_images(Path("animals", name), 24)
    Path("animals/dogs/checkpoint.pt").touch()
    Path("animals/checkpoint.pt").touch()
    images, names = common.load_images("animals", 16)
    assert len(images) == 48 and common.find_classes(names)[0] == ["cats", "dogs"]
    assert "checkpoint.pt, dogs/checkpoint.pt" in capsys.readouterr().out
    Path("runs/x").mkdir(parents=True)
    Path("runs/x/checkpoint.pt").touch()
    with pytest.raises(common.UserError, match="no run in runs/"):
        common.newest_run()


@pytest.mark.parametrize("name", ["#recycle", "@Recycle", "$RECYCLE.BIN", "@eaDir", "__MACOSX"])
def test_the_litter_of_systems_is_no_class(name, capsys):
    write_images(Path("nas/cats"), 24)
    write_images(Path("nas", name, "S-1-5"), 12)
    shutil.make_archive("nas", "zip", "nas")
    for path in ("nas", "nas.zip"):
        assert len(found_in(path)) == 24
        assert f"left out, hidden or of the system: {name}" in capsys.readouterr().out
    write_images(Path("nas/@nasa"), 12)  # a class may begin so
    assert len(found_in("nas")) == 36


def test_what_cannot_be_read_is_left_out_and_named(imgs, monkeypatch, capsys):
    walk = os.walk

    def refusing(root, onerror, followlinks):
        onerror(PermissionError(13, "Permission denied", "imgs/private"))
        return walk(root, onerror=onerror, followlinks=followlinks)

    monkeypatch.setattr(os, "walk", refusing)
    assert len(found_in("imgs")) == 24
    assert "left out, cannot be read: imgs/private" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_a_pipe_is_no_image_and_is_not_waited_for(imgs, capsys):
    os.mkfifo(imgs / "stream.png")
    assert len(common.load_images("imgs", 16)[0]) == 24
    assert "stream.png: not a regular file" in capsys.readouterr().out


def test_a_huge_member_of_a_zip_is_not_unpacked(imgs, monkeypatch, capsys):
    monkeypatch.setattr(common, "ZIP_MEMBER_BYTES", 10_000)
    with zipfile.ZipFile("imgs.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(imgs / "001.png")
        archive.writestr("bomb.png", bytes(10_001))
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: (imgs / "001.png").read_bytes())
    assert len(common.load_images("imgs.zip", 16)[0]) == 1
    assert "bomb.png: larger than 10,000 bytes" in capsys.readouterr().out


def test_names_reach_the_terminal_without_control_characters(imgs, capsys):
    (imgs / "\x1b[31mred.txt").touch()
    (imgs / "\x1b]0;title\x07.png").touch()
    common.load_images("imgs", 16)
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out
    assert "\\x1b[31mred.txt" in out and "\\x1b]0;title\\x07.png" in out
    assert common.error_summary(ValueError("a\x1bb")) == "a\\x1bb"


def test_names_that_lead_out_of_a_zip_are_said(imgs):
    with zipfile.ZipFile("up.zip", "w") as archive:
        archive.write(imgs / "001.png", "../imgs/001.png")
    with pytest.raises(common.UserError, match=r"no images in up.zip .*left out, .*\.\./imgs/001"):
        found_in("up.zip")


def test_a_cut_array_is_called_so():
    np.save("x.npy", np.zeros((50, 16, 16, 3), np.uint8))
    Path("cut.npy").write_bytes(Path("x.npy").read_bytes()[:9999])
    with pytest.raises(common.UserError, match="cut.npy is not a whole array"):
        common.load_images("cut.npy", 16)


# ----------------------------------------------------------------------------- flags and Python


@pytest.mark.parametrize(
    "flags",
    [
        {"path": ["cats", "dogs"]},
        {"augment": False},
        {"r1": False},
        {"flip": "yes"},
        {"epochs": 2.5},
        {"epochs": True},
    ],
)
def test_a_value_that_its_flag_cannot_take_is_refused(flags, imgs):
    with pytest.raises(common.UserError, match=next(iter(flags))):
        train(**{"path": "imgs"} | flags)
    assert not Path("runs").exists()
    with pytest.raises(common.UserError, match="hidden_g"):
        train_fcgan.train(path="imgs", hidden_g=[128, 256, 512])


def test_none_and_an_empty_label_take_a_saved_setting_back():
    for name in ("cats", "dogs"):
        write_images(Path("animals", name), 24)
    write_images(Path("flat"), 24)
    shutil.move("flat/more", "elsewhere")
    run = train(path="animals", label=["cats"])
    assert resume(run, path="flat", epochs=2, label=None) == run
    assert "--label" not in (run / "flags.txt").read_text()
    other = train(path="animals", label=["cats"], out="other")
    train_dcgan.train("--resume=other", "--path=flat", "--epochs=2", "--label")
    assert common.load_checkpoint(other)["config"]["label"] == []
    train_dcgan.train("--resume=other", "--epochs=3")


@pytest.mark.parametrize("label", ["@nasa", "-misc"])
def test_a_label_may_begin_like_a_flag_or_a_file(label):
    for name in (label, "other"):
        write_images(Path("feeds", name), 24)
    run = train(path="feeds", label=[label])
    train_dcgan.train(f"--resume={run}", "--epochs=2")
    again = train_dcgan.train(f"@{run}/flags.txt", "--out=again")
    assert common.load_checkpoint(again)["config"]["label"] == [label]


def test_a_script_needs_a_name_that_generate_finds(imgs):
    with pytest.raises(common.UserError, match="mygan.py: call it train_<name>.py"):
        common.training_parser("mygan.py", "", epochs=1, batch_size=2)


def test_p_is_0_when_augmentation_is_switched_off(imgs, monkeypatch):
    monkeypatch.setattr(train_dcgan, "ADA_TARGET", -2.0)  # p rises at each step
    run = train(path="imgs")
    assert common.load_checkpoint(run)["rows"][-1]["p"] > 0
    resume(run, epochs=2, augment="none")
    assert common.load_checkpoint(run)["rows"][-1]["p"] == 0


def test_auto_is_cuda_or_the_cpu_and_a_mac_is_told_of_mps(monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("mps"))
    assert common.choose_device("auto") == torch.device("cpu")
    assert "you may try --device mps" in capsys.readouterr().out
    assert common.memory_format("mps") == torch.contiguous_format
    assert common.memory_format("cpu") == common.memory_format("cuda:1") == torch.channels_last


def test_on_a_mac_batchnorm_gets_plainly_contiguous_input(monkeypatch):
    """Its gradients are wrong for channels_last there (pytorch#175189)."""
    net = nn.Sequential(nn.BatchNorm2d(3))
    monkeypatch.setattr(net, "to", lambda device, memory_format: net)
    args = types.SimpleNamespace(precision="fp32")
    common.prepare(net, torch.device("mps"), args)
    seen = []
    net[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].is_contiguous()))
    net(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last))
    assert seen == [True]


def test_samples_are_drawn_without_tf32_and_the_switches_come_back():
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        with common.deterministic_fp32():
            assert not torch.backends.cuda.matmul.allow_tf32
            assert not torch.backends.cudnn.allow_tf32 and torch.backends.cudnn.deterministic
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


# ------------------------------------------------------------------------------- a run's folder


def test_of_two_processes_that_resume_one_run_the_later_one_stops(imgs, monkeypatch):
    run = train(path="imgs")
    end_step = common.Run.end_step

    def meanwhile(self, stats):
        if self.step == 4:
            monkeypatch.setattr(common.Run, "end_step", end_step)
            resume(run, epochs=3, lrd=1e-5)  # the other process
            theirs.append((run / "checkpoint.pt").read_bytes())
        end_step(self, stats)

    theirs = []
    monkeypatch.setattr(common.Run, "end_step", meanwhile)
    with pytest.raises(common.UserError, match="another process trains this run"):
        resume(run, epochs=2)
    assert (run / "checkpoint.pt").read_bytes() == theirs[0]
    resume(run, epochs=4)


def test_out_is_a_folder_without_a_run_and_not_that_of_the_images(imgs):
    run = train(path="imgs", out="run")
    (run / "checkpoint.pt").unlink()
    before = (run / "generator_0001.pt").read_bytes()
    for flags in ({"out": "run"}, {"out": "run", "resume": True}):
        with pytest.raises(common.UserError, match="run holds a run"):
            train(path="imgs", **flags)
    assert (run / "generator_0001.pt").read_bytes() == before
    with pytest.raises(common.UserError, match="--out imgs is the folder of the images"):
        train(path="imgs", out="imgs")


def test_out_and_resume_need_the_checkpoint_only(imgs, capsys):
    run = train(path="imgs", out="run", epochs=1)
    (run / "flags.txt").unlink()
    assert train(path="imgs", out="run", resume=True, epochs=2) == run
    assert "epoch 1 to 2" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["a link to nowhere", "a file"])
def test_a_runs_that_is_no_folder_is_one_line(what, imgs):
    if what == "a file":
        Path("runs").write_text("")
    else:
        Path("runs").symlink_to("/mnt/not-mounted/runs")
    with pytest.raises(common.UserError, match="cannot make the folder runs/dcgan-imgs .*--out"):
        train(path="imgs")


def test_what_a_kill_left_in_mid_write_goes_at_a_later_start(imgs):
    run = train(path="imgs")
    old, new = run / ".checkpoint.pt.0123456789ab.part", run / "samples/.x.png.0123456789ab.part"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    later = time.time() + 1000
    os.utime(new, (later, later))  # another process may be writing it
    resume(run, epochs=2)
    assert not old.exists() and new.exists()


def test_a_file_is_no_run_to_resume(imgs):
    run = train(path="imgs")
    shutil.copy(run / "checkpoint.pt", "best.pt")
    for path in ("best.pt", run / "generator_0001.pt"):
        with pytest.raises(common.UserError, match=f"{path} is a snapshot or .*name a run's fold"):
            resume(path)
    resume(run / "checkpoint.pt", epochs=2)


def test_a_folder_may_have_a_dot_in_its_name():
    write_images(Path("faces.v2"), 24)
    shutil.make_archive("faces.v3", "zip", "faces.v2")
    assert train(path="faces.v2") == Path("runs/dcgan-faces.v2")
    assert train(path="faces.v3.zip") == Path("runs/dcgan-faces.v3")


def test_another_seed_restarts_the_epoch_and_says_so(imgs, capsys):
    run = train(path="imgs")
    resume(run, epochs=2, seed=7)
    warning = f"WARNING: {run} resumes with other images, batches or seed: its epoch restarts\n"
    assert capsys.readouterr().out.count(warning) == 1


def test_a_pillow_without_fonts_ends_no_run(imgs, monkeypatch, capsys):
    def no_font(*_):
        raise ImportError("The _imagingft C module is not installed")

    monkeypatch.setattr(ImageFont, "load_default", no_font)
    run = train(path="imgs")
    assert "WARNING: The _imagingft" in capsys.readouterr().out and run.exists()


# ------------------------------------------------------------------------------------ generate.py


def test_two_runs_of_one_name_do_not_draw_into_one_folder(imgs, monkeypatch, capsys):
    for folder in ("a", "b"):
        train(path="imgs", out=f"{folder}/dcgan-imgs")
    assert main(generate, monkeypatch, "--load_path=a/dcgan-imgs", "--img_num=2") == 0
    assert main(generate, monkeypatch, "--load_path=a/dcgan-imgs", "--img_num=2", "--seed=1") == 0
    assert main(generate, monkeypatch, "--load_path=b/dcgan-imgs", "--img_num=2") == 2
    error = capsys.readouterr().err
    assert "generated/dcgan-imgs has images of " in error and "pass another --save_path" in error


def test_an_exact_copy_is_at_distance_0():
    rng = np.random.default_rng(0)
    images = rng.integers(200, 256, (40, 64, 64, 3), dtype=np.uint8)
    neighbours, distances = generate.nearest_images(images[:30], images[::-1])
    assert (neighbours == images[:30]).all() and distances.max() < 1e-3


def test_many_small_images_are_not_synced_one_by_one(imgs, monkeypatch):
    train(path="imgs")
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    assert main(generate, monkeypatch, "--img_num=70") == 0
    assert len([*Path("generated/dcgan-imgs").glob("*.png")]) == 70 and len(synced) < 6


def test_the_scripts_open_images_in_known_formats_only():
    for path in ROOT.glob("*.py"):
        for line in path.read_text().splitlines():
            assert "Image.open(" not in line or "formats=" in line, (path.name, line)
