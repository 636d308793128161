"""The balance rule of train_balanced.py against a literal transcription; its networks and step."""

import itertools
import math
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import generate
import train_balanced
from train_balanced import Discriminator, Generator, UpsampleConv, balance, train, train_step

TINY = {"image_size": 16, "width": 2, "z_dim": 8, "batch_size": 8, "epochs": 2}


def settings(**changes):
    standard = {"z_dim": 8, "margin": 0.1, "max_extra": 4}
    return types.SimpleNamespace(**standard | changes)


def small_pair(device="cpu", lr=1e-3, fused=True, dropout=0.0):
    torch.manual_seed(1)
    with torch.device(device):
        G, D = Generator(16, 3, z_dim=8, width=2), Discriminator(16, 3, width=2, dropout=dropout)
    opt_d = torch.optim.Adam(D.parameters(), lr, (5e-4, 0.999), fused=fused)
    opt_g = torch.optim.Adam(G.parameters(), lr, (5e-4, 0.999), fused=fused)
    return G, D, opt_d, opt_g


def real_images(n=6):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


# --------------------------------------------------------------------------------------- the rule


def literal(loss_d, loss_g, update, margin, max_extra):
    """The lines of the design: a batch whose first two updates gave these losses."""
    updated = []
    loser = "D" if loss_d > loss_g else "G"  # chosen once
    while abs(loss_g - loss_d) > margin and len(updated) < max_extra:
        still = loss_d > loss_g if loser == "D" else loss_g > loss_d
        if not still:
            break
        if loser == "D":
            loss_d = update("D")
        else:
            loss_g = update("G")
        updated.append(loser)
    return "".join(updated)


def scripted(losses):
    left = iter(losses)
    return lambda *_: torch.tensor(next(left))


def run_both(loss_d, loss_g, losses, margin=0.1, max_extra=4):
    expected = literal(loss_d, loss_g, scripted(losses), margin, max_extra)
    called, update = [], scripted(losses)
    extra_d = lambda: (called.append("D"), update())[1]
    extra_g = lambda: (called.append("G"), update())[1]
    args = settings(margin=margin, max_extra=max_extra)
    counts = balance(torch.tensor(loss_d), torch.tensor(loss_g), extra_d, extra_g, args)
    assert "".join(called) == expected
    assert counts[:2] == (expected.count("D"), expected.count("G"))
    return expected, counts[2]


@pytest.mark.parametrize(
    ("loss_d", "loss_g", "losses", "expected", "bound"),
    [
        (0.7, 0.7, [], "", 0),  # a tie
        (0.7, 0.75, [], "", 0),  # within the margin
        (1.0, 0.5, [0.8, 0.55, 9], "DD", 0),
        (0.5, 1.0, [0.8, 0.55, 9], "GG", 0),
        (1.0, 0.5, [0.8, 0.2, 9], "DD", 0),  # the flip: now G has the higher loss
        (0.5, 1.0, [0.8, 0.2, 9], "GG", 0),
        (1.0, 0.5, [0.9, 0.9, 0.9, 0.9, 9], "DDDD", 1),  # the bound
        (1.0, 0.5, [0.9, 0.9, 0.9, 0.5, 9], "DDDD", 0),  # reached the margin with the last one
        (0.5, 1.0, [0.5], "G", 0),  # a tie after an update
        (math.nan, 0.5, [], "", 0),
        (0.5, math.nan, [], "", 0),
        (1.0, 0.5, [math.nan, 9], "D", 0),
        (math.inf, 0.5, [0.5], "D", 0),
    ],
)
def test_rule(loss_d, loss_g, losses, expected, bound):
    assert run_both(loss_d, loss_g, losses) == (expected, bound)


def test_rule_on_random_losses():
    source = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(300):
        losses = torch.rand(12, generator=source, dtype=torch.float64).float().tolist()
        for margin, max_extra in itertools.product((0.0, 0.1, 0.5, math.inf), (0, 1, 7)):
            expected, bound = run_both(losses[0], losses[1], losses[2:], margin, max_extra)
            seen.add((expected[:1], bound))
            assert not (margin == math.inf and expected)
    assert seen == {("", 0), ("", 1), ("D", 0), ("D", 1), ("G", 0), ("G", 1)}


# ---------------------------------------------------------------------------- networks and the step


