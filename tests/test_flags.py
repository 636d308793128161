"""Every flag of every script, followed to the thing that it sets.

The flags are read from the parsers: one that has no check here fails. A check is a function named
after its flag; it trains tiny networks and looks at what the run made of the flag.
"""

import copy
import inspect
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image
from torch import nn

import common
import fid
import generate
import train_balanced
import train_dcgan
import train_fcgan

TRAINING_SCRIPTS = train_dcgan, train_fcgan, train_balanced
SMALL = {"path": "imgs", "image_size": 16, "z_dim": 8, "batch_size": 8, "epochs": 1}
SMALL |= {"device": "cpu", "precision": "fp32", "lrd": 0.01, "lrg": 0.01}
NETWORKS = {
    train_dcgan: {"width": 4},
    train_fcgan: {"hidden_g": "6,8", "hidden_d": "8,6"},
    train_balanced: {"width": 4, "margin": math.inf},
}
NOT_RANDOM = {  # no BatchNorm, no dropout, no augmentation: D answers the same at any time
    train_dcgan: {"norm": "none", "augment": "none", "init": "xavier"},
    train_fcgan: {"dropout": 0.0},
    train_balanced: {"dropout": 0.0},
}
ONE_STEP = {"batch_size": 24}  # all images


class FollowedRun(common.Run):
    """A run that keeps what it was given, what it began with, and all that passed through it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        FollowedRun.newest = self
        self.training_images = self.images
        self.first_nets = {name: copy.deepcopy(self.state[name]) for name in ("G", "D")}
        self.real_batches, self.index_batches = [], []
        self.random_states, self.step_stats = [], []

    def batches(self):
        for real in super().batches():
            self.real_batches.append(real.clone())
            self.index_batches.append(self.indices.clone())
            self.random_states.append(torch.get_rng_state())
            yield real

    def end_step(self, stats):
        self.step_stats.append({name: value.item() for name, value in stats.items()})
        super().end_step(stats)


class Training:
    """Trains a script with small settings and those of a check, and returns the followed run."""

    def __init__(self, script, monkeypatch, capsys):
        self.script, self.monkeypatch, self.capsys = script, monkeypatch, capsys
        monkeypatch.setattr(common, "Run", FollowedRun)
        monkeypatch.setattr(common, "GRID_IMAGES", 16)  # images of a grid: fewer are faster
        for name in ("save_curves", "save_gif"):  # slow, and no flag changes them
            monkeypatch.setattr(common, name, lambda *_, **__: None)

    def __call__(self, **flags):
        settings = SMALL | NETWORKS[self.script] | flags
        self.script.train(**{name: value for name, value in settings.items() if value is not None})
        return FollowedRun.newest


def flags_of(script):
    """The names of all flags of a script, but --help."""
    required = {fid: ["reference", "candidate"], generate: []}.get(script, ["--path=imgs"])
    args = script.get_args(required)
    return [name for name in vars(args) if name not in ("parser", "class_names")]


# ------------------------------------------------------------------------------------- utilities


def modules(net, kind):
    return [module for module in net.modules() if isinstance(module, kind)]


def slopes(net):
    return {layer.negative_slope for layer in modules(net, nn.LeakyReLU)}


def weights(net):
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def gradients(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def has_moved(run, name):
    return not torch.equal(weights(run.state[name]), weights(run.first_nets[name]))


def lr_of(run, optimizer):
    return float(run.state[optimizer].param_groups[0]["lr"])


def num_updates(run, optimizer):
    """How often an optimizer made a step, by its own count."""
    (count,) = {float(state["step"]) for state in run.state[optimizer].state.values()}
    return count


def saved_generator(run):
    """G as generate.py builds it from the run's folder."""
    return generate.load_generator(run.folder)[0]


def file_names(run, pattern):
    return sorted(path.name for path in run.folder.rglob(pattern))


def write_colours(folder, *colours, n=12):
    """Folders of n images of one colour each, named after it."""
    for colour in colours:
        Path(folder, colour).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (16, 16), colour).save(Path(folder, colour, f"{i}.png"))


