"""Copies of train_dcgan.py with a few lines changed, from the first step to generated images.

Here is held what README, "Your own variant", and docs/adapt.md promise to such a copy. Each is
killed in mid-run with SIGKILL, resumed, and repeated with --config: both ends must have the same
bits. The class-conditional copy is made from the patch in docs/adapt.md. On a GPU, or the stand-in
for one, copies are trained with the graph and without.
"""

import csv
import difflib
import functools
import importlib.util
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gpu_first
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_fid import SmallNetwork
from test_run import assert_equal, assert_same_run

import common
import fid
import generate

SMALL = ["--image_size=16", "--width=4", "--z_dim=8", "--batch_size=8", "--epochs=3"]
END = "        run.end_step(stats)\n"  # the last line of the loop
STEPS, KILL = 9, 5  # of 24 images; the kill comes after the first epoch and within the second
FEW = """
import functools, os, signal, sys
import torch
import common
common.draw_glyphs = functools.partial(common.draw_glyphs, n=24, seed=11)
common.MINUTE = -1  # a checkpoint after every step, as each has a row
setup = common.setup
def alike(args):
    device = setup(args)
    torch.backends.cudnn.benchmark = False  # else processes may choose other kernels
    return device
common.setup = alike
"""
KILLED = f"""{FEW}
end_step = common.Run.end_step
def last(run, stats):
    end_step(run, stats)
    if run.step == {KILL}:
        os.kill(os.getpid(), signal.SIGKILL)
common.Run.end_step = last
"""


@pytest.fixture(autouse=True)
def workplace(imgs, monkeypatch):
    """The test's folder as a user's: copies of common.py and generate.py, 24 images or glyphs."""
    for name in ("common.py", "generate.py"):
        shutil.copy(ROOT / name, name)
    monkeypatch.setattr(generate, "__file__", str(Path("generate.py").resolve()))
    monkeypatch.setattr(common, "draw_glyphs", functools.partial(common.draw_glyphs, n=24, seed=11))
    setup, cudnn = common.setup, torch.backends.cudnn
    alike = lambda args: (setup(args), setattr(cudnn, "benchmark", False))[0]
    monkeypatch.setattr(common, "setup", alike)  # as in the processes started here


