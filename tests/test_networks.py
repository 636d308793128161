"""Helpers of common.py that the scripts share: average, latents, augmentation, pixels."""

import numpy as np
import pytest
import torch
from torch import nn

import common


def test_ema_is_ramped_and_then_averages():
    G, G_ema = nn.Linear(1, 1), nn.Linear(1, 1)
    for step, decay in ((0, 0.1), (1, 2 / 11), (100_000, 0.999)):
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


# ---------------------------------------------------------------------------------- augmentation


def images(n=200, size=16):
    return torch.rand(n, 3, size, size) + 1  # nowhere zero, so that what comes in can be seen


def augmented(x, policy, p=None):
    """By the fixed policy, or by need with this p."""
    augment = common.Augment(policy)
    augment.p.fill_(augment.p if p is None else p)
    return augment(x)


def test_translation_moves_whole_pixels_and_brings_in_zeros():
    x = images()
    moved = augmented(x, "translation")
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


def spots(n, size=17):
    """A bell around the very centre; its width can be measured along rows and along columns."""
    place = torch.arange(size) - (size - 1) / 2
    bell = torch.exp(-(place[:, None] ** 2 + place**2) / (2 * 2.5**2))
    return bell.expand(n, 3, size, size)


def extent(x):
    """Centre and standard deviation of images (N, C, H, W) as densities: along rows, columns."""
    density, place = x[:, 0] / x[:, 0].sum((1, 2), keepdim=True), torch.arange(x.shape[-1]) * 1.0
    along = torch.stack([density.sum(2), density.sum(1)])  # (2, N, side)
    mean = (along * place).sum(2)
    return mean, ((along * (place - mean[..., None]) ** 2).sum(2)).sqrt()


@pytest.mark.parametrize("kind", ["scale", "stretch"])
def test_scale_and_stretch_keep_the_centre(kind):
    torch.manual_seed(0)
    x = spots(400)
    mean, width = extent(augmented(x, kind))
    torch.testing.assert_close(mean, torch.full_like(mean, 8.0), rtol=0, atol=1e-3)
    high, wide = (width / extent(x)[1]).log2()  # powers of two, of normal law
    inside = (high.abs() < 0.35) & (wide.abs() < 0.35)  # larger ones are cut by the border
    assert inside.sum() > 300
    torch.testing.assert_close(
        high[inside], wide[inside] if kind == "scale" else -wide[inside], rtol=0, atol=0.06
    )
    assert high.std() == pytest.approx(0.2, rel=0.25)
    assert abs(high.median()) < 0.03


def test_a_scale_of_one_changes_no_bit_and_of_two_takes_the_middle():
    x, zero = images(3, 8), torch.zeros(3, 1, 1, 1)
    same = common.resampling(8, zero + 1, zero)
    assert torch.equal(same @ x @ same.mT, x)
    ramp = torch.arange(9.0).expand(1, 1, 9, 9)
    twice = ramp @ common.resampling(9, torch.full((1, 1, 1, 1), 2.0), zero[:1]).mT
    torch.testing.assert_close(twice[0, 0, 0], torch.arange(2, 6.5, 0.5))


def test_cutout_removes_at_most_a_square_of_half_the_side():
    x = images()
    holes = (augmented(x, "cutout") == 0).all(1)
    assert holes.sum((1, 2)).max() == 8 * 8 and holes.any(0).all()
    for hole in holes:
        rows, columns = hole.any(1), hole.any(0)
        assert torch.equal(hole, rows[:, None] & columns) and max(rows.sum(), columns.sum()) <= 8


def test_colour_changes_brightness_saturation_and_contrast_of_each_image_alike():
    x = images(size=8).requires_grad_()
    y = augmented(x, "colour")
    level = y.mean((1, 2, 3)) - x.mean((1, 2, 3))
    assert level.abs().max() <= 0.5 + 1e-5 and level.std() > 0.2
    # the differences between pixels of one channel mean are scaled by the contrast alone
    contrast = y.mean(1).std((1, 2)) / x.mean(1).std((1, 2))
    assert contrast.min() >= 0.5 - 1e-4 and contrast.max() <= 1.5 + 1e-4 and contrast.std() > 0.2
    y.sum().backward()
    assert x.grad.abs().sum() > 0


def test_without_augmentation_every_bit_stays():
    x = torch.randn(8, 3, 16, 16) * 3  # of both signs, beyond [-1, 1] too
    assert torch.equal(augmented(x, "need", p=0.0), x)
    assert augmented(x, "none") is x


def test_augmentation_follows_the_seed_and_g_learns_through_it():
    x, augment = images(8), common.Augment(",".join(common.KINDS))
    torch.manual_seed(4)
    first = augment(x)
    assert not torch.equal(first, augment(x))
    torch.manual_seed(4)
    assert torch.equal(first, augment(x))
    x.requires_grad_()
    augment(x).square().sum().backward()
    assert (x.grad != 0).float().mean() > 0.4


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_by_need_each_kind_reaches_this_share_of_the_images(p):
    torch.manual_seed(1)
    x = images(4000, 8)
    changed = (augmented(x, "need", p) != x).flatten(1).any(1).float().mean()
    # scale, stretch and two translations, of which one pixel each way: half of the draws move
    expected = 1 - (1 - p) ** 2 * (1 - p / 2) ** 2
    assert changed.item() == pytest.approx(expected, abs=0.03)


def test_p_rises_while_d_is_sure_of_real_images_and_falls_otherwise():
    augment = common.Augment("need")
    assert augment.p == 0 and not [*augment.parameters()]
    for _ in range(10):
        augment.update(torch.full((50,), -3.0))  # D takes them for generated: no need
    assert augment.p == 0
    ps = []
    for _ in range(2000):
        augment.update(torch.full((50,), 0.1))  # sure is what is right, however narrowly
        ps.append(augment.p.item())
    assert ps[0] == 0 and ps[-1] == pytest.approx(common.MOST)  # bounded
    rising = [after - before for before, after in zip(ps, ps[1:]) if before < after]
    assert rising[:-1] == pytest.approx([50 / common.PACE] * (len(rising) - 1), rel=0.01)
    for _ in range(2000):
        augment.update(torch.cat([torch.full((35,), 2.0), torch.full((15,), -9.0)]))
    assert augment.sure.item() == pytest.approx(0.4, abs=1e-3) and augment.p == 0
    assert augment.p >= 0


def test_a_fixed_policy_has_nothing_to_move_or_to_keep():
    augment = common.Augment("cutout")
    augment.update(torch.ones(50))
    assert augment.p == 1 and not augment.state_dict()
    assert set(common.Augment("need").state_dict()) == {"p", "sure"}


def test_augmentation_waits_for_no_device():
    """On "meta" nothing has values: an .item() or a tensor made on the CPU would raise."""
    for policy in ("need", ",".join(common.KINDS)):
        augment = common.Augment(policy).to("meta")
        x = torch.zeros(4, 3, 16, 16, device="meta", requires_grad=True)
        y = augment(x)
        augment.update(torch.zeros(4, device="meta"))
        assert y.is_meta and y.shape == x.shape and augment.p.is_meta and augment.sure.is_meta


def test_summary_counts_layers_and_parameters():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    text = common.summary(net, torch.zeros(1, 3, 4, 4))
    assert "Conv2d(3, 8, kernel_size=(3, 3)" in text and "Linear(in_features=128" in text
    last = f"(1, 3, 4, 4) -> (1, 2), {3 * 8 * 9 + 8 + 128 * 2 + 2:,} parameters"
    assert text.splitlines()[-1] == last
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