def made_up_dataset(name, data_dir="data"):
    """As train_fcgan.read_dataset: 10 images of each class, whose number is their grey level."""
    size, channels = {"mnist": (28, 1), "cifar10": (32, 3)}[name]
    labels = np.repeat(np.arange(10), 10)
    images = np.broadcast_to(labels[:, None, None, None], (100, size, size, channels))
    return images.astype(np.uint8), labels


# -------------------------------------------------------------------- flags of all training scripts


def check_path(train):
    write_colours("data", "red", "blue")
    for colour, rgb in (("red", [255, 0, 0]), ("blue", [0, 0, 255])):
        run = train(path=f"data/{colour}")
        assert (run.training_images == rgb).all() and len(run.training_images) == 12
        assert all((torch.cat(run.real_batches) == 1).all((0, 2, 3)) == torch.tensor(rgb).bool())


def check_label(train):
    write_colours("data", "red", "green", "blue")
    run = train(path="data", label=["red", "blue"])
    assert len(run.training_images) == 24 and (run.training_images[..., 1] == 0).all()
    if train.script is train_fcgan:
        train.monkeypatch.setattr(train_fcgan, "read_dataset", made_up_dataset)
        run = train(path=None, image_size=None, label=["7"])
        assert run.training_images.shape == (10, 28, 28, 1) and (run.training_images == 7).all()


def check_image_size(train):
    for size in (16, 32):
        run = train(image_size=size)
        assert run.training_images.shape == (24, size, size, 3)
        assert run.real_batches[0].shape == (8, 3, size, size)
        assert saved_generator(run)(torch.zeros(2, 8)).shape == (2, 3, size, size)


def check_channels(train):
    write_images(Path("grey"), 24, "L")
    for path, channels, expected in (("imgs", "1", 1), ("grey", "3", 3), ("grey", "auto", 1)):
        run = train(path=path, channels=channels)
        assert run.training_images.shape == (24, 16, 16, expected)
        assert saved_generator(run)(torch.zeros(2, 8)).shape == (2, expected, 16, 16)


def check_flip(train):
    for flip in (False, True):
        run = train(flip=flip, epochs=2)
        real = common.to_uint8(torch.cat(run.real_batches))
        original = run.training_images[torch.cat(run.index_batches)]
        is_same = (real == original).all((1, 2, 3))
        is_mirrored = (real == original[:, :, ::-1]).all((1, 2, 3))
        assert (is_same | is_mirrored).all()
        assert 12 < is_mirrored.sum() < 36 if flip else not is_mirrored.any()


def check_epochs(train):
    run = train(epochs=3)  # of three steps each
    assert run.epoch == 3 and len(run.step_stats) == 9
    assert common.load_checkpoint(run.folder)["step"] == 9


def check_batch_size(train):
    run = train(batch_size=12)
    assert [len(real) for real in run.real_batches] == [12, 12]


