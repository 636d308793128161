"""train_fcgan.py: the networks of its recipe, its step, the meaning of --flip_labels."""

import copy
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import train_fcgan
from train_fcgan import Discriminator, Generator, train_step


def small_pair(device="cpu", lr=1e-2, fused=True):
    torch.manual_seed(1)
    with torch.device(device):
        G = Generator(4, 1, z_dim=8, hidden=[16, 32], norm="none")
        D = Discriminator(4, 1, hidden=[32, 16], dropout=0)
    return (
        G,
        D,
        *(torch.optim.Adam(net.parameters(), lr, (0.5, 0.999), fused=fused) for net in (D, G)),
    )


def settings(**changes):
    standard = {"k": 1, "z_dim": 8, "flip_labels": False}
    return types.SimpleNamespace(**standard | changes)


def real_images(n=6):
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(
    "dataset, g, d",
    [
        ("mnist", [100, 128, 256, 512, 1024, 784], [784, 512, 256, 1]),
        ("cifar10", [100, 128, 256, 512, 1024, 2048, 3072], [3072, 1024, 512, 256, 1]),
    ],
)
def test_the_published_layers_and_settings_are_the_defaults(dataset, g, d):
    args = train_fcgan.get_args([f"--dataset={dataset}"])
    shape = {
        "image_size": args.image_size,
        "channels": 1 if dataset == "mnist" else 3,
        "alpha": 0.2,
    }
    with torch.device("meta"):
        G = Generator(**shape, z_dim=args.z_dim, hidden=[*map(int, args.hidden_g.split(","))])
        D = Discriminator(**shape, hidden=[*map(int, args.hidden_d.split(","))])
    for net, widths in ((G, g), (D, d)):
        linear = [m for m in net.modules() if isinstance(m, nn.Linear)]
        assert [linear[0].in_features, *(m.out_features for m in linear)] == widths
    published = (args.batch_size, args.lrd, args.lrg, args.beta1, args.epochs)
    assert published == (128, 2e-4, 2e-4, 0.5, 100)
    images = G(torch.zeros(2, 100, device="meta"))
    assert images.shape == (2, shape["channels"], args.image_size, args.image_size)
    assert D(images).shape == (2,) and D(images).dtype == torch.float32


def test_losses_are_binary_cross_entropies():
    G, D, opt_d, opt_g = small_pair(lr=0.0)
    torch.manual_seed(3)
    stats = train_step(G, D, opt_d, opt_g, real_images(), settings())
    torch.manual_seed(3)
    fake = G(torch.randn(6, 8))
    bce, ones = F.binary_cross_entropy_with_logits, torch.ones(6)
    torch.testing.assert_close(
        stats["loss_d"], (bce(D(real_images()), ones) + bce(D(fake), 0 * ones)).detach()
    )
    torch.testing.assert_close(stats["loss_g"], bce(D(fake), ones).detach())


def test_flipped_labels_are_the_same_training_with_the_last_layer_negated():
    plain, flipped = small_pair(), small_pair()
    with torch.no_grad():
        for p in flipped[1].layers[-1].parameters():
            p.neg_()
    for seed in range(5):
        torch.manual_seed(seed)
        ours = train_step(*plain, real_images(), settings())
        torch.manual_seed(seed)
        theirs = train_step(*flipped, real_images(), settings(flip_labels=True))
        assert ours == theirs  # to the bit, and D(x) is P(real) in both
    for p in flipped[1].layers[-1].parameters():
        p.data.neg_()
    for net, other in zip(plain[:2], flipped[:2]):
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))


def test_flipped_labels_mean_what_the_words_say():
    """Real is 0: D's own output falls for real images, while d_real, P(real), rises."""
    G, D, opt_d, opt_g = small_pair()
    before = copy.deepcopy(D)
    args = settings(flip_labels=True)
    first = [train_step(G, D, opt_d, opt_g, real_images(), args) for _ in range(9)]
    assert D(real_images()).mean() < before(real_images()).mean()
    assert first[-1]["d_real"] > first[0]["d_real"]


@pytest.mark.parametrize("k", [1, 2])
def test_the_step_waits_for_no_device(k):
    networks = small_pair("meta", fused=False)
    stats = train_step(*networks, real_images().to("meta"), settings(k=k))
    assert set(stats) == {"loss_d", "loss_g", "d_real", "d_fake", "d_fake_after"}
    assert all(v.shape == () and v.is_meta and not v.requires_grad for v in stats.values())


def test_d_sees_real_and_made_images_in_one_pass_and_g_is_judged_by_those_d_has_seen():
    G, D, opt_d, opt_g = small_pair(lr=0.0)
    judged, made = [], []
    D.register_forward_hook(lambda _, x, __: judged.append(x[0].detach()))
    G.register_forward_hook(lambda _, __, images: made.append(images.detach()))
    train_step(G, D, opt_d, opt_g, real_images(), settings(k=2))
    x = real_images().chunk(2)
    shown = [torch.cat([x[0], made[0]]), torch.cat([x[1], made[1]]), made[1]]
    assert len(made) == 2 and all(map(torch.equal, judged, shown)) and len(judged) == 3


def test_hidden_sizes_must_be_numbers():
    for text in ("512,", "a", "0,3"):
        with pytest.raises(common.UserError, match="--hidden_g"):
            train_fcgan.get_args([f"--hidden_g={text}"])


def test_a_run_of_images_with_tensorboard(imgs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"image_size": 16, "hidden_g": "8,16", "hidden_d": "8", "batch_size": 8}
    settings |= {"tensorboard": True, "sample_every": 1}
    run = train_fcgan.train(path="imgs", epochs=2, **settings)
    train_fcgan.train(resume=run, epochs=3)
    events = EventAccumulator(str(run))
    events.Reload()
    own = {"loss_d", "loss_g", "d_real", "d_fake", "d_fake_after"}
    assert {*common.COLUMNS} | own == set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss_d")] == list(range(1, 10))
    assert [event.step for event in events.Images("samples")] == [0, 3, 6, 9]
    header, *_, last = (line.split(",") for line in (run / "metrics.csv").read_text().splitlines())
    assert float(dict(zip(header, last))["loss_d"]) == pytest.approx(
        events.Scalars("loss_d")[-1].value
    )


def test_without_tensorboard_one_line_says_how_to_get_it(imgs, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboard", None)
    with pytest.raises(common.UserError, match="pip install tensorboard"):
        train_fcgan.train(path="imgs", image_size=16, tensorboard=True)
    assert not Path("runs").exists()
