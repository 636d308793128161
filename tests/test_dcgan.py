"""The networks of train_dcgan.py and its step, against closed forms and a textbook."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F

import common
from train_dcgan import (
    R1_EVERY,
    Discriminator,
    Generator,
    get_args,
    init_weights,
    r1_penalty,
    stage_widths,
    train_step,
)

NONE = common.Augment("none")


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
    stats = train_step(G, D, opt_d, opt_g, NONE, real, 0, settings(one_sided=one_sided))
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
        train_step(*ours, NONE, real_images(), seed, settings())
        torch.manual_seed(seed)
        textbook_step(*theirs, real_images(), torch.randn(6, 8))
    for net, other in zip(ours[:2], theirs[:2]):
        for a, b in zip(net.parameters(), other.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("frozen", ["D", "G"])
def test_a_rate_of_zero_leaves_that_network_as_it_was(frozen):
    G, D, opt_d, opt_g = small_pair(**{"lrd" if frozen == "D" else "lrg": 0.0})
    G_before, D_before = copy.deepcopy(G), copy.deepcopy(D)
    train_step(G, D, opt_d, opt_g, NONE, real_images(), 0, settings())
    assert moved(G, G_before) == (frozen != "G")
    assert moved(D, D_before) == (frozen != "D")


def test_k_updates_of_d_for_one_of_g_each_with_other_images():
    G, D, opt_d, opt_g = small_pair()
    seen = []
    D.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach()))
    real = real_images(6)
    train_step(G, D, opt_d, opt_g, NONE, real, 0, settings(k=3))
    assert [int(opt.state[opt.param_groups[0]["params"][0]]["step"]) for opt in (opt_d, opt_g)] == [
        3,
        1,
    ]
    torch.testing.assert_close(torch.cat(seen[0:6:2]), real)
    assert len(seen) == 7 and not torch.equal(seen[1], seen[3])


def test_g_update_leaves_no_gradient_in_d():
    G, D, opt_d, opt_g = small_pair(lrd=0.0, lrg=0.0)
    torch.manual_seed(0)
    train_step(G, D, opt_d, opt_g, NONE, real_images(), 0, settings())
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
        ("--dataset=mnist --r1=0", 0, "normal"),
        ("--dataset=mnist --init=normal", 1, "normal"),
    ],
)
def test_what_won_on_mnist_is_the_default_there(flags, r1, init):
    args = get_args(flags.split())
    assert (args.r1, args.init) == (r1, init)


def test_the_r1_penalty_of_a_linear_discriminator_is_its_squared_weight():
    weight = torch.randn(3, 8, 8)
    D = lambda images: (images * weight).sum((1, 2, 3))
    torch.testing.assert_close(r1_penalty(D, torch.randn(5, 3, 8, 8)), weight.square().sum())


@pytest.mark.parametrize("step", [0, 1, R1_EVERY - 1, R1_EVERY])
def test_r1_adds_half_of_each_images_squared_slope_to_what_d_minimises(step):
    """In every 16th step alone, there 16 times as strong."""
    G, D, opt_d, opt_g = small_pair(norm="none", lrd=0.0, lrg=0.0)
    real, gamma = real_images(), 3.0
    torch.manual_seed(0)
    train_step(G, D, opt_d, opt_g, NONE, real, step, settings(r1=gamma))
    after = [p.grad.clone() for p in D.parameters()]
    D.zero_grad()
    torch.manual_seed(0)
    fake = G(torch.randn(6, 8)).detach()
    loss = F.softplus(-D(real)).mean() + F.softplus(D(fake)).mean()
    for x in real.split(1) if step % R1_EVERY == 0 else ():  # one image at a time
        x.requires_grad_()
        slope = torch.autograd.grad(D(x).sum(), x, create_graph=True)[0]
        loss = loss + R1_EVERY * gamma / 2 * slope.square().sum() / len(real)
    loss.backward()
    for grad, p in zip(after, D.parameters()):
        torch.testing.assert_close(grad, p.grad, rtol=1e-3, atol=1e-6)


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
    stats = train_step(G, D, opt_d, opt_g, augment, real, 0, settings(k=3))
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
    train_step(G, D, opt_d, opt_g, common.Augment("cutout"), real_images(), 0, settings())
    holes = [(images == 0).all(1) for images in judged]
    for hole, images, plain in zip(holes, judged, (real_images(), made[0], made[0]), strict=True):
        assert hole.flatten(1).any(1).all()
        assert torch.equal(images, plain * ~hole[:, None])
    assert not any(torch.equal(a, b) for a, b in zip(holes, holes[1:]))


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("policy", ["need", "colour,translation,cutout"])
def test_the_step_waits_for_no_device(k, policy):
    """On "meta" nothing has values: an .item() or a tensor made on the CPU would raise."""
    networks = small_pair("meta", fused=False)
    augment = common.Augment(policy).to("meta")
    real = real_images().to("meta")
    stats = train_step(*networks, augment, real, 1, settings(k=k, one_sided=0.1))
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
