"""Helpers of common.py that the training scripts share: init, EMA, latents, augmentation."""

import copy

import pytest
import torch
from torch import nn

import common


def test_init_follows_dcgan_or_xavier():
    net = nn.Sequential(nn.Conv2d(64, 64, 4), nn.BatchNorm2d(4096), nn.Linear(512, 512))
    common.init_weights(net)
    conv, norm, linear = net
    assert conv.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert norm.weight.mean().item() == pytest.approx(1, abs=0.002)
    assert norm.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not conv.bias.any() and not norm.bias.any()
    common.init_weights(net, "xavier")
    assert linear.weight.abs().max().item() == pytest.approx((6 / 1024) ** 0.5, rel=0.01)


def test_ema_is_ramped_and_then_averages():
    G, G_ema = nn.Linear(1, 1), nn.Linear(1, 1)
    for step, decay in ((0, 0.1), (1, 2 / 11), (100_000, 0.999)):
        nn.init.constant_(G.weight, 3.0)
        nn.init.constant_(G_ema.weight, 1.0)
        common.update_ema(G_ema, G, step, 0.999)
        assert G_ema.weight.item() == pytest.approx(decay * 1 + (1 - decay) * 3)
    common.update_ema(G_ema, G, 100_000, 0.0)  # --ema 0 is the generator itself
    assert torch.equal(G_ema.weight, G.weight)


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_latents_depend_on_seed_and_number_alone(distribution):
    z = {"dim": 2000, "distribution": distribution}
    some = common.latents(z, 5, range(10))
    assert torch.equal(common.latents(z, 5, range(7, 10)), some[7:])
    assert not torch.equal(common.latents(z, 6, range(10)), some)
    assert some.std().item() == pytest.approx(1 if distribution == "normal" else 3**-0.5, rel=0.05)
    assert (some.abs().max() <= 1) == (distribution == "uniform")


def test_generated_images_do_not_depend_on_their_neighbours():
    torch.manual_seed(0)
    G = nn.Sequential(nn.Linear(8, 48), nn.Unflatten(1, (3, 4, 4)), nn.Tanh())
    z = common.latents({"dim": 8, "distribution": "normal"}, 0, range(100))
    many = common.generate(G, z)
    assert many.shape == (100, 4, 4, 3)
    assert (common.generate(G, z[:3]) == many[:3]).all()
    assert (common.generate(G, z[64:65]) == many[64:65]).all()


def images(n=200, size=16):
    return torch.rand(n, 3, size, size) + 1  # nowhere zero, so that what comes in can be seen


def test_translation_moves_whole_pixels_and_brings_in_zeros():
    x = images()
    moved = common.augment(x, "translation")
    offsets = set()
    for before, after in zip(x, moved):
        rows, columns = after[0].any(1).nonzero().ravel(), after[0].any(0).nonzero().ravel()
        down = rows[0].item() if rows[0] else rows[-1].item() - 15
        right = columns[0].item() if columns[0] else columns[-1].item() - 15
        offsets.add((down, right))
        back = torch.roll(after, (-down, -right), (1, 2))
        kept = back != 0
        assert torch.equal(back[kept], before[kept])
        assert kept[0].sum() == (16 - abs(down)) * (16 - abs(right))
    assert offsets == {(a, b) for a in range(-2, 3) for b in range(-2, 3)}  # an eighth of 16


def test_cutout_removes_at_most_a_square_of_half_the_side():
    x = images()
    holes = (common.augment(x, "cutout") == 0).all(1)
    assert torch.equal(common.augment(x, "cutout") != 0, ~holes[:, None].expand_as(x)) is False
    assert holes.sum((1, 2)).max() == 8 * 8 and holes.any(0).all()


def test_colour_changes_brightness_saturation_and_contrast_of_each_image_alike():
    x = images(size=8).requires_grad_()
    y = common.augment(x, "colour")
    level = y.mean((1, 2, 3)) - x.mean((1, 2, 3))
    assert level.abs().max() <= 0.5 + 1e-5 and level.std() > 0.2
    # the differences between pixels of one channel mean are scaled by the contrast alone
    contrast = y.mean(1).std((1, 2)) / x.mean(1).std((1, 2))
    assert contrast.min() >= 0.5 - 1e-4 and contrast.max() <= 1.5 + 1e-4 and contrast.std() > 0.2
    y.sum().backward()
    assert x.grad.abs().sum() > 0


def test_augmentation_none_is_the_identity_and_others_follow_the_seed():
    x = images(8)
    assert common.augment(x, "none") is x
    policy = ",".join(common.AUGMENT)
    torch.manual_seed(4)
    first = common.augment(x, policy)
    assert not torch.equal(first, common.augment(x, policy))
    torch.manual_seed(4)
    assert torch.equal(first, common.augment(x, policy))


def test_summary_counts_layers_and_parameters():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
    table = common.summary(net, torch.zeros(1, 3, 4, 4))
    assert "0 Conv2d" in table and "(1, 8, 4, 4)" in table and f"{3 * 8 * 9 + 8:,}" in table
    assert table.splitlines()[-1].split() == ["parameters", f"{3 * 8 * 9 + 8 + 128 * 2 + 2:,}"]
    before = copy.deepcopy(net.state_dict())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