@pytest.mark.parametrize(("before", "after", "side"), [(3, 2, 4), (4, 5, 8), (2, 1, 1)])
def test_upsampling_convolution_equals_the_plain_form(before, after, side):
    """Outputs and all gradients, in double precision, with every sum in another order."""
    torch.manual_seed(0)
    ours = UpsampleConv(before, after).double()
    plain = nn.Conv2d(before, after, 5, padding=2).double()
    plain.load_state_dict(ours.state_dict())
    h = torch.randn(3, before, side, side, dtype=torch.float64, requires_grad=True)
    h2 = h.detach().clone().requires_grad_()
    out, expected = ours(h), plain(F.interpolate(h2, scale_factor=2, mode="nearest"))
    torch.testing.assert_close(out, expected)
    weights = torch.randn(out.shape, dtype=torch.float64)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(h.grad, h2.grad)
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad)
    torch.testing.assert_close(ours.bias.grad, plain.bias.grad)


def test_the_published_layers_are_there():
    with torch.device("meta"):
        G, D = Generator(width=128), Discriminator(width=128)
        assert G(torch.zeros(2, 100)).shape == (2, 3, 64, 64)
        assert D(torch.zeros(2, 3, 64, 64)).shape == (2,)
    shapes = [tuple(p.shape) for name, p in G.named_parameters() if p.dim() > 1]
    assert shapes == [
        (16384, 100),
        (512, 1024, 5, 5),
        (256, 512, 5, 5),
        (128, 256, 5, 5),
        (3, 128, 5, 5),
    ]
    norms = [m.num_features for m in G.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert norms == [16384, 512, 256, 128]
    shapes = [tuple(p.shape) for p in D.parameters() if p.dim() > 1]
    published = [
        (128, 3, 5, 5),
        (256, 128, 5, 5),
        (512, 256, 5, 5),
        (1024, 512, 5, 5),
        (1, 1024, 4, 4),
    ]
    assert shapes == published and not any(isinstance(m, nn.BatchNorm2d) for m in D.modules())
    assert [m.p for m in D.modules() if isinstance(m, nn.Dropout)] == [0.2] * 4
    assert [m.negative_slope for m in D.modules() if isinstance(m, nn.LeakyReLU)] == [0.2] * 4


def test_the_published_recipe_by_flags():
    args = train_balanced.get_args(
        ["--path", "x", "--width", "128", "--lrd", "2e-5", "--lrg", "2e-5"]
    )
    assert (args.width, args.lrd, args.lrg, args.beta1) == (128, 2e-5, 2e-5, 5e-4)
    assert (args.batch_size, args.margin, args.dropout) == (50, 0.1, 0.2)
    assert (args.image_size, args.z_dim, args.epochs) == (64, 100, 200)
    assert train_balanced.get_args(["--path", "x", "--margin", "inf"]).margin == math.inf


def test_losses_are_means_of_binary_cross_entropy_per_image():
    G, D, opt_d, opt_g = small_pair(lr=0.0)
    torch.manual_seed(3)
    stats = train_step(G, D, opt_d, opt_g, real_images(), settings(margin=math.inf))
    torch.manual_seed(3)
    fake = G(torch.rand(6, 8) * 2 - 1)
    bce, ones = F.binary_cross_entropy_with_logits, torch.ones(6)
    both = bce(torch.cat([D(real_images()), D(fake)]), torch.cat([ones, 0 * ones]))
    torch.testing.assert_close(stats["loss_d"], both.detach())
    torch.testing.assert_close(stats["loss_g"], bce(D(fake), ones).detach())
    silent = Discriminator(16, 3, width=2, dropout=0.0)
    for p in silent.parameters():
        nn.init.zeros_(p)
    opt_d = torch.optim.Adam(silent.parameters(), 0.0)
    stats = train_step(G, silent, opt_d, opt_g, real_images(), settings())
    assert stats["loss_d"] == stats["loss_g"] == pytest.approx(math.log(2))
    assert stats["extra_d"] == stats["extra_g"] == stats["bound"] == 0


@pytest.mark.parametrize("behind", ["D", "G"])
def test_extra_updates_move_the_network_that_is_behind_alone(behind):
    """One whose rate is zero never catches up: its updates go on to the bound."""
    G, D, opt_d, opt_g = small_pair(lr=0.0)
    nn.init.constant_(D.layers[-1].bias, -3 if behind == "G" else 1)  # G is found out, or D fooled
    stats = train_step(G, D, opt_d, opt_g, real_images(), settings(max_extra=3))
    assert (stats["extra_d"], stats["extra_g"]) == ((3, 0) if behind == "D" else (0, 3))
    assert stats["bound"] == 1
    steps = [int(opt.state[opt.param_groups[0]["params"][0]]["step"]) for opt in (opt_d, opt_g)]
    assert steps == ([4, 1] if behind == "D" else [1, 4])


def test_extra_updates_see_the_same_images_and_latents():
    G, D, opt_d, opt_g = small_pair()
    nn.init.constant_(D.layers[-1].bias, -3)
    latents, seen = [], []
    G.register_forward_hook(lambda _, inputs, __: latents.append(inputs[0]))
    D.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach()))
    train_step(G, D, opt_d, opt_g, real_images(), settings(max_extra=2))
    assert len(latents) == 3 and all(torch.equal(latents[0], z) for z in latents)
    assert latents[0].abs().max() <= 1 and latents[0].min() < -0.5
    assert torch.equal(seen[0][:6], real_images()) and torch.equal(seen[0][6:], seen[1])
    assert len(seen) == 4 and not torch.equal(seen[1], seen[2])  # G has moved in between