def check_ema(train):
    """After one step G_ema is the mean of the first G and of G after it, by the decay."""
    run = train(**ONE_STEP, ema=0.01)
    before, after = weights(run.first_nets["G"]), weights(run.state["G"])
    expected = 0.01 * before + 0.99 * after
    assert (before - after).abs().median() > 1e-3
    torch.testing.assert_close(weights(run.state["G_ema"]), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(weights(saved_generator(run)), expected, rtol=0, atol=1e-6)


def check_seed(train):
    first, again, other = train(seed=1), train(seed=1), train(seed=2)
    for name in ("G", "D", "G_ema"):
        assert torch.equal(weights(first.state[name]), weights(again.state[name]))
    for name in ("G", "D"):
        assert not torch.equal(weights(first.first_nets[name]), weights(other.first_nets[name]))
    orders = [torch.cat(run.index_batches).tolist() for run in (first, again, other)]
    assert orders[0] == orders[1] != orders[2]
    for ours, same, another in zip(first.random_states, again.random_states, other.random_states):
        assert torch.equal(ours, same) and not torch.equal(ours, another)


def check_device(train):
    chosen, device = [], torch.device("cpu", 0)  # not equal to torch.device("cpu")
    train.monkeypatch.setattr(common, "choose_device", lambda name: chosen.append(name) or device)
    run = train(device="cuda:3")
    assert chosen == ["cuda:3"] and run.device == device


def check_precision(train):
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        run, dtypes = train(precision=precision), []
        for name, net_input in (("G", torch.zeros(4, 8)), ("D", torch.zeros(4, 3, 16, 16))):
            layer = modules(run.state[name], nn.Linear | nn.Conv2d)[0]
            layer.register_forward_hook(lambda *values: dtypes.append(values[2].dtype))
            run.state[name](net_input)
        assert dtypes == [dtype, dtype]
        assert all(p.dtype == torch.float32 for p in run.state["G"].parameters())


def check_graph(train):
    """On a GPU; the stand-in takes what a script gives to its recorder."""
    given, recorder = [], common.GraphedStep
    train.monkeypatch.setattr(common, "GraphedStep", lambda *how: given.append(how) or how[0])
    train.monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    for graph in (True, False):
        given.clear()
        train(graph=graph)
        steps = [recorder(step, torch.device("cuda", 0), args) for step, _, args in given]
        assert len(steps) > 0 and {step.is_enabled for step in steps} == {graph}


def check_checkpoint(train):
    run = train(epochs=5, checkpoint=2)
    expected = [f"generator_000{epoch}.pt" for epoch in (2, 4, 5)]
    assert file_names(run, "generator_*.pt") == expected


def check_sample_every(train):
    run = train(epochs=5, sample_every=2)
    expected = [f"epoch_000{epoch}.png" for epoch in (0, 2, 4, 5)]
    assert file_names(run, "epoch_*.png") == expected


def check_out(train):
    assert train(out="some/where").folder == Path("some/where")
    assert Path("some/where/checkpoint.pt").is_file() and not Path("runs").exists()
    assert train().folder == Path(f"runs/{train.script.__name__.removeprefix('train_')}-imgs")


def check_resume(train):
    first, other = train(out="first"), train(out="other", seed=1)
    run = train(resume="first", epochs=2)
    assert run.folder == Path("first") and len(run.step_stats) == 3 and run.step == 6
    for name in ("G", "D"):
        assert torch.equal(weights(run.first_nets[name]), weights(first.state[name]))
    for name in ("opt_d", "opt_g"):
        assert num_updates(run, name) == 6
    assert common.load_checkpoint("other")["step"] == other.step == 3


def check_tensorboard(train):
    pytest.importorskip("tensorboard", reason="an optional package")
    assert file_names(train(tensorboard=True), "events.out.tfevents.*")
    assert not file_names(train(), "events.out.tfevents.*")


# ------------------------------------------------------------------------- networks and their step


def check_z_dim(train):
    run = train(z_dim=5)
    assert run.header["z"]["dim"] == 5 == generate.load_generator(run.folder)[1]["dim"]
    assert modules(run.state["G"], nn.Linear)[0].in_features == 5


def check_width(train):
    run, kind = train(width=5, image_size=32), nn.Conv2d | nn.ConvTranspose2d
    inputs = [layer.in_channels for layer in modules(run.state["G"], kind)]
    assert inputs == [20, 10, 5]
    outputs = [layer.out_channels for layer in modules(run.state["D"], kind)]
    assert outputs == [5, 10, 20, 1]


def check_hidden_g(train):
    layers = modules(saved_generator(train(hidden_g="9,5,7")), nn.Linear)
    assert [layer.out_features for layer in layers] == [9, 5, 7, 3 * 16 * 16]


def check_hidden_d(train):
    layers = modules(train(hidden_d="9,5,7").state["D"], nn.Linear)
    assert [layer.out_features for layer in layers] == [9, 5, 7, 1]


def follow_rate(train, flag, optimizer, net):
    run = train(**{flag: 0.003})
    other = {"opt_d": "opt_g", "opt_g": "opt_d"}[optimizer]
    assert lr_of(run, optimizer) == pytest.approx(0.003)
    assert lr_of(run, other) == pytest.approx(0.01)
    run = train(**{flag: 0.0})
    moved = {name for name in ("G", "D") if has_moved(run, name)}
    assert moved == {"G", "D"} - {net}


def check_lrd(train):
    follow_rate(train, "lrd", "opt_d", "D")


def check_lrg(train):
    follow_rate(train, "lrg", "opt_g", "G")


def check_beta1(train):
    run = train(beta1=0.75)
    for name in ("opt_d", "opt_g"):
        assert run.state[name].param_groups[0]["betas"] == (0.75, 0.999)


def check_k(train):
    run = train(k=3, batch_size=4)
    assert [len(real) for real in run.real_batches] == [12, 12]
    assert num_updates(run, "opt_d") == 6 and num_updates(run, "opt_g") == 2


def check_one_sided(train):
    """(1 - s) log D + s log (1 - D) is less than log D by s times the logit."""
    still = ONE_STEP | NOT_RANDOM[train.script] | {"lrd": 0.0, "lrg": 0.0}
    runs = [train(**still, one_sided=s) for s in (0.0, 0.25)]
    with torch.no_grad():
        logits_real = runs[0].state["D"](runs[0].real_batches[0])
    losses = [run.step_stats[0]["loss_d"] for run in runs]
    assert losses[1] - losses[0] == pytest.approx(0.25 * logits_real.mean().item(), abs=1e-5)
    assert abs(logits_real.mean()) > 1e-3


def check_r1(train):
    """gamma / 2 times the penalty, times the steps from one to the next, is in D's gradients."""
    still = ONE_STEP | NOT_RANDOM[train.script] | {"lrd": 0.0, "lrg": 0.0}
    runs = [train(**still, r1=gamma) for gamma in (0.0, 3.0)]
    grads = [gradients(run.state["D"]) for run in runs]
    D = runs[0].first_nets["D"]
    penalty = train_dcgan.R1_INTERVAL * 3.0 / 2 * train_dcgan.r1_penalty(D, runs[0].real_batches[0])
    penalty_grads = torch.autograd.grad(penalty, [*D.parameters()], allow_unused=True)
    shapes = zip(penalty_grads, D.parameters())  # the last bias has no gradient
    expected = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in shapes])
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(grads[1] - grads[0], expected, rtol=1e-3, atol=1e-5)
    run = train(r1=3.0)  # what is not typed follows from it
    assert not modules(run.state["D"], nn.BatchNorm2d) and modules(run.state["G"], nn.BatchNorm2d)