def adapt(changes, most, name="train_mine"):
    """Make a copy of train_dcgan.py with these texts replaced, in `most` lines; returns it."""
    before = after = (ROOT / "train_dcgan.py").read_text()
    for old, new in changes.items():
        assert before.count(old) == 1, old
        after = after.replace(old, new)
    matcher = difflib.SequenceMatcher(None, before.splitlines(), after.splitlines(), autojunk=False)
    changed = [max(b - a, d - c) for tag, a, b, c, d in matcher.get_opcodes() if tag != "equal"]
    assert sum(changed) <= most, f"{sum(changed)} changed lines"
    Path(f"{name}.py").write_text(after)
    spec = importlib.util.spec_from_file_location(name, f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(*words, code=0):
    """In a process of its own; a script on the stand-in for a GPU, where there is one here."""
    environment = os.environ.copy()
    if gpu_first.STANDIN and words[0].endswith(".py"):
        environment["PYTHONPATH"] = str(Path(gpu_first.STANDIN.__file__).parent)
        words = "-m", "standin_gpu", *words
    command = [sys.executable, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def train_until_killed(name, *flags):
    Path("killed.py").write_text(f"{KILLED}\nimport {name}\n{name}.train(*sys.argv[1:])")
    python("killed.py", *SMALL, *flags, code=-signal.SIGKILL)


def run_main(module, *argv):
    """As a command line; SystemExit in place of an exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
        module.main()


def take_through(mine, *flags):
    """Train, kill, --resume, --config, generate.py, with what must be so; returns the run."""
    data = [] if "--dataset=glyphs" in flags else ["--path=imgs"]
    train_until_killed(mine.__name__, *data, *flags)
    run = next(Path("runs").iterdir())
    assert common.load_file(run / "checkpoint.pt")["step"] == KILL
    assert mine.train("--resume") == run
    again = mine.train(f"--config={run}/config.ini")
    assert_same_run(run, again)
    assert common.load_file(run / "checkpoint.pt")["step"] == STEPS
    assert [int(row["step"]) for row in read(run / "metrics.csv")] == [*range(1, STEPS + 1)]
    run_main(generate, "--load_path", run, "--img_num=4")
    grid = np.asarray(Image.open(run / "samples/epoch_0003.png"))
    for number in range(4):
        single = Image.open(f"generated/{run.name}/seed0_{number:06d}.png")
        assert (np.asarray(single) == cell(grid, number)).all()
    assert panels(run) > 0
    return run


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def cell(grid, number, side=16):
    row, column = divmod(number, 8)
    top, left = 2 + row * (side + 2), 2 + column * (side + 2)
    return grid[top : top + side, left : left + side]


def panels(run):
    """The number of panels of losses.png; a curve is in each."""
    pixels = np.asarray(Image.open(run / "losses.png"))
    count, rest = divmod(len(pixels), 300)
    blue = (31, 119, 180)  # the first curve's, of common.COLOURS
    assert rest == 0 and all((panel == blue).all(2).any() for panel in np.split(pixels, count))
    return count


# ------------------------------------------------------------------------------------------- flags

FLAGS = {
    "import itertools\n": "import itertools\nfrom pathlib import Path\n",
    '    add("--z_dim"': """    add("--anneal", action="store_true")
    add("--warm-up", type=float)
    add("--sides", nargs=2, type=int)
    add("--notes", type=Path)
    add("--curve", choices=["line", "cosine"], default="line")
    add("--z_dim\"""",
}
TYPED = ["--anneal", "--warm-up=0.5", "--sides", "3", "4", "--notes=a b.txt", "--curve=cosine"]
OWN = ("anneal", "warm_up", "sides", "notes", "curve")


def own_values(args):
    return [getattr(args, name) for name in OWN]


@pytest.mark.parametrize("typed", [TYPED, []])
def test_any_flag_comes_back(typed):
    mine = adapt(FLAGS, most=6)
    wanted = (
        [True, 0.5, [3, 4], Path("a b.txt"), "cosine"] if typed else [False, *3 * [None], "line"]
    )
    assert own_values(mine.get_args([*typed, "--path=imgs"])) == wanted
    run = take_through(mine, *typed) if typed else mine.train(*SMALL, "--path=imgs")
    for again in (["--resume"], [f"--config={run}/config.ini"]):
        args = mine.get_args(again)
        assert own_values(args) == wanted and isinstance(args.notes, type(wanted[3]))
    args = mine.get_args([f"--config={run}/config.ini", "--sides", "5", "6", "--curve=line"])
    assert (args.sides, args.curve, args.warm_up) == ([5, 6], "line", wanted[1])


BY_HAND = {
    "norm = bach": "argument --norm: invalid choice: 'bach'",
    "curve = circle": "argument --curve: invalid choice: 'circle'",
    "anneal = maybe": "argument --anneal: write true or false",
    "warm_up = soon": "argument --warm-up: invalid float value: 'soon'",
    'sides = [3, "x"]': "argument --sides: invalid int value: 'x'",
}


def test_settings_of_own_flags_written_by_hand_are_checked():
    mine, ini = adapt(FLAGS, most=6), Path("hand.ini")
    ini.write_text("anneal = true\nwarm_up = 1e-3\nsides = [5, 6]\nnotes = b.txt\ncurve = cosine\n")
    args = mine.get_args([f"--config={ini}"])
    assert own_values(args) == [True, 0.001, [5, 6], Path("b.txt"), "cosine"]
    for line, message in BY_HAND.items():
        ini.write_text(line)
        with pytest.raises(common.UserError, match=re.escape(message)):
            mine.get_args([f"--config={ini}"])


# --------------------------------------------------------------------------- optimisers and losses

WGAN = {
    "        loss_d = loss_real.mean() + F.softplus(logits_fake).mean()\n":
    "        loss_d = logits_fake.mean() - logits_real.mean()\n",
    "    loss_g = F.softplus(-logits_fake_g).mean()\n": "    loss_g = -logits_fake_g.mean()\n",
}  # fmt: skip
CLIPPING = {
    "        opt_d.step()\n": """        opt_d.step()
        for p in D.parameters():
            p.data.clamp_(-0.01, 0.01)
""",
    "Adam(D.parameters(), args.lrd, (args.beta1, 0.999), fused=True)":
    "RMSprop(D.parameters(), args.lrd, momentum=0.5, centered=True)",
    "Adam(G.parameters(), args.lrg, (args.beta1, 0.999), fused=True)":
    "RMSprop(G.parameters(), args.lrg)",
}  # fmt: skip
PENALTY = {
    "def train_step(": '''def slope_penalty(D, real, fake):
    """How far D's slope between real and fake images is from 1 (Gulrajani et al., 2017)."""
    t = torch.rand(len(real), 1, 1, 1, device=real.device)
    images = (t * real + (1 - t) * fake).detach().requires_grad_()
    (slopes,) = torch.autograd.grad(D(images).sum(), images, create_graph=True)
    return (slopes.square().sum((1, 2, 3)).sqrt() - 1).square().mean()


def train_step(''',
    "        objective = loss_d\n":
    "        objective = loss_d + 10 * slope_penalty(D, seen, fake)\n",
    'norm="none" if args.r1 else args.norm, alpha=args.alpha)': 'norm="none", alpha=args.alpha)',
}  # fmt: skip


def test_wgan_with_rmsprop_resumes():
    mine = adapt(WGAN | CLIPPING, most=6)
    run = common.load_file(take_through(mine, "--lrd=5e-5", "--lrg=5e-5") / "checkpoint.pt")
    assert {*run["opt_d"]["state"][0]} == {"step", "square_avg", "momentum_buffer", "grad_avg"}
    assert all(p.abs().max() <= 0.01 for p in run["D"].values() if p.dim() == 4)


@pytest.mark.parametrize("rate", [4e-4, 0])
def test_a_critic_is_not_said_to_have_won(rate, monkeypatch, capsys):
    """Its loss may be negative, or below 0.1 in good health, or because it learns nothing."""
    mine = adapt(WGAN | PENALTY, most=12)
    run = take_through(mine) if rate else mine.train(*SMALL, "--path=imgs", "--lrd=0")
    monkeypatch.setattr(common, "PATIENCE", 20)
    longer = mine.train(f"--config={run}/config.ini", "--epochs=30", "--sample_every=30")
    losses = [float(row["loss_d"]) for row in read(longer / "metrics.csv")]
    assert any(loss < 0 for loss in losses) and len(losses) == 90
    assert rate or all(0 < loss < 0.1 for loss in losses[-25:])  # D with a sigmoid has won then
    assert "D has won" not in capsys.readouterr().out


LOOP = """    for real in run.batches():
        for opt, rate in ((opt_d, args.lrd), (opt_g, args.lrg)):
            opt.param_groups[0]["lr"] = rate * args.lr_decay**run.epoch
"""
SCHEDULE = """    state["falling"] = falling = torch.optim.lr_scheduler.CosineAnnealingLR(opt_g, 12)
    run = common.Run(args,"""


def test_a_schedule_of_rates_is_state_too():
    change = {"    run = common.Run(args,": SCHEDULE, LOOP: LOOP.splitlines(True)[0]}
    mine = adapt(change | {END: "        falling.step()\n" + END}, most=4)
    opt_g = common.load_file(take_through(mine) / "checkpoint.pt")["opt_g"]
    half = math.cos(math.pi * STEPS / 12)
    assert opt_g["param_groups"][0]["lr"] == pytest.approx(4e-4 * (1 + half) / 2)


# -------------------------------------------------------------------------------------- statistics

LAST = '        "p": augment.p.clone(),  # of each augmentation\n'


def more(n):
    lines = [f'        "own_{i}": logits_real.detach().mean() + {i},\n' for i in range(n)]
    return {LAST: LAST + "".join(lines)}


THEIRS = ["loss_d", "loss_g", "d_real", "d_fake", "d_fake_after", "p"]


def test_five_more_statistics_become_columns_and_curves():
    run = take_through(adapt(more(5), most=5))
    row = read(run / "metrics.csv")[-1]
    assert [*row] == [*common.COLUMNS, *THEIRS, *(f"own_{i}" for i in range(5))]
    means = [float(row[f"own_{i}"]) - i for i in range(5)]
    assert means == pytest.approx(5 * means[:1], abs=1e-5)
    assert panels(run) == 2 + 1  # losses, D's answers, the script's own; p is 0 throughout


def test_statistics_may_all_be_others():
    """None of the plain script's is left: no name is asked for."""
    source = (ROOT / "train_dcgan.py").read_text()
    old = source[source.index('        "loss_d": loss_d.detach()') : source.index(LAST)] + LAST
    mine = adapt({old: '        "critic": loss_d.detach(),\n'}, most=7)
    run = take_through(mine)
    assert [*read(run / "metrics.csv")[0]] == [*common.COLUMNS, "critic"] and panels(run) == 1


@pytest.mark.parametrize("first, then, curves", [({}, more(1), 2 + 1), (more(1), {LAST: ""}, 2)])
def test_statistics_may_come_and_go_before_resume(first, then, curves):
    adapt(first, most=1)
    train_until_killed("train_mine", "--path=imgs")
    before = Path("runs/mine-imgs/metrics.csv").read_text()
    mine = adapt(then, most=1)
    run = mine.train("--resume")
    whole = mine.train(f"--config={run}/config.ini")
    assert Path(run, f"metrics_to_{KILL}.csv").read_text() == before
    names = [*read(whole / "metrics.csv")[0]]
    for name, last in (f"metrics_to_{KILL}.csv", KILL), ("metrics.csv", STEPS):
        lines = [line.split(",") for line in Path(run, name).read_text().splitlines()]
        assert {len(line) for line in lines} == {len(lines[0])}
        assert int(lines[1][0]) == (1 if last == KILL else KILL + 1) and int(lines[-1][0]) == last
        assert (lines[0] == names) == (last == STEPS)
    assert panels(run) == curves
    a, b = (common.load_file(folder / "checkpoint.pt") for folder in (run, whole))
    assert_equal(a["G_ema"], b["G_ema"])


def test_no_row_is_lost_when_a_new_statistic_is_taken_back():
    """Killed after the change and before a checkpoint, then resumed without the change."""
    mine = adapt({}, most=0)
    train_until_killed("train_mine", "--path=imgs")
    changed = adapt(more(1), most=1)
    step, calls = changed.train_step, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise ArithmeticError
        return step(*arguments)

    changed.train_step = failing
    with pytest.raises(ArithmeticError):
        changed.train("--resume")
    run = mine.train("--resume")
    parts = [run / f"metrics_to_{KILL}.csv", run / "metrics.csv"]
    rows = [int(row["step"]) for path in parts if path.exists() for row in read(path)]
    assert rows == [*range(1, STEPS + 1)]


# -------------------------------------------------------------------------- what cannot be saved

NUMPY = {"import itertools\n": "import itertools\nimport numpy as np\n"}
ALPHA = '"alpha": args.alpha_g}\n'
NUMBER, SLOT = "Unsupported global: GLOBAL numpy", '"opt_g": opt_g, "augment": augment}\n'
CULPRITS = {  # torch tells the kind of what it refuses
    "generator_args": ({ALPHA: ALPHA.replace("}", '} | {"width": np.int64(args.width)}')}, NUMBER),
    "latent": (
        {'"distribution": "normal"}': '"distribution": "normal"} | {"dim": np.int64(8)}'},
        NUMBER,
    ),
    "state": (
        {SLOT: SLOT + "    augment.state_dict = lambda: {'p': itertools.count()}\n"},
        "Unsupported global: GLOBAL itertools.count",
    ),
}


@pytest.mark.parametrize("culprit", CULPRITS)
def test_what_cannot_be_saved_is_refused_before_the_first_step(culprit, monkeypatch, capsys):
    change, told = CULPRITS[culprit]
    mine = adapt(NUMPY | change, most=2)
    monkeypatch.setattr(mine, "train_step", lambda *_: pytest.fail("a step"))
    with pytest.raises(SystemExit) as exit:
        run_main(mine, *SMALL, "--path=imgs")
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("error: cannot save runs/mine-imgs/checkpoint")
    assert culprit in error and told in error and error.count("\n") == 1
    assert not Path("runs/mine-imgs/checkpoint.pt").exists()


# ------------------------------------------------------------------------------------ the average

SPECTRAL = {
    "import common\n": "import common\nfrom torch.nn.utils.parametrizations import spectral_norm\n",
    "self.project = nn.Linear(z_dim, 4 * 4 * self.widths[0], bias=bias)":
    "self.project = spectral_norm(nn.Linear(z_dim, 4 * 4 * self.widths[0], bias=bias))",
    "layers.append(nn.ConvTranspose2d(before, after, 4, 2, 1, bias=bias))":
    "layers.append(spectral_norm(nn.ConvTranspose2d(before, after, 4, 2, 1, bias=bias)))",
    "layers += [nn.ConvTranspose2d(self.widths[-1], channels, 4, 2, 1)]":
    "layers += [spectral_norm(nn.ConvTranspose2d(self.widths[-1], channels, 4, 2, 1))]",
}  # fmt: skip


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_spectral_norm_in_the_average_is_that_of_G(norm):
    mine = adapt(SPECTRAL, most=4)
    flags = f"--norm={norm}", "--lrg=0.01"
    run = (
        take_through(mine, *flags) if norm == "batch" else mine.train(*SMALL, "--path=imgs", *flags)
    )
    saved = common.load_file(run / "checkpoint.pt")
    spectral = [name for name in saved["G"] if re.search(r"\.0\._[uv]$", name)]
    assert len(spectral) == 2 * 3
    G = mine.Generator(**saved["generator_args"])
    G.load_state_dict(saved["G_ema"] | {name: saved["G"][name] for name in spectral})
    G.to(memory_format=torch.channels_last).eval()
    z = common.latents(saved["z"], 0, range(64))
    images = common.generate(generate.load_generator(run)[0], z)
    assert images.std() > 5 and (images == common.generate(G, z)).all()


Z = "    for real in run.batches():\n"
PICTURE = """        if {step} % run.steps_per_epoch == 0:
            common.refresh_batchnorm(G_ema, latent, args.seed)
            images = common.to_uint8(G_ema(z))
            common.save_grid(images, run.folder / f"samples/mine_{{{epoch}:04d}}.png")
"""
PLACES = {
    "after end_step": END + PICTURE.format(step="run.step", epoch="run.epoch"),
    "before end_step": PICTURE.format(step="(run.step + 1)", epoch="run.epoch + 1") + END,
}


@pytest.mark.parametrize("place", PLACES)
def test_G_ema_draws_the_runs_own_grid_wherever_it_is_refreshed(place):
    draw_z = "    z = common.latents(latent, args.seed, range(64)).to(device)\n"
    mine = adapt({Z: draw_z + Z, END: PLACES[place]}, most=5)
    if place == "after end_step":
        run = take_through(mine)
    else:  # one step an epoch: the samples of the epoch before have just used G_ema
        run = mine.train(*SMALL, "--path=imgs", "--batch_size=24")
    for epoch in (1, 2, 3):
        paths = [run / f"samples/{name}_{epoch:04d}.png" for name in ("mine", "epoch")]
        ours, theirs = map(Image.open, paths)
        assert ours.tobytes() == theirs.tobytes(), epoch


# ------------------------------------------------------------------------ classes: docs/adapt.md

DOC = (ROOT / "docs/adapt.md").read_text(encoding="utf-8")
(PATCH,) = re.findall(r"^```diff\n(.*?)^```", DOC, re.S | re.M)
COMMANDS = [shlex.split(line, comments=True) for line in re.findall(r"^    (\w+ .*)$", DOC, re.M)]
CLASSES = 12


def hunks():
    """{old: new} of the patch in docs/adapt.md."""
    changes = {}
    for hunk in re.split(r"^@@.*\n", PATCH, flags=re.M)[1:]:
        lines = [line or " " for line in hunk.splitlines()]
        old, new = ("".join(f"{x[1:]}\n" for x in lines if x[0] != sign) for sign in "+-")
        changes[old] = new
    return changes


def conditional():
    return adapt(hunks(), most=30, name="train_conditional")


def test_the_patch_of_the_document_applies_as_it_says():
    copy, patch, *run = COMMANDS
    assert copy == ["cp", "train_dcgan.py", "train_conditional.py"]
    assert patch == ["patch", "train_conditional.py", "docs/adapt.md"]
    assert {words[1] for words in run} == {"train_conditional.py", "generate.py", "fid.py"}
    conditional()
    if not shutil.which("patch"):
        pytest.skip("patch is not installed")
    shutil.copy(ROOT / "train_dcgan.py", "patched.py")
    subprocess.run(["patch", "patched.py", ROOT / "docs/adapt.md"], check=True)
    assert Path("patched.py").read_text() == Path("train_conditional.py").read_text()
    assert not Path("patched.py.rej").exists()


def test_classes_from_training_to_fid(monkeypatch, capsys):
    """A run, then the commands of docs/adapt.md."""
    mine = conditional()
    run = take_through(mine, "--dataset=glyphs")
    saved = common.load_file(run / "checkpoint.pt")
    latent = {"dim": 8, "distribution": "normal", "classes": CLASSES}
    assert saved["z"] == latent | {"names": [str(number) for number in range(CLASSES)]}
    G, z = generate.load_generator(run)
    noise = common.latents({"dim": 8, "distribution": "normal"}, 0, range(64))
    of = lambda label: torch.eye(CLASSES)[torch.as_tensor(label).expand(64)]
    wanted = lambda label: common.generate(G, torch.cat([noise, of(label)], 1))
    grid = np.asarray(Image.open(run / "samples/epoch_0003.png"))
    in_turn = wanted(torch.arange(64) % CLASSES)
    assert all((cell(grid, i) == in_turn[i]).all() for i in range(64))

    monkeypatch.setattr(fid, "Inception", SmallNetwork)
    measured = []
    monkeypatch.setattr(fid, "frechet_distance", lambda *stats: measured.append(stats[2]) or 7.0)
    output = {}
    for _, script, *flags in COMMANDS[2:-2]:
        if script == "train_conditional.py":
            flags += ["--epochs=2"] if "--resume" in flags else [*SMALL, "--epochs=1"]
        elif script == "fid.py":
            flags += ["--features=random", "--img_num=24"]
        capsys.readouterr()
        run_main({"generate.py": generate, "fid.py": fid}.get(script, mine), *flags)
        output[script] = capsys.readouterr().out
    assert "between glyphs (24 images) and runs/conditional-glyphs (24 i" in output["fid.py"]
    mu, *_ = fid.feature_stats(in_turn[:24], fid.load_inception("random")[0])
    assert (measured[0] == mu).all()
    assert "step 3 to 6" in output["train_conditional.py"]
    assert len([*Path("only_H").glob("*.png")]) == 64
    assert Path("from_H_to_H-interpolation.gif").exists()

    run_main(generate, "--load_path", run, "--label=3", "--save_path=of3", "--img_num=16")
    singles = [np.asarray(Image.open(f"of3/seed0_{i:06d}.png")) for i in range(16)]
    assert (np.stack(singles) == wanted(3)[:16]).all() and (wanted(3) != wanted(4)).any()
    with pytest.raises(SystemExit):
        run_main(generate, "--load_path", run, "--label=12")
    assert "--label 12: the classes of these images are 0 0, 1 1," in capsys.readouterr().err


def write_animals():
    """animals/cats, dogs and owls, 8 plain images each; returns {name: their grey levels}."""
    levels = {"cats": range(0, 80, 10), "dogs": range(80, 160, 10), "owls": range(160, 240, 10)}
    for name, its in levels.items():
        Path("animals", name).mkdir(parents=True)
        for level in its:
            Image.new("L", (16, 16), level).save(f"animals/{name}/{level}.png")
    return levels


@pytest.mark.parametrize("chosen", [[], ["owls", "cats"], ["1"]])
def test_subfolders_are_classes_and_their_names_travel(chosen, capsys):
    levels, mine, seen = write_animals(), conditional(), []
    step = mine.train_step
    mine.train_step = lambda *given: (seen.append(given[5:7]), step(*given))[1]
    train, draw = (words[2:] for words in COMMANDS[-2:])
    label = ["--label", *chosen] if chosen else []
    run_main(mine, *train, *SMALL, "--no-graph", "--k=2", "--batch_size=4", *label)
    (run,) = Path("runs").iterdir()
    names = {0: [*levels], 1: ["dogs"], 2: ["cats", "owls"]}[len(chosen)]
    G, z = generate.load_generator(run)
    assert (z["names"], z["classes"]) == (names, len(names))
    for real, y in seen:
        shades = ((real[:, 0, 0, 0] + 1) * 127.5).round().long().tolist()
        assert all(shade in levels[names[k]] for shade, k in zip(shades, y.argmax(1)))
    capsys.readouterr()
    assert draw == ["--label", "cats"]
    if "cats" not in names:
        with pytest.raises(SystemExit):
            run_main(generate, *draw)
        assert "--label cats: the classes of these images are 0 dogs" in capsys.readouterr().err
        draw = ["--label", "dogs"]
    run_main(generate, *draw)
    of_it = generate.sample(G, z, range(16), label=0)
    for number, image in enumerate(of_it):
        single = np.asarray(Image.open(f"generated/{run.name}/seed0_{number:06d}.png"))
        assert (single.reshape(image.shape) == image).all()


@pytest.mark.parametrize("label", [None, 3])
def test_interpolations_go_from_class_to_class_or_stay(label):
    run = conditional().train(*SMALL, "--dataset=glyphs", "--epochs=1")
    flags = [] if label is None else [f"--label={label}"]
    run_main(generate, "--load_path", run, "--img_num=9", "--interpolate", *flags)
    G, z = generate.load_generator(run)
    ends = generate.sample(G, z, range(9), label=label).astype(int)
    grid = np.asarray(Image.open(f"generated/{run.name}-interpolation.png")).astype(int)
    rows, columns = (side // 18 for side in grid.shape[:2])
    ways = grid[2:, 2:].reshape(rows, 18, columns, 18, 3).swapaxes(1, 2)[:, :, :16, :16]
    assert np.abs(ways[:, 0] - ends[:-1]).max() <= 1 and np.abs(ways[:, -1] - ends[1:]).max() <= 1
    assert np.abs(ways[:, 0] - ways[:, -1]).max() > 1


def test_only_images_with_classes(capsys):
    with pytest.raises(SystemExit):
        run_main(conditional(), *SMALL, "--path=imgs")
    assert "images without classes: a subfolder for each, or --dataset" in capsys.readouterr().err


def assert_classes_fit(seen, kinds):
    """Of batches (N, C, H, W) and their one-hot classes: each image once, as its pixels say."""
    images, labels = common.draw_glyphs(16)
    class_of = {x.tobytes(): label for x, label in zip(images, labels) if label in kinds}
    pixels = [x.tobytes() for real, _ in seen for x in common.to_uint8(real)]
    assert sorted(pixels) == sorted(class_of)
    assert [kinds[k] for _, y in seen for k in y.argmax(1)] == [class_of[x] for x in pixels]
    assert all((y.sum(1) == 1).all() and y.shape[1] == len(kinds) for _, y in seen)


@pytest.mark.parametrize("kinds", [[*range(CLASSES)], [1, 6, 7]])
def test_each_image_comes_with_its_class(kinds):
    mine, seen = conditional(), []
    step = mine.train_step

    def noting(*arguments):
        seen.append(arguments[5:7])  # the images and their classes
        return step(*arguments)

    mine.train_step = noting
    flags = [*SMALL, "--dataset=glyphs", "--epochs=2", "--k=2", "--batch_size=2", "--no-graph"]
    flags += ["--label", *map(str, kinds)] if len(kinds) < CLASSES else []
    run = mine.train(*flags)
    assert generate.load_generator(run)[1]["classes"] == len(kinds)
    assert len(seen) % 2 == 0
    for epoch in seen[: len(seen) // 2], seen[len(seen) // 2 :]:
        assert_classes_fit(epoch, kinds)


WORKER = f"""{FEW}
import train_conditional
step, calls = train_conditional.train_step, []
def noting(*arguments):
    torch.save(arguments[5:7], f"seen-{{len(calls)}}-{{common.RANK}}.pt")
    calls.append(1)
    return step(*arguments)
train_conditional.train_step = noting
with common.exit_codes():
    train_conditional.train(*sys.argv[1:])
"""


def test_each_image_comes_with_its_class_in_two_processes():
    conditional()
    Path("worker.py").write_text(WORKER)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "worker.py"]
    flags = [*SMALL, "--dataset=glyphs", "--epochs=2", "--k=2", "--batch_size=6", "--device=cpu"]
    python(*torchrun, *flags)
    batches = [torch.load(f"seen-{i}-{rank}.pt") for i in range(4) for rank in range(2)]
    assert all(len(real) == len(y) == 6 for real, y in batches)
    assert_classes_fit(batches[:4], [*range(CLASSES)])  # an epoch
    assert_classes_fit(batches[4:], [*range(CLASSES)])


# ------------------------------------------------------------- on a GPU: recorded or said why not

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no GPU here, nor the stand-in for one: -p standin_gpu with ../shared/gpu on PYTHONPATH",
)
CALL = "        stats = step(G, D, opt_d, opt_g, augment, real, penalize, args)\n"
SIGNATURE = "augment, real, penalize, args):\n"
ALSO = "augment, real, penalize, args, weight):\n"  # one argument more
FIRST = "layers = norm_layer(norm, self.widths[0]) + [nn.LeakyReLU(alpha, inplace=True)]\n"
LOSS_G = "    loss_g = F.softplus(-logits_fake_g).mean()\n"
BACKWARD = "        objective.backward()\n"
DRAWN = "torch.randn(len(x), args.z_dim, device=x.device)"
ADAM = "torch.optim.Adam({}.parameters(), args.{}, (args.beta1, 0.999), fused=True)"
ADAMS = [ADAM.format("D", "lrd"), ADAM.format("G", "lrg")]


def optimizers(text):
    return {adam: text.format(*pair) for adam, pair in zip(ADAMS, (("D", "lrd"), ("G", "lrg")))}


def call(before, argument=""):
    return {CALL: f"        {before}\n" + CALL.replace("args)", f"args{argument})")}


def weighed(weight):
    """G's loss times a weight."""
    return {LOSS_G: LOSS_G.replace("F.", f"{weight} * F.")}


def given(value):
    return weighed("weight") | {SIGNATURE: ALSO} | call(f"weight = {value}", ", weight")


GROWS, ON_DEVICE = "1 + run.step / 2", "torch.full((), 1 + run.step / 2, device=device)"
CHANGES = "{} changes between calls: make it a 0-d tensor"
IMPORT = "import common\n"
# what is changed in the script, and why it cannot be recorded; None: it can, and is
COPIES = {
    "nothing": ({}, None),
    "an argument that grows": (given(GROWS), CHANGES.format("weight")),
    "an argument that is a numpy number": (
        {"import sys\n": "import sys\nimport numpy as np\n"} | given(f"np.float32({GROWS})"),
        CHANGES.format("weight"),
    ),
    "an attribute of args that grows": (
        weighed("args.weight") | call(f"args.weight = {GROWS}"),
        CHANGES.format("weight"),
    ),
    "a global that grows": (
        weighed("WEIGHT") | {"TARGET, MOST": "WEIGHT = 1.0\nTARGET, MOST"}
        | call(f'globals()["WEIGHT"] = {GROWS}'),
        CHANGES.format("WEIGHT"),
    ),
    "a global of a helper that grows": (
        {LOSS_G: "    loss_g = loss_of(logits_fake_g)\n",
         "TARGET, MOST": "WEIGHT = 1.0\n\n\ndef loss_of(logits):\n"
         "    return WEIGHT * F.softplus(-logits).mean()\n\n\nTARGET, MOST"}
        | call(f'globals()["WEIGHT"] = {GROWS}'),
        CHANGES.format("WEIGHT"),
    ),
    "a number in a buffer's place": (
        weighed("augment.weight") | call(f"augment.weight = {GROWS}"),
        CHANGES.format("weight"),
    ),
    "a tensor on the GPU that grows": (given(ON_DEVICE), None),
    "a tensor on the CPU that grows": (given(f"torch.tensor({GROWS})"), None),
    "a tensor in args, new each step": (
        weighed("args.weight") | call(f"args.weight = {ON_DEVICE}"),
        CHANGES.format("weight"),
    ),
    "a tensor in args, on the CPU, refilled": (
        weighed("args.weight") | {Z: "    args.weight = torch.tensor(1.0)\n" + Z}
        | call(f"args.weight.fill_({GROWS})"),
        CHANGES.format("weight"),
    ),
    "a tensor in args, on the GPU, refilled": (
        weighed("args.weight") | {Z: "    args.weight = torch.ones((), device=device)\n" + Z}
        | call(f"args.weight.fill_({GROWS})"),
        None,
    ),
    "True and False by turns": (
        weighed("(3 if weight else 1)") | {SIGNATURE: ALSO}
        | call("weight = run.step % 3 == 0", ", weight"),
        None,
    ),
    ".item() in the step": ({LOSS_G: LOSS_G + "    loss_g = loss_g * loss_d.item()\n"}, ""),
    "a number drawn on the CPU": (
        {LOSS_G: LOSS_G + "    loss_g = loss_g * (1 + torch.rand(1).item())\n"}, "",
    ),
    "noise drawn on the CPU": ({DRAWN: "torch.randn(len(x), args.z_dim).to(x.device)"}, ""),
    "a branch on a tensor": (
        {LOSS_G: LOSS_G + "    if loss_d > 1:\n        loss_g = 2 * loss_g\n"}, "",
    ),
    "SGD": (optimizers("torch.optim.SGD({}.parameters(), args.{}, momentum=0.5)"), None),
    "RMSprop": (optimizers("torch.optim.RMSprop({}.parameters(), args.{})"), None),
    "Adam, not fused": (optimizers("torch.optim.Adam({}.parameters(), args.{})"), None),
    "Adagrad, which counts on the CPU": (
        optimizers("torch.optim.Adagrad({}.parameters(), args.{}, lr_decay=0.1)"), "",
    ),
    "dropout in G": (
        {FIRST: FIRST.replace("[nn", "[nn.Dropout(0.3), nn")},
        None,
    ),
    "spectral norm in G": (SPECTRAL, None),
    "clipped gradients": (
        {BACKWARD: BACKWARD + "        nn.utils.clip_grad_norm_(D.parameters(), 0.5)\n"}, None,
    ),
}  # fmt: skip
FALLING = {  # with --lr_decay 0.5: a rate that the step reads as a number cannot change
    "nothing": None,
    "SGD": CHANGES.format("lr"),
    "RMSprop": None,
    "Adam, not fused": None,
}


def replayed():
    return gpu_first.STANDIN.counts()["replays"] if gpu_first.STANDIN else math.nan


def assert_close(a, b):
    """The weights of two runs: on the stand-in graphs differ by rounding."""
    a, b = (common.load_file(Path(run, "checkpoint.pt")) for run in (a, b))
    assert a["step"] == b["step"]
    for net in ("G", "D", "G_ema"):
        for name, value in a[net].items():
            torch.testing.assert_close(value, b[net][name], rtol=0, atol=1e-5)


def recorded_and_plain(mine, why, out, *flags):
    """Train with the graph, in two parts too, and without: all end alike. Returns the runs."""
    flags = [*SMALL, "--epochs=4", "--precision=fp32", "--device=cuda", *flags]
    flags += [] if "--dataset=glyphs" in flags else ["--path=imgs"]
    before, steps = replayed(), 12
    graph = mine.train(*flags, "--out=graph")
    times = replayed() - before
    lines = [line for line in out().splitlines() if "no CUDA graph" in line]
    if why is None:
        assert lines == [] and (times > steps / 3 or not gpu_first.STANDIN)
    else:
        (line,) = lines
        assert line.startswith("WARNING: no CUDA graph of train_step") and why in line
        assert len(line.partition("as long: ")[2]) > 20  # a reason
        assert times == 0 or not gpu_first.STANDIN
    before = replayed()
    plain = mine.train(*flags, "--out=plain", "--no-graph")
    assert replayed() == before or not gpu_first.STANDIN
    assert "no CUDA graph" not in out()
    assert_close(graph, plain)
    parts = mine.train(*flags, "--out=parts", "--epochs=2")
    mine.train(f"--resume={parts}", "--epochs=4")
    assert_same_run(graph, parts)
    return graph, plain


@needs_gpu
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_ends_as_its_plain_form_recorded_or_not(name, capsys):
    change, why = COPIES[name]
    recorded_and_plain(adapt(change, most=9), why, lambda: capsys.readouterr().out)


@needs_gpu
@pytest.mark.parametrize("name", FALLING)
def test_a_falling_rate_is_read_by_the_graph_or_ends_it(name, capsys):
    out = lambda: capsys.readouterr().out
    recorded_and_plain(adapt(COPIES[name][0], most=6), FALLING[name], out, "--lr_decay=0.5")


@needs_gpu
def test_the_conditional_copy_is_recorded_with_and_without_its_penalty(capsys):
    out = lambda: capsys.readouterr().out
    recorded_and_plain(
        conditional(), None, out, "--dataset=glyphs", "--r1=0", "--k=2", "--batch_size=4"
    )
    shutil.rmtree("graph"), shutil.rmtree("plain"), shutil.rmtree("parts")
    mine = conditional()
    mine.R1_EVERY = 2
    flags = "--dataset=glyphs", "--r1=1", "--augment=need", "--flip"
    recorded_and_plain(mine, None, out, *flags)


@needs_gpu
@pytest.mark.parametrize("name", ["Adam, not fused", "RMSprop"])
def test_a_run_goes_from_plain_to_recorded_and_back(name):
    """The state of an optimizer lies where each form wants it."""
    mine = adapt(COPIES[name][0], most=2)
    flags = [*SMALL, "--path=imgs", "--precision=fp32", "--device=cuda"]
    plain = mine.train(*flags, "--out=plain", "--no-graph", "--epochs=6")
    for first, then in (("--no-graph", "--graph"), ("--graph", "--no-graph")):
        run = mine.train(*flags, f"--out=run{first}", first, "--epochs=3")
        before = replayed()
        mine.train(f"--resume={run}", then, "--epochs=6")
        assert (replayed() - before > 0) == (then == "--graph") or not gpu_first.STANDIN
        assert_close(plain, run)