def test_the_updates_wait_for_no_device():
    """On "meta" nothing has values; the comparison between them is the one that needs some."""
    G, D, opt_d, opt_g = small_pair("meta", fused=False, dropout=0.2)
    z, real = torch.rand(6, 8, device="meta") * 2 - 1, real_images().to("meta")
    both = train_balanced.update_both(G, D, opt_d, opt_g, real, z)
    stats = train_balanced.update_d(D, opt_d, real, both["fake"])
    stats |= train_balanced.update_g(G, D, opt_g, z)
    assert {*both} == {*stats, "fake"} and both["fake"].shape == real.shape
    assert all(value.shape == () for value in stats.values())
    for value in [*both.values(), *stats.values()]:
        assert value.is_meta and not value.requires_grad
    assert all(p.requires_grad for p in D.parameters())


@pytest.mark.parametrize("behind", ["D", "G"])
def test_the_updates_that_a_step_is_given_are_those_it_makes(behind):
    """As many times as it counts, with the arguments of the functions they stand for."""
    plain, given, called = small_pair(), small_pair(), []
    for pair in (plain, given):
        nn.init.constant_(pair[1].layers[-1].bias, -3 if behind == "G" else 1)

    def noting(update):
        return lambda *words: (called.append(update.__name__), update(*words))[1]

    args, stats = settings(max_extra=2, margin=0.0), []
    for pair, updates in ((plain, []), (given, [map(noting, train_balanced.UPDATES)])):
        torch.manual_seed(0)
        stats.append(train_step(*pair, real_images(), args, *updates))
    assert stats[0] == stats[1]
    assert {*stats[0]} == {"loss_d", "loss_g", "d_real", "d_fake", "d_fake_after"} | {
        *("extra_d", "extra_g", "bound")
    }
    again = f"update_{behind.lower()}"
    assert called == ["update_both", *[again] * int(stats[0][f"extra_{behind.lower()}"])]
    assert len(called) > 1
    for net, other in zip(plain[:2], given[:2]):
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))


def test_weights_begin_as_in_dcgan():
    G = Generator(32, width=32, z_dim=100)
    train_balanced.init_weights(G)
    linear, norm, _ = G.project
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.03) and not linear.bias.any()
    assert norm.weight.mean().item() == pytest.approx(1, abs=0.002)
    assert norm.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for layer in G.layers:
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert not layer.bias.any()


# ------------------------------------------------------------------------------------------- runs


def test_a_run_counts_extra_updates_and_says_when_they_do_not_suffice(imgs, capsys):
    run = train(path=imgs, **TINY, lrg=0.0, lrd=1e-2, margin=0.0, max_extra=2)
    header, *rows = (run / "metrics.csv").read_text().splitlines()
    columns = dict(zip(header.split(","), zip(*(map(float, row.split(",")) for row in rows))))
    own = {"loss_d", "loss_g", "d_real", "d_fake", "d_fake_after", "extra_d", "extra_g", "bound"}
    assert set(columns) == {*common.COLUMNS} | own
    assert max(columns["extra_g"]) == 2 and max(columns["bound"]) == 1
    out = capsys.readouterr().out
    assert "in most steps G stays behind D even with 2 extra updates: raise --lrg" in out
    assert generate.load_generator(run)[1] == {"dim": 8, "distribution": "uniform"}
    z = common.latents(generate.load_generator(run)[1], 0, range(99))
    assert z.abs().max() <= 1 and z.var() == pytest.approx(1 / 3, rel=0.2)
    calm = train(path=imgs, **TINY, margin=math.inf)
    assert "behind" not in capsys.readouterr().out
    assert Path(calm, "losses.png").stat().st_size > 1000


def test_a_balanced_run_resumes_to_the_same_bits(imgs):
    whole = train(path=imgs, **TINY, out="whole", margin=0.0)
    train(path=imgs, **TINY | {"epochs": 1}, out="parts", margin=0.0)
    train(resume="parts", epochs=2)
    a, b = (common.load_file(Path(run, "checkpoint.pt")) for run in (whole, "parts"))
    for name in ("G", "D", "G_ema"):
        assert all(torch.equal(a[name][key], b[name][key]) for key in a[name])
