"""Helpers of common.py that the scripts share: average, latents, pixels."""

import numpy as np
import pytest
import torch
from torch import nn

import common


def test_ema_is_ramped_and_then_averages():
    G, G_ema = nn.Linear(1, 1), nn.Linear(1, 1)
    for step, decay in ((0, 1 / 40), (1, 2 / 41), (100_000, 0.999)):
        nn.init.constant_(G.weight, 3.0)
        nn.init.constant_(G_ema.weight, 1.0)
        common.update_ema(G_ema, G, step, 0.999)
        assert G_ema.weight.item() == pytest.approx(decay * 1 + (1 - decay) * 3)
    common.update_ema(G_ema, G, 100_000, 0.0)  # --ema 0 is the generator itself
    assert torch.equal(G_ema.weight, G.weight)


def test_the_average_has_the_buffers_of_g_but_batchnorms_are_its_own():
    """As of spectral normalisation: with stale ones its images would be other ones, silently."""
    torch.manual_seed(0)
    linear = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    G = nn.Sequential(linear, nn.BatchNorm1d(4), nn.Linear(4, 4))
    G_ema = common.averaged(G, "cpu")
    assert not G_ema.training and not any(p.requires_grad for p in G_ema.parameters())
    before = {name: buffer.clone() for name, buffer in G_ema.named_buffers()}
    for _ in range(3):
        G(torch.randn(8, 4))
    common.update_ema(G_ema, G, 0, 0.9)
    theirs = dict(G.named_buffers())
    assert any(name.startswith("0.") for name in theirs)
    for name, buffer in G_ema.named_buffers():
        assert torch.equal(buffer, before[name] if name.startswith("1.") else theirs[name]), name
        assert not torch.equal(before[name], theirs[name]), name


def test_refreshed_statistics_are_those_of_the_averages_own_images_and_touch_nothing_else():
    """Spectral normalisation's estimates must not move, nor dropout act, nor D's seed count."""
    torch.manual_seed(0)
    linear = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    G_ema = nn.Sequential(linear, nn.Dropout(0.5), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4))
    G_ema = common.averaged(G_ema, "cpu")
    latent = {"dim": 4, "distribution": "normal"}
    before = {name: value.clone() for name, value in G_ema.state_dict().items()}
    drawn, state = [], torch.get_rng_state()
    hook = G_ema[2].register_forward_pre_hook(lambda _, x: drawn.append(x[0]))
    common.refresh_batchnorm(G_ema, latent, 3)
    hook.remove()
    assert torch.equal(state, torch.get_rng_state()) and not G_ema.training
    assert not any(module.training for module in G_ema.modules())
    moved = {
        name for name, value in G_ema.state_dict().items() if not torch.equal(before[name], value)
    }
    assert moved == {f"2.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    torch.testing.assert_close(
        G_ema[2].running_mean, torch.stack([x.mean(0) for x in drawn]).mean(0)
    )
    torch.testing.assert_close(G_ema[2].running_var, torch.stack([x.var(0) for x in drawn]).mean(0))
    first = G_ema[2].running_mean.clone()
    assert len(torch.cat(drawn).unique(dim=0)) == 8 * common.CHUNK  # nothing drawn twice
    common.refresh_batchnorm(G_ema, latent, 3)
    assert torch.equal(G_ema[2].running_mean, first)
    common.refresh_batchnorm(G_ema, latent, 4)
    assert not torch.equal(G_ema[2].running_mean, first)


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_latents_depend_on_seed_and_number_alone(distribution):
    z = {"dim": 2000, "distribution": distribution}
    some = common.latents(z, 5, range(10))
    assert torch.equal(common.latents(z, 5, range(7, 10)), some[7:])
    assert not torch.equal(common.latents(z, 6, range(10)), some)
    assert some.std().item() == pytest.approx(1 if distribution == "normal" else 3**-0.5, rel=0.05)
    assert (some.abs().max() <= 1) == (distribution == "uniform")


def test_latents_with_a_class_end_in_its_one_hot_form():
    latent = {"dim": 5, "distribution": "normal", "classes": 3}
    z = common.latents(latent, 5, range(7))
    assert z.shape == (7, 8) and z[:, 5:].argmax(1).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert torch.equal(z[:, :5], common.latents(latent, 5, range(7), label=2)[:, :5])
    sevens = common.latents(latent, 5, range(7), label=2)[:, 5:]
    assert torch.equal(sevens, torch.tensor([0.0, 0, 1]).expand(7, -1))
    drawn = common.draw_latents(latent, 600)[:, 5:]
    assert set(drawn.unique().tolist()) == {0, 1} and (drawn.sum(1) == 1).all()
    assert (drawn.sum(0) > 150).all()
    chosen = common.draw_latents(latent, 3, label=torch.tensor([2, 0, 1]))
    assert chosen[:, 5:].argmax(1).tolist() == [2, 0, 1]


def test_pixels_are_rounded_to_the_nearest_level():
    """All 256 levels come back from [-1, 1] as they were, also when they are a little off."""
    levels = torch.arange(256.0).view(1, 1, 16, 16)
    for off in (0.0, 0.4, -0.4):
        pixels = common.to_uint8((levels + off) / 127.5 - 1)
        np.testing.assert_array_equal(pixels.ravel(), np.arange(256))
    beyond = torch.tensor([-1.5, 1.5, -1, 1]).view(1, 1, 2, 2)
    assert common.to_uint8(beyond).ravel().tolist() == [0, 255, 0, 255]
    colour = common.to_uint8(torch.tensor([1.0, -1.0, 0.2]).view(1, 3, 1, 1).expand(2, 3, 4, 5))
    assert colour.shape == (2, 4, 5, 3) and colour[0, 0, 0].tolist() == [255, 0, 153]


def test_generated_images_do_not_depend_on_their_neighbours():
    torch.manual_seed(0)
    G = nn.Sequential(nn.Linear(8, 48), nn.Unflatten(1, (3, 4, 4)), nn.Tanh())
    z = common.latents({"dim": 8, "distribution": "normal"}, 0, range(100))
    many = common.generate(G, z)
    assert many.shape == (100, 4, 4, 3)
    assert (common.generate(G, z[:3]) == many[:3]).all()
    assert (common.generate(G, z[64:65]) == many[64:65]).all()


def test_summary_counts_layers_and_parameters():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
    text = common.summary(net)
    assert "Conv2d(3, 8, kernel_size=(3, 3)" in text and "Linear(in_features=128" in text
    assert text.splitlines()[-1] == f"{3 * 8 * 9 + 8 + 128 * 2 + 2:,} parameters"