def check_lr_decay(train):
    run = train(lr_decay=0.5, epochs=3, lrd=0.004, lrg=0.008)
    assert lr_of(run, "opt_d") == pytest.approx(0.001)
    assert lr_of(run, "opt_g") == pytest.approx(0.002)


def check_augment(train):
    for augment in ("need", "none"):
        run = train(augment=augment)
        part, images = run.state["augment"], run.real_batches[0]
        with torch.no_grad():
            part.p.fill_(0.5)
        assert torch.equal(part(images), images) == (augment == "none")
        assert (part.r_t.item() != 0) == (augment == "need")


def check_norm(train):
    is_dcgan = train.script is train_dcgan
    modulated = [("modulated", 2)] if is_dcgan else []
    for norm, expected in (("batch", 2), ("none", 0), *modulated):
        run, kind = train(norm=norm), nn.BatchNorm1d | nn.BatchNorm2d
        assert len(modules(saved_generator(run), kind)) == expected
        num_d = len(modules(run.state["D"], kind))
        assert num_d == (expected // 2 if is_dcgan else 0)
        if is_dcgan:
            for G in (saved_generator(run), run.state["G"]):
                assert (G.modulate is not None) == (norm == "modulated")


def check_alpha(train):
    run = train(alpha=0.3)
    assert slopes(run.state["D"]) == {0.3}
    slope_g = 0.0 if train.script is train_dcgan else 0.3
    assert slopes(run.state["G"]) == slopes(saved_generator(run)) == {slope_g}


def check_alpha_g(train):
    run = train(alpha_g=0.3)
    assert slopes(run.state["G"]) == slopes(saved_generator(run)) == {0.3}
    assert slopes(run.state["D"]) == {0.2}


def check_init(train):
    """Each layer's range follows from its own size, or all have a standard deviation of 0.02."""
    for init in ("normal", "xavier"):
        run = train(init=init)
        for net in run.first_nets.values():
            for layer in modules(net, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                weight = layer.weight
                bound = math.sqrt(6 / (sum(weight.shape[:2]) * weight[0, 0].numel()))
                is_xavier = 0.8 * bound < weight.abs().max() <= bound
                is_normal = 0.01 < weight.std() < 0.03
                assert (is_xavier, is_normal) == (init == "xavier", init == "normal")


def check_dropout(train):
    for p in (0.0, 0.35):
        run = train(dropout=p)
        assert {layer.p for layer in modules(run.state["D"], nn.Dropout)} in ({p}, {p} - {0.0})
        assert not modules(run.state["G"], nn.Dropout)


# ------------------------------------------------------------------------------------ FCGAN alone


def check_dataset(train):
    train.monkeypatch.setattr(train_fcgan, "read_dataset", made_up_dataset)
    for name, shape in (("mnist", (100, 28, 28, 1)), ("cifar10", (100, 32, 32, 3))):
        run = train(path=None, image_size=None, dataset=name)
        assert run.training_images.shape == shape and run.folder == Path(f"runs/fcgan-{name}")
    assert train(path="imgs", dataset="mnist").training_images.shape == (24, 16, 16, 3)


def check_data_dir(train):
    given = []

    def noting(name, data_dir="data"):
        given.append(data_dir)
        return made_up_dataset(name)

    train.monkeypatch.setattr(train_fcgan, "read_dataset", noting)
    train(path=None, image_size=None, data_dir="elsewhere"), train(path=None, image_size=None)
    assert given == ["elsewhere", "data"]


def check_flip_labels(train):
    """With the flag D's logit is that of "fake", and d_real stays the probability of "real"."""
    still = ONE_STEP | NOT_RANDOM[train.script] | {"lrd": 0.0, "lrg": 0.0}
    for flip_labels in (False, True):
        run = train(**still, flip_labels=flip_labels)
        with torch.no_grad():
            logits = run.state["D"](run.real_batches[0])
        expected = (-logits if flip_labels else logits).sigmoid().mean().item()
        assert run.step_stats[0]["d_real"] == pytest.approx(expected, abs=1e-6)
        assert abs(expected - 0.5) > 1e-3


# --------------------------------------------------------------------------------- balanced alone


def check_margin(train):
    """With rates of 0 the losses stay as far apart as they are: no margin below that suffices."""
    still = ONE_STEP | NOT_RANDOM[train.script] | {"lrd": 0.0, "lrg": 0.0, "max_extra": 3}
    stats = train(**still, margin=math.inf).step_stats[0]
    gap = abs(stats["loss_d"] - stats["loss_g"])
    for factor, expected in ((1.01, 0), (0.99, 3)):
        stats = train(**still, margin=factor * gap).step_stats[0]
        assert stats["extra_d"] + stats["extra_g"] == expected


def check_max_extra(train):
    still = ONE_STEP | NOT_RANDOM[train.script] | {"lrd": 0.0, "lrg": 0.0, "margin": 0.0}
    for max_extra in (0, 2, 5):
        run = train(**still, max_extra=max_extra)
        stats = run.step_stats[0]
        assert stats["extra_d"] + stats["extra_g"] == max_extra and stats["bound"] == 1
        total = num_updates(run, "opt_d") + num_updates(run, "opt_g")
        assert total == 2 + max_extra


CHECKS = {name.removeprefix("check_"): f for name, f in globals().items() if name[:6] == "check_"}
FLAGS = [(script, flag) for script in TRAINING_SCRIPTS for flag in flags_of(script)]


@pytest.mark.parametrize("script, flag", FLAGS, ids=[f"{s.__name__}-{flag}" for s, flag in FLAGS])
def test_a_flag_of_a_training_script_reaches_what_it_sets(script, flag, imgs, monkeypatch, capsys):
    assert flag in CHECKS, f"no test follows --{flag} of {script.__name__}.py"
    CHECKS[flag](Training(script, monkeypatch, capsys))


# ------------------------------------------------------------------------------------ generate.py


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs of two epochs each, "first" and "second", and their images."""
    folder = tmp_path_factory.mktemp("trained")
    write_images(folder / "imgs", 24)
    settings = SMALL | NETWORKS[train_dcgan] | {"path": folder / "imgs", "epochs": 2}
    for seed, name in enumerate(("first", "second")):
        train_dcgan.train(**settings, seed=seed, checkpoint=1, out=folder / name)
    return folder


class Drawing:
    """Runs generate.py for a small run unless another is named."""

    def __init__(self, trained, monkeypatch):
        self.run, self.other, self.monkeypatch = trained / "first", trained / "second", monkeypatch

    def __call__(self, **flags):
        settings = {"load_path": self.run, "img_num": 2, "device": "cpu", "save_path": "drawn"}
        words = [
            f"--{name}={value}" for name, value in (settings | flags).items() if value is not True
        ]
        words += [f"--{name}" for name, value in flags.items() if value is True]
        self.monkeypatch.setattr(sys, "argv", ["generate.py", *words])
        generate.main()

    def expect(self, run, n, seed=0, folder="drawn"):
        """The folder holds n images of a run with that seed, and no others."""
        expected = generate.sample(*generate.load_generator(run), range(n), seed)
        paths = sorted(Path(folder).glob("*.png"))
        assert [path.name for path in paths] == [f"seed{seed}_{i:06d}.png" for i in range(n)]
        for path, image in zip(paths, expected, strict=True):
            assert np.array_equal(np.asarray(Image.open(path)), image)


def draws_load_path(draw):
    draw(load_path=draw.other)
    draw.expect(draw.other, 2)
    draw(load_path=draw.run / "generator_0001.pt", save_path="early")
    draw.expect(draw.run / "generator_0001.pt", 2, folder="early")


def draws_img_num(draw):
    draw(img_num=5)
    draw.expect(draw.run, 5)


def draws_grid_size(draw):
    draw(grid_size=3)
    (path,) = Path().rglob("*grid*.png")
    images = generate.sample(*generate.load_generator(draw.run), range(9))
    common.save_grid(images, "expected.png", 3)
    assert path.read_bytes() == Path("expected.png").read_bytes()


def draws_save_path(draw):
    draw(save_path="some/where")
    draw.expect(draw.run, 2, folder="some/where")
    assert not Path("generated").exists()


def draws_seed(draw):
    draw(seed=5)
    draw.expect(draw.run, 2, seed=5)


def draws_device(draw):
    chosen = []
    cpu = torch.device("cpu")
    draw.monkeypatch.setattr(common, "choose_device", lambda name: chosen.append(name) or cpu)
    draw(device="cuda:3")
    assert chosen == ["cuda:3"]


def draws_label(draw):
    """A generator that is given five numbers of noise and one of three classes."""
    content = common.load_checkpoint(draw.run)
    z_spec = content["z"] | {"dim": 5, "classes": 3, "names": ["cats", "dogs", "owls"]}
    torch.save(content | {"z": z_spec}, "classes.pt")
    draw(load_path="classes.pt", label="dogs")
    G, z_spec = generate.load_generator("classes.pt")
    images = generate.sample(G, z_spec, range(2), label=1)
    for i, image in enumerate(images):
        assert np.array_equal(np.asarray(Image.open(f"drawn/seed0_00000{i}.png")), image)


def draws_interpolate(draw):
    draw()
    assert not [*Path().rglob("*interpolation*")]
    draw(interpolate=True)
    (animation,) = Path().rglob("*interpolation*.gif")
    assert Image.open(animation).n_frames > 20 and [*Path().rglob("*interpolation*.png")]


def draws_nearest(draw):
    write_colours("data", "red")
    draw()
    assert not [*Path().rglob("*nearest*")]
    draw(nearest="data", grid_size=1)
    (path,) = Path().rglob("*nearest*.png")
    pixels = np.asarray(Image.open(path))
    assert (pixels == [255, 0, 0]).all(2).sum() >= 16 * 16


DRAWS = {name.removeprefix("draws_"): f for name, f in globals().items() if name[:6] == "draws_"}


@pytest.mark.parametrize("flag", flags_of(generate))
def test_a_flag_of_generate_reaches_what_it_sets(flag, trained, monkeypatch):
    assert flag in DRAWS, f"no test follows --{flag} of generate.py"
    DRAWS[flag](Drawing(trained, monkeypatch))


# ----------------------------------------------------------------------------------------- fid.py


class Measuring:
    """Runs fid.py without its network, and notes what its parts are given, by name."""

    def __init__(self, trained, monkeypatch):
        self.run, self.monkeypatch = trained / "first", monkeypatch
        self.networks, self.statistics = [], []
        write_colours("data", "red", "blue")
        self.note("load_inception", self.networks, lambda _: (nn.Identity(), "random"))
        self.note("feature_stats", self.statistics, self.count)

    def note(self, name, notes, result):
        signature = inspect.signature(getattr(fid, name))

        def noting(*args, **kwargs):
            notes.append(signature.bind(*args, **kwargs).arguments)
            return result(notes[-1])

        self.monkeypatch.setattr(fid, name, noting)

    def count(self, given):
        given["images"] = [*given["images"]]
        return np.zeros(8), np.eye(8), len(given["images"])

    def __call__(self, *words, **flags):
        words = [*map(str, words), *(f"--{name}={value}" for name, value in flags.items())]
        self.monkeypatch.setattr(sys, "argv", ["fid.py", *words, "--device=cpu"])
        fid.main()

    def colours(self):
        return [tuple(given["images"][0][0, 0]) for given in self.statistics]


def measures_reference(measure):
    measure("data/blue", "data/red")
    assert measure.colours() == [(0, 0, 255), (255, 0, 0)]


measures_candidate = measures_reference


def measures_save_stats(measure):
    measure("data/red", save_stats="red.npz")
    stats = np.load("red.npz")
    assert np.array_equal(stats["sigma"], np.eye(8)) and stats["n"] == 12


def measures_all(measure):
    measure("data/red", measure.run, "--all", img_num=4)
    rows = (measure.run / "fid.csv").read_text().splitlines()
    names = [row.split(",")[0] for row in rows]
    assert names == ["snapshot", "generator_0001.pt", "generator_0002.pt"]


def measures_img_num(measure):
    measure("data/red", measure.run, img_num=7)
    assert [len(given["images"]) for given in measure.statistics] == [12, 7]


def measures_mode(measure):
    for mode in ("legacy", "clean"):
        measure.statistics.clear()
        measure("data/red", "data/blue", mode=mode)
        assert [given["mode"] for given in measure.statistics] == [mode, mode]


def measures_features(measure):
    for features in ("random", "inception"):
        measure("data/red", "data/blue", features=features)
        assert measure.networks[-1]["features"] == features


def measures_weights(measure):
    measure("data/red", "data/blue", weights="some.pth")
    assert str(measure.networks[-1]["weights"]) == "some.pth"


def measures_precision(measure):
    for precision in ("fp32", "bf16"):
        measure("data/red", "data/blue", precision=precision)
        assert measure.networks[-1]["precision"] == precision


def measures_batch_size(measure):
    measure("data/red", "data/blue", batch_size=3)
    assert [given["batch_size"] for given in measure.statistics] == [3, 3]


def measures_device(measure):
    chosen, device = [], torch.device("cpu", 0)
    measure.monkeypatch.setattr(common, "choose_device", lambda x: chosen.append(x) or device)
    measure("data/red", "data/blue")
    assert chosen == ["cpu"] and measure.networks[-1]["device"] == device


def measures_seed(measure):
    measure("data/red", measure.run, img_num=3, seed=4)
    expected = generate.sample(*generate.load_generator(measure.run), range(3), 4)
    assert np.array_equal(np.stack(measure.statistics[1]["images"]), expected)


def measures_data_dir(measure):
    given = []

    def noting(name, data_dir="data"):
        given.append((name, data_dir))
        return made_up_dataset(name)

    measure.monkeypatch.setattr(fid, "read_dataset", noting)
    measure("mnist", "data/red", data_dir="elsewhere")
    assert given == [("mnist", "elsewhere")]


MEASURES = {
    name.removeprefix("measures_"): f for name, f in globals().items() if "measures_" in name
}


@pytest.mark.parametrize("flag", flags_of(fid))
def test_a_flag_of_fid_reaches_what_it_sets(flag, trained, monkeypatch):
    assert flag in MEASURES, f"no test follows {flag} of fid.py"
    MEASURES[flag](Measuring(trained, monkeypatch))
