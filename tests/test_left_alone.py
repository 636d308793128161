"""A run that can be left alone: one process a folder, the same images, pictures in time, and words
instead of tracebacks or silence."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, write_images
from PIL import Image
from test_run import SMALL, read, run_main

import common
import fid
import generate
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
        assert f"another process trains in {folder}" in error
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


def test_resume_knows_its_images_by_names_and_sizes(imgs, capsys):
    run = train_dcgan.train(**SMALL | {"epochs": 2})
    first = min(imgs.glob("*.png"))
    content = first.read_bytes()
    first.rename(imgs / "renamed.png")
    with pytest.raises(common.UserError, match="24 images of other names or sizes"):
        train_dcgan.train(resume=run, epochs=4)
    (imgs / "renamed.png").rename(first)
    first.write_bytes(content + b"x")
    with pytest.raises(common.UserError, match="24 images of other names or sizes"):
        train_dcgan.train(resume=run, epochs=4)
    first.write_bytes(content)
    shutil.move("imgs", "elsewhere")  # the same images in another place are welcome
    train_dcgan.train(resume=run, path="elsewhere", epochs=3)
    write_images(Path("more"), 8)
    for path in Path("more").rglob("*.png"):
        shutil.copy(path, f"elsewhere/new-{path.name}")
    capsys.readouterr()
    train_dcgan.train(resume=run, epochs=4)  # 32 images, 4 steps an epoch: 9 to 16
    out = capsys.readouterr().out
    assert "32 images, 24 until now: epochs go by the new number" in out
    assert "step 9 to 16, 4 an epoch" in out


def test_fid_takes_the_classes_that_a_run_has_learned(monkeypatch, capsys):
    images, labels = common.read_dataset("glyphs")
    chosen = {"dataset": "glyphs", "label": [7], "epochs": 1, "image_size": 16, "width": 4}
    run = train_dcgan.train(**chosen)
    taken = []

    def noting(images, *_):
        taken.append(np.stack([*images]))
        return np.zeros(2048), np.eye(2048), len(taken[-1])

    monkeypatch.setattr(fid, "feature_stats", noting)
    call(monkeypatch, fid, "glyphs", run, "--features=random", "--img_num=4")
    assert len(taken[0]) == (labels == 7).sum() > 300 and len(taken[1]) == 4
    assert "only the classes that the run was trained on count: [7]" in capsys.readouterr().out


def test_a_name_with_a_slash_is_a_path_and_a_bare_one_the_data_set(monkeypatch, capsys):
    write_images(Path("glyphs"), 5)
    counted = []
    monkeypatch.setattr(
        fid,
        "feature_stats",
        lambda images, *_: (np.zeros(2048), np.eye(2048), counted.append(len([*images])) or 9),
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


def test_resume_takes_a_file_of_a_run_and_says_which_it_took(imgs, capsys):
    run = train_dcgan.train(**SMALL | {"epochs": 1})
    train_dcgan.train(resume=run / "generator_0001.pt", epochs=2)
    train_dcgan.train(resume=True, epochs=3)
    assert "runs/dcgan-imgs is the newest run of train_dcgan.py in runs/" in capsys.readouterr().out
    assert common.load_file(run / "checkpoint.pt")["step"] == 9


def test_a_lone_label_works_with_the_default_data_set(monkeypatch):
    images = np.zeros((20, 28, 28, 1), np.uint8), np.arange(20) % 10
    monkeypatch.setattr(common, "read_dataset", lambda *_: images)
    args = train_fcgan.get_args(["--label", "7"])
    assert len(common.load_data(args)[0]) == 2


# ----------------------------------------------------------------------------------------- pace


def test_about_a_hundred_grids_and_ten_snapshots_unless_typed(monkeypatch):
    write_images(Path("imgs"), 4)
    tiny = SMALL | {"batch_size": 4, "epochs": 230}
    run = train_dcgan.train(**tiny)
    assert 75 <= len(list(run.glob("samples/epoch_*.png"))) <= 101
    assert len(list(run.glob("generator_*.pt"))) == 10
    typed = train_dcgan.train(**tiny | {"epochs": 6}, sample_every=3, checkpoint=2)
    assert len(list(typed.glob("samples/epoch_*.png"))) == 3
    assert len(list(typed.glob("generator_*.pt"))) == 3


def test_the_latest_samples_come_by_the_clock(imgs, monkeypatch):
    monkeypatch.setattr(common, "LATEST", -1)  # seconds: at every step
    written, save_grid = [], common.save_grid
    monkeypatch.setattr(
        common, "save_grid", lambda i, p, *a: written.append(p.name) or save_grid(i, p, *a)
    )
    run = train_dcgan.train(**SMALL | {"epochs": 2})  # 6 steps
    assert written.count("latest.png") == 7 and written.count("epoch_0001.png") == 1
    grids = [(run / f"samples/{name}.png").read_bytes() for name in ("latest", "epoch_0002")]
    assert grids[0] == grids[1]


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


def test_a_gif_stays_below_its_limit_with_its_frames():
    noise = np.random.default_rng(0).integers(256, size=(12, 200, 200, 3), dtype=np.uint8)
    frames = [Image.fromarray(frame) for frame in noise]
    common.save_gif(frames, "small.gif", limit=100_000)
    assert Path("small.gif").stat().st_size < 100_000
    assert Image.open("small.gif").n_frames == 12
    common.save_gif(frames[:2], "whole.gif")
    assert Image.open("whole.gif").size == (200, 200)


def test_the_line_of_progress_fits_80_columns(imgs, capsys):
    train_dcgan.train(**SMALL | {"epochs": 20})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert "D(x) 0." in lines[-1] and "D(G(z)) 0." in lines[-1] and "/20, " in lines[-1]
    assert max(map(len, lines)) <= 80


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


def test_fid_of_all_snapshots_is_written_as_it_goes(imgs, monkeypatch):
    run = train_dcgan.train(**SMALL | {"epochs": 3})
    calls = []

    def stats(images, *_):
        calls.append(len([*images]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return np.zeros(2048), np.eye(2048), calls[-1]

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


@pytest.mark.parametrize("epochs", [2, 6])
def test_a_finished_run_says_so_and_is_left_as_it_is(imgs, epochs, capsys):
    run = train_dcgan.train(**SMALL)
    before = {path: path.read_bytes() for path in run.rglob("*.*")}
    capsys.readouterr()
    assert train_dcgan.train(resume=run, epochs=epochs) == run
    out = capsys.readouterr().out
    assert f"has reached epoch 6 of {epochs}: nothing to do. To go on: python train_dcgan.py" in out
    assert {path: path.read_bytes() for path in run.rglob("*.*")} == before


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
    for name in ("b.heic", "c.AVIF"):
        Path("imgs", name).touch()
    assert len(common.load_images("imgs", 16)) == 25
    assert "2 images are left out" in capsys.readouterr().out


def test_what_a_mac_puts_into_a_zip_is_no_image(imgs):
    with zipfile.ZipFile("imgs.zip", "w") as archive:
        for path in imgs.rglob("*.png"):
            archive.write(path)
            archive.writestr(f"__MACOSX/{path.parent}/._{path.name}", b"resource fork")
            archive.writestr(f"{path.parent}/._{path.name}", b"resource fork")
    assert len(common.load_images("imgs.zip", 16)) == 24


def test_floating_point_images_are_refused_with_the_reason(imgs):
    Image.fromarray(np.full((16, 16), 0.5, np.float32)).save("imgs/float.tif")
    assert len(common.load_images("imgs", 16)) == 24
    (notes,) = Path(".cache").glob("*.txt")
    assert "floating-point pixels have no fixed range" in notes.read_text()


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


def test_a_setting_that_cannot_be_saved_is_named_at_once(imgs):
    with pytest.raises(common.UserError, match=r"a\['b'\]\[1\] is of type float64"):
        common.save_file({"a": {"b": [1, np.float64(2)]}}, "x.pt")
    with pytest.raises(common.UserError, match="w shows more numbers than it holds"):
        common.save_file({"w": torch.zeros(1).expand(8)}, "x.pt")
    assert not Path("x.pt").exists()
