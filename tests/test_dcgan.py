"""The networks of train_dcgan.py, its step and augmentation, against closed forms, a textbook."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F

import common
import train_dcgan
from train_dcgan import (
    R1_EVERY,
    SPREAD,
    Augment,
    Discriminator,
    Generator,
    get_args,
    init_weights,
    r1_penalty,
    stage_widths,
    train_step,
)

NONE = Augment(16, on=False)


def settings(**changes):
    standard = {"k": 1, "z_dim": 8, "one_sided": 0.0, "r1": 0.0}
    return types.SimpleNamespace(**standard | changes)


def small_pair(device="cpu", norm="batch", lrd=1e-2, lrg=1e-2, fused=True):
    torch.manual_seed(1)
    with torch.device(device):
        G = Generator(16, channels=3, z_dim=8, width=4, norm=norm)
        D = Discriminator(16, channels=3, width=4, norm=norm)
    opt_d = torch.optim.Adam(D.parameters(), lrd, (0.5, 0.999), fused=fused)
    opt_g = torch.optim.Adam(G.parameters(), lrg, (0.5, 0.999), fused=fused)
    return G, D, opt_d, opt_g


def real_images(n=6):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def moved(net, before):
    return any(not torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters()))


@pytest.mark.parametrize("image_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(image_size, channels):
    with torch.device("meta"):
        G = Generator(image_size, channels, width=8)
        D = Discriminator(image_size, channels, width=8)
        images = G(torch.zeros(2, 100))
        logits = D(images.bfloat16().float())
    assert images.shape == (2, channels, image_size, image_size)
    assert logits.shape == (2,) and logits.dtype == torch.float32


def test_widths_double_inwards_up_to_eight_times():
    assert stage_widths(16, 64) == [128, 64]
    assert stage_widths(64, 64) == [512, 256, 128, 64]
    assert stage_widths(256, 64) == [512, 512, 512, 256, 128, 64]


def test_images_are_in_range_and_float32_under_bf16():
    G, D, *_ = small_pair()
    args = types.SimpleNamespace(precision="bf16", compile=False)
    G, D = (
        common.prepare(G, torch.device("cpu"), args),
        common.prepare(D, torch.device("cpu"), args),
    )
    images = G(10 * torch.randn(4, 8))
    assert images.dtype == torch.float32 and images.abs().max() <= 1
    assert D(images).dtype == torch.float32


@pytest.mark.parametrize("one_sided", [0.0, 0.1])
def test_losses_are_binary_cross_entropies(one_sided):
    G, D, opt_d, opt_g = small_pair(lrd=0.0, lrg=0.0)
    real = real_images()
    torch.manual_seed(3)
    stats = train_step(G, D, opt_d, opt_g, NONE, real, False, settings(one_sided=one_sided))
    torch.manual_seed(3)
    fake = G(torch.randn(6, 8))
    bce, ones = F.binary_cross_entropy_with_logits, torch.ones(6)
    loss_d = bce(D(real), (1 - one_sided) * ones) + bce(D(fake), 0 * ones)
    torch.testing.assert_close(stats["loss_d"], loss_d.detach())
    torch.testing.assert_close(stats["loss_g"], bce(D(fake), ones).detach())
    torch.testing.assert_close(stats["d_real"], D(real).sigmoid().mean().detach())
    torch.testing.assert_close(stats["d_fake"], D(fake).sigmoid().mean().detach())


def textbook_step(G, D, opt_d, opt_g, real, z):
    """The step as tutorials write it: BCELoss on sigmoids, a graph through D for each loss."""
    bce, ones = torch.nn.BCELoss(), torch.ones(len(real))
    opt_d.zero_grad()
    bce(torch.sigmoid(D(real)), ones).backward()
    fake = G(z)
    bce(torch.sigmoid(D(fake.detach())), 0 * ones).backward()
    opt_d.step()
    opt_g.zero_grad()
    bce(torch.sigmoid(D(fake)), ones).backward()
    opt_g.step()


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_three_steps_equal_the_textbook(norm):
    ours, theirs = small_pair(norm=norm, lrd=1e-3), small_pair(norm=norm, lrd=1e-3, fused=False)
    for seed in range(3):
        torch.manual_seed(seed)
        train_step(*ours, NONE, real_images(), False, settings())
        torch.manual_seed(seed)
        textbook_step(*theirs, real_images(), torch.randn(6, 8))
    for net, other in zip(ours[:2], theirs[:2]):
        for a, b in zip(net.parameters(), other.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("frozen", ["D", "G"])
def test_a_rate_of_zero_leaves_that_network_as_it_was(frozen):
    G, D, opt_d, opt_g = small_pair(**{"lrd" if frozen == "D" else "lrg": 0.0})
    G_before, D_before = copy.deepcopy(G), copy.deepcopy(D)
    train_step(G, D, opt_d, opt_g, NONE, real_images(), False, settings())
    assert moved(G, G_before) == (frozen != "G")
    assert moved(D, D_before) == (frozen != "D")


def test_k_updates_of_d_for_one_of_g_each_with_other_images():
    G, D, opt_d, opt_g = small_pair()
    seen = []
    D.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach()))
    real = real_images(6)
    train_step(G, D, opt_d, opt_g, NONE, real, False, settings(k=3))
    assert [int(opt.state[opt.param_groups[0]["params"][0]]["step"]) for opt in (opt_d, opt_g)] == [
        3,
        1,
    ]
    torch.testing.assert_close(torch.cat(seen[0:6:2]), real)
    assert len(seen) == 7 and not torch.equal(seen[1], seen[3])


def test_g_update_leaves_no_gradient_in_d():
    G, D, opt_d, opt_g = small_pair(lrd=0.0, lrg=0.0)
    torch.manual_seed(0)
    train_step(G, D, opt_d, opt_g, NONE, real_images(), False, settings())
    after = [p.grad.clone() for p in D.parameters()]
    D.zero_grad()
    torch.manual_seed(0)
    fake = G(torch.randn(6, 8))
    (F.softplus(-D(real_images())).mean() + F.softplus(D(fake.detach())).mean()).backward()
    for grad, p in zip(after, D.parameters()):
        torch.testing.assert_close(grad, p.grad, rtol=1e-3, atol=1e-6)
        assert p.requires_grad


@pytest.mark.parametrize(
    "flags, r1, init",
    [
        ("--path=imgs", 0, "normal"),
        ("--path=imgs --r1=0.1", 0.1, "xavier"),
        ("--dataset=mnist", 1, "xavier"),
        ("--dataset=glyphs", 1, "xavier"),
        ("--dataset=mnist --r1=0", 0, "normal"),
        ("--dataset=mnist --init=normal", 1, "normal"),
    ],
)
def test_what_won_on_digits_and_characters_is_the_default_there(flags, r1, init):
    args = get_args(flags.split())
    assert (args.r1, args.init) == (r1, init)


def test_the_r1_penalty_of_a_linear_discriminator_is_its_squared_weight():
    weight = torch.randn(3, 8, 8)
    D = lambda images: (images * weight).sum((1, 2, 3))
    torch.testing.assert_close(r1_penalty(D, torch.randn(5, 3, 8, 8)), weight.square().sum())


@pytest.mark.parametrize("penalize", [True, False])
def test_r1_adds_half_of_each_images_squared_slope_to_what_d_minimises(penalize):
    """Where the step penalizes, 16 times as strong."""
    G, D, opt_d, opt_g = small_pair(norm="none", lrd=0.0, lrg=0.0)
    real, gamma = real_images(), 3.0
    torch.manual_seed(0)
    train_step(G, D, opt_d, opt_g, NONE, real, penalize, settings(r1=gamma))
    after = [p.grad.clone() for p in D.parameters()]
    D.zero_grad()
    torch.manual_seed(0)
    fake = G(torch.randn(6, 8)).detach()
    loss = F.softplus(-D(real)).mean() + F.softplus(D(fake)).mean()
    for x in real.split(1) if penalize else ():  # one image at a time
        x.requires_grad_()
        slope = torch.autograd.grad(D(x).sum(), x, create_graph=True)[0]
        loss = loss + R1_EVERY * gamma / 2 * slope.square().sum() / len(real)
    loss.backward()
    for grad, p in zip(after, D.parameters()):
        torch.testing.assert_close(grad, p.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_every_sixteenth_step_penalizes_also_after_a_resume(gamma, imgs, monkeypatch):
    asked = []
    noting = lambda *given: (asked.append(given[6]), train_step(*given))[1]
    monkeypatch.setattr(train_dcgan, "train_step", noting)
    flags = {"image_size": 16, "width": 2, "batch_size": 8, "r1": gamma}
    run = train_dcgan.train(path="imgs", epochs=3, **flags)
    train_dcgan.train(resume=run, epochs=11)
    assert asked == [gamma > 0 and step % R1_EVERY == 0 for step in range(33)]


class Seen(torch.nn.Module):
    """In the place of Augment: marks what went through it, and notes what it was told."""

    def __init__(self):
        super().__init__()
        self.p, self.told = torch.tensor(0.25), []

    def forward(self, images):
        return images + 10

    def update(self, logits_real):
        self.told.append(logits_real)


def test_d_judges_augmented_images_only_and_g_learns_through_the_augmentation():
    """One kind of image without it, and D would learn to tell the kinds by that alone."""
    G, D, opt_d, opt_g = small_pair()
    judged, logits, made = [], [], []
    D.register_forward_hook(lambda _, x, __: judged.append(x[0].detach()))
    D.register_forward_hook(lambda _, __, answers: logits.append(answers.detach()))
    G.register_forward_hook(lambda _, __, images: made.append(images.detach()))
    augment, real = Seen(), real_images(6)
    stats = train_step(G, D, opt_d, opt_g, augment, real, False, settings(k=3))
    shown = [real[:2], made[0], real[2:4], made[1], real[4:], made[2], made[2]]
    for ours, plain in zip(judged, shown, strict=True):
        assert torch.equal(ours, plain + 10)
    assert len(augment.told) == 3  # after each update of D: its answers to real images
    for told, answered in zip(augment.told, logits[0:6:2]):
        assert torch.equal(told, answered) and not told.requires_grad
    assert stats["p"] == 0.25 and stats["p"] is not augment.p  # which moves on


def test_real_generated_and_gs_images_are_augmented_each_with_draws_of_their_own():
    G, D, opt_d, opt_g = small_pair(lrd=0.0, lrg=0.0)
    judged, made = [], []
    D.register_forward_hook(lambda _, x, __: judged.append(x[0].detach()))
    G.register_forward_hook(lambda _, __, images: made.append(images.detach()))
    augment, real = only("shift"), real_images()
    train_step(G, D, opt_d, opt_g, augment, real, False, settings())
    moves = [[moved_by(*pair) for pair in zip(x, y)] for x, y in zip((real, *2 * made), judged)]
    assert len(moves) == 3 and all(len({*each}) > 1 for each in moves)
    assert moves[0] != moves[1] and moves[1] != moves[2]


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("on", [True, False])
def test_the_step_waits_for_no_device(k, on):
    """On "meta" nothing has values: an .item() or a tensor made on the CPU would raise."""
    networks = small_pair("meta", fused=False)
    augment = Augment(16, on).to("meta")
    real = real_images().to("meta")
    for penalize in (False, True):
        args = settings(k=k, one_sided=0.1, r1=1.0)
        stats = train_step(*networks, augment, real, penalize, args)
        assert set(stats) == {"loss_d", "loss_g", "d_real", "d_fake", "d_fake_after", "p"}
        assert all(v.shape == () and v.is_meta and not v.requires_grad for v in stats.values())


def test_weights_begin_as_in_dcgan_or_as_xaviers():
    G = Generator(32, width=64, z_dim=512)
    init_weights(G, "normal")
    assert G.project.weight.std().item() == pytest.approx(0.02, rel=0.03)
    for layer in G.layers:
        if isinstance(layer, torch.nn.ConvTranspose2d):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert layer.bias is None or not layer.bias.any()
        elif isinstance(layer, torch.nn.BatchNorm2d):
            assert layer.weight.mean().item() == pytest.approx(1, abs=0.01)
            assert 0.012 < layer.weight.std().item() < 0.028 and not layer.bias.any()
    G = Generator(32, width=64, z_dim=512, norm="none")
    init_weights(G, "xavier")
    bound = (6 / (512 + 16 * 256)) ** 0.5
    assert G.project.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert not G.project.bias.any()


# ---------------------------------------------------------------------------------- augmentation

KINDS = {"shift": [1.0, 1, 0, 0], "scale": [0.0, 0, 1, 0], "stretch": [0.0, 0, 0, 1]}


def only(kind, side=16):
    """An Augment that does this to each image and nothing else."""
    augment = Augment(side)
    augment.p = torch.tensor(KINDS[kind])  # a probability for each
    return augment


def by_need(x, p):
    augment = Augment(x.shape[-1])
    augment.p.fill_(p)
    return augment(x)


def images(n=200, size=16):
    return torch.rand(n, 3, size, size) + 1  # nowhere zero, so that what comes in can be seen


def moved_by(before, after):
    """By how many pixels one image (C, side, side) was moved down and right, zeros coming in."""
    rows, columns = after[0].any(1).nonzero().ravel(), after[0].any(0).nonzero().ravel()
    last = len(after[0]) - 1
    down = rows[0].item() if rows[0] else rows[-1].item() - last
    right = columns[0].item() if columns[0] else columns[-1].item() - last
    back = torch.roll(after, (-down, -right), (1, 2))
    kept = back != 0
    assert torch.equal(back[kept], before[kept])
    assert kept[0].sum() == (last + 1 - abs(down)) * (last + 1 - abs(right))
    return down, right


def test_shifts_move_whole_pixels_and_bring_in_zeros():
    torch.manual_seed(0)
    x = images(400)
    offsets = [moved_by(*pair) for pair in zip(x, only("shift")(x))]
    assert {*offsets} == {(a, b) for a in range(-2, 3) for b in range(-2, 3)}  # an eighth of 16
    down, right = torch.tensor(offsets).float().unbind(1)
    for axis in (down, right):  # uniform before it is rounded: the ends come half as often
        assert axis.mean().abs() < 0.2 and axis.std() == pytest.approx(1.22, abs=0.1)
    assert torch.corrcoef(torch.stack([down, right]))[0, 1].abs() < 0.15


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
    mean, width = extent(only(kind, 17)(x))
    torch.testing.assert_close(mean, torch.full_like(mean, 8.0), rtol=0, atol=1e-3)
    high, wide = (width / extent(x)[1]).log2()  # powers of two, of normal law
    inside = (high.abs() < 0.35) & (wide.abs() < 0.35)  # larger ones are cut by the border
    assert inside.sum() > 300
    torch.testing.assert_close(
        high[inside], wide[inside] if kind == "scale" else -wide[inside], rtol=0, atol=0.06
    )
    assert high.std() == pytest.approx(0.2, rel=0.25)
    assert abs(high.median()) < 0.03


def former(x, p):
    """By need as it was: each axis by itself, with draws for each kind of each image."""
    n, side = len(x), x.shape[-1]
    rand = lambda: torch.rand(n, 1, 1, 1)
    some = lambda values: values * (rand() < p)
    scale, stretch = (some(SPREAD * torch.randn(n, 1, 1, 1)) for _ in range(2))
    place = torch.arange(side) - (side - 1) / 2
    matrices = []
    for size in (2 ** (scale - stretch), 2 ** (scale + stretch)):
        shift = some((rand() - 0.5) * side / 4).round()
        matrices.append(F.relu(1 - ((place[:, None] - shift) / size - place).abs()))
    return matrices[0] @ x @ matrices[1].mT


@pytest.mark.parametrize("p", [0.15, 0.5, 1.0])
def test_the_distribution_is_the_former_one(p):
    torch.manual_seed(0)
    x, found = spots(6000), []
    for augmented in (by_need(x, p), former(x, p)):
        mean, width = extent(augmented)
        spread = width.log2() - extent(x)[1].log2()
        each = torch.cat([mean - 8, spread, spread[:1] * spread[1:], mean[:1] * mean[1:]])
        same = (augmented == x).flatten(1).all(1).float()
        row = [each.mean(1), each.std(1), (each**2).mean(1).sqrt(), same.mean()[None]]
        found.append(torch.cat(row))
    torch.testing.assert_close(found[0], found[1], rtol=0.08, atol=0.025)


def test_resampling_is_bilinear_with_zeros_outside():
    """Each image against torch's own, by the numbers that were drawn for it."""
    n, side, augment = 50, 12, Augment(12)
    augment.p.fill_(1)
    x = torch.randn(n, 3, side, side)
    torch.manual_seed(5)
    ours = augment(x)
    torch.manual_seed(5)
    shift = ((torch.rand(n, 6)[:, 4:] - 0.5) * side / 4).round()
    scale, stretch = (0.2 * torch.randn(n, 2)).unbind(1)
    zoom = 2 ** torch.stack([scale - stretch, scale + stretch], 1)
    theta = torch.zeros(n, 2, 3)  # of (x, y), in half sides
    for row, axis in ((0, 1), (1, 0)):
        theta[:, row, row] = zoom[:, axis]
        theta[:, row, 2] = -shift[:, axis] * zoom[:, axis] / (side / 2)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    theirs = F.grid_sample(x, grid, padding_mode="zeros", align_corners=False)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_without_augmentation_every_bit_stays():
    x = torch.randn(8, 3, 16, 16) * 3  # of both signs, beyond [-1, 1] too
    assert torch.equal(by_need(x, p=0.0), x)
    assert NONE(x) is x


@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_follows_the_seed_and_g_learns_through_it(channels):
    x, augment = images(8)[:, :channels], Augment(16)
    augment.p.fill_(1)
    torch.manual_seed(4)
    first = augment(x)
    assert first.shape == x.shape and not torch.equal(first, augment(x))
    torch.manual_seed(4)
    assert torch.equal(first, augment(x))
    x = x.clone().requires_grad_()
    augment(x).square().sum().backward()
    assert (x.grad != 0).float().mean() > 0.4


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_by_need_each_kind_reaches_this_share_of_the_images(p):
    torch.manual_seed(1)
    x = images(4000, 8)
    changed = (by_need(x, p) != x).flatten(1).any(1).float().mean()
    # scale, stretch and two translations, of which one pixel each way: half of the draws move
    expected = 1 - (1 - p) ** 2 * (1 - p / 2) ** 2
    assert changed.item() == pytest.approx(expected, abs=0.03)


def test_p_rises_while_d_is_sure_of_real_images_and_falls_otherwise():
    augment = Augment(16)
    assert augment.p == 0 and not [*augment.parameters()]
    for _ in range(10):
        augment.update(torch.full((50,), -3.0))  # D takes them for generated: no need
    assert augment.p == 0
    ps = []
    for _ in range(2000):
        augment.update(torch.full((50,), 0.1))  # sure is what is right, however narrowly
        ps.append(augment.p.item())
    assert ps[0] == 0 and ps[-1] == pytest.approx(train_dcgan.MOST)  # bounded
    rising = [after - before for before, after in zip(ps, ps[1:]) if before < after]
    assert rising[:-1] == pytest.approx([50 / train_dcgan.PACE] * (len(rising) - 1), rel=0.01)
    for _ in range(2000):
        augment.update(torch.cat([torch.full((35,), 2.0), torch.full((15,), -9.0)]))
    assert augment.sure.item() == pytest.approx(0.4, abs=1e-3) and augment.p == 0
    assert augment.p >= 0


def test_what_is_off_has_nothing_to_move_and_the_state_is_two_numbers():
    NONE.update(torch.ones(50))
    assert NONE.p == 0 and NONE.sure == 0
    assert set(Augment(16).state_dict()) == {"p", "sure"}
    assert get_args(["--path=x"]).augment == "need"
    assert get_args(["--path=x", "--r1=1"]).augment == "none"
    assert get_args(["--path=x", "--r1=1", "--augment=need"]).augment == "need"


def test_augmentation_waits_for_no_device():
    """On "meta" nothing has values: an .item() or a tensor made on the CPU would raise."""
    augment = Augment(16).to("meta")
    x = torch.zeros(4, 3, 16, 16, device="meta", requires_grad=True)
    y = augment(x)
    augment.update(torch.zeros(4, device="meta"))
    assert y.is_meta and y.shape == x.shape and augment.p.is_meta and augment.sure.is_meta
