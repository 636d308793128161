"""fid.py: the network against a literal transcription, distances against closed forms, sources."""

import functools
import hashlib
import http.server
import re
import subprocess
import sys
import threading
import urllib.error
import zipfile
from pathlib import Path

import disturbances
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, write_images
from PIL import Image
from scipy.linalg import sqrtm

import common
import fid
import generate
from train_dcgan import train

TINY = {"image_size": 16, "width": 4, "z_dim": 8, "batch_size": 8, "epochs": 2, "checkpoint": 1}


@pytest.fixture(scope="module")
def net():
    return fid.load_inception("random")[0]


class SmallNetwork(fid.Inception):
    """In the place of Inception where its features do not matter: one layer, the same outside."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.Conv2d_1a_3x3 = fid.Conv(3, 2048, 11, 48)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(fid, "Inception", SmallNetwork)


def call(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, argv)])
    fid.main()


def refused(monkeypatch, capsys, *argv):
    """The one line with which these arguments are refused."""
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, *argv)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


# --------------------------------------------------------------------------------------- network


def transcription(s, x):
    """The forward pass of FID's Inception-v3, layer by layer, on a dict of published names."""

    def conv(x, name, stride=1, padding=0):
        x = F.conv2d(x, s[f"{name}.conv.weight"], None, stride, padding)
        mean, var, weight, bias = (
            s[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.relu((x - mean[:, None, None]) / (var[:, None, None] + 1e-3).sqrt()
                      * weight[:, None, None] + bias[:, None, None])  # fmt: skip

    def average(x):
        ones = torch.ones(1, 1, *x.shape[2:])
        kernel = torch.ones(1, 1, 3, 3)
        counts = F.conv2d(ones, kernel, padding=1)
        return (
            F.conv2d(x, kernel.expand(x.shape[1], 1, 3, 3), padding=1, groups=x.shape[1]) / counts
        )

    x = conv(x, "Conv2d_1a_3x3", 2)
    x = conv(x, "Conv2d_2a_3x3")
    x = conv(x, "Conv2d_2b_3x3", 1, 1)
    x = F.max_pool2d(x, 3, 2)
    x = conv(x, "Conv2d_3b_1x1")
    x = conv(x, "Conv2d_4a_3x3")
    x = F.max_pool2d(x, 3, 2)
    for m in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        a = conv(x, f"{m}.branch1x1")
        b = conv(conv(x, f"{m}.branch5x5_1"), f"{m}.branch5x5_2", 1, 2)
        c = conv(conv(x, f"{m}.branch3x3dbl_1"), f"{m}.branch3x3dbl_2", 1, 1)
        c = conv(c, f"{m}.branch3x3dbl_3", 1, 1)
        x = torch.cat([a, b, c, conv(average(x), f"{m}.branch_pool")], 1)
    a = conv(x, "Mixed_6a.branch3x3", 2)
    b = conv(conv(x, "Mixed_6a.branch3x3dbl_1"), "Mixed_6a.branch3x3dbl_2", 1, 1)
    b = conv(b, "Mixed_6a.branch3x3dbl_3", 2)
    x = torch.cat([a, b, F.max_pool2d(x, 3, 2)], 1)
    for m in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        a = conv(x, f"{m}.branch1x1")
        b = conv(conv(x, f"{m}.branch7x7_1"), f"{m}.branch7x7_2", 1, (0, 3))
        b = conv(b, f"{m}.branch7x7_3", 1, (3, 0))
        c = conv(conv(x, f"{m}.branch7x7dbl_1"), f"{m}.branch7x7dbl_2", 1, (3, 0))
        c = conv(conv(c, f"{m}.branch7x7dbl_3", 1, (0, 3)), f"{m}.branch7x7dbl_4", 1, (3, 0))
        c = conv(c, f"{m}.branch7x7dbl_5", 1, (0, 3))
        x = torch.cat([a, b, c, conv(average(x), f"{m}.branch_pool")], 1)
    a = conv(conv(x, "Mixed_7a.branch3x3_1"), "Mixed_7a.branch3x3_2", 2)
    b = conv(conv(x, "Mixed_7a.branch7x7x3_1"), "Mixed_7a.branch7x7x3_2", 1, (0, 3))
    b = conv(conv(b, "Mixed_7a.branch7x7x3_3", 1, (3, 0)), "Mixed_7a.branch7x7x3_4", 2)
    x = torch.cat([a, b, F.max_pool2d(x, 3, 2)], 1)
    for m, pool in (("Mixed_7b", average), ("Mixed_7c", lambda x: F.max_pool2d(x, 3, 1, 1))):
        a = conv(x, f"{m}.branch1x1")
        b = conv(x, f"{m}.branch3x3_1")
        b1 = conv(b, f"{m}.branch3x3_2a", 1, (0, 1))
        b2 = conv(b, f"{m}.branch3x3_2b", 1, (1, 0))
        c = conv(conv(x, f"{m}.branch3x3dbl_1"), f"{m}.branch3x3dbl_2", 1, 1)
        c1 = conv(c, f"{m}.branch3x3dbl_3a", 1, (0, 1))
        c2 = conv(c, f"{m}.branch3x3dbl_3b", 1, (1, 0))
        x = torch.cat([a, b1, b2, c1, c2, conv(pool(x), f"{m}.branch_pool")], 1)
    return x.mean((2, 3))


def published_like(seed=0):
    """A state dict with the names and shapes of the published file, all values random."""
    torch.manual_seed(seed)
    state = {}
    for name, tensor in fid.Inception().state_dict().items():
        if name.endswith("conv.weight"):
            state[name] = torch.randn(tensor.shape) * (2 / tensor[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            state[name] = torch.rand(tensor.shape) + 0.5
        elif not name.endswith("num_batches_tracked"):
            state[name] = torch.randn(tensor.shape) / 10
    return state | {"fc.weight": torch.randn(1008, 2048), "fc.bias": torch.randn(1008)}


def test_the_layers_of_the_published_network():
    """94 convolutions; the totals are Keras' InceptionV3 without its head, 21,802,784 parameters
    of which BatchNorm has three for each of its 17,216 channels."""
    shapes = {name: tensor.shape for name, tensor in fid.Inception().named_parameters()}
    convolutions = [shape.numel() for name, shape in shapes.items() if name.endswith("conv.weight")]
    channels = [shape.numel() for name, shape in shapes.items() if name.endswith("bn.weight")]
    assert len(convolutions) == len(channels) == 94
    assert sum(channels) == 17_216
    assert sum(convolutions) + 3 * 17_216 == 21_802_784
    assert shapes["Mixed_7c.branch_pool.conv.weight"] == (192, 2048, 1, 1)
    assert shapes["Mixed_6c.branch7x7dbl_2.conv.weight"] == (160, 160, 7, 1)


def test_features_equal_a_transcription_folded_or_not():
    state, images = published_like(), torch.rand(2, 3, 107, 107) * 2 - 1
    torch.save(state, "weights.pth")
    folded, name = fid.load_inception(weights="weights.pth")
    plain = fid.Inception().eval()
    plain.load_state_dict(state, strict=False)
    with torch.no_grad():
        expected = transcription(state, images)
        torch.testing.assert_close(plain(images), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(folded(images), expected, rtol=1e-3, atol=1e-4)
    assert re.fullmatch("inception-fp32-[0-9a-f]{8}", name)
    assert expected.shape == (2, 2048) and expected.std() > 0.01


def test_every_tensor_of_the_file_is_used():
    """Each counts in the hash, and so in what may be compared."""
    state = published_like()
    torch.save(state, "a.pth")
    state["Mixed_7c.branch_pool.bn.running_var"][0] += 1
    torch.save(state, "b.pth")
    assert fid.load_inception(weights="a.pth")[1] != fid.load_inception(weights="b.pth")[1]


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "pickle", "text", "absent"])
def test_other_weights_are_refused(change, imgs, monkeypatch, capsys):
    state = published_like()
    if change == "missing":
        del state["Mixed_5b.branch1x1.bn.bias"]
    elif change == "unexpected":
        state["AuxLogits.conv.weight"] = torch.zeros(3)
    elif change == "shape":
        state["Mixed_5b.branch1x1.bn.bias"] = torch.zeros(3)
    elif change == "pickle":
        state["code"] = sys.exit
    torch.save(state, "w.pth")
    if change == "text":
        Path("w.pth").write_text("no weights")
    elif change == "absent":
        Path("w.pth").unlink()
    error = refused(monkeypatch, capsys, imgs, imgs, "--weights", "w.pth")
    reason = {"shape": "size mismatch", "pickle": "not tensors alone", "text": "not tensors alone"}
    reason |= {"missing": "Missing key", "unexpected": "Unexpected key", "absent": "No such file"}
    assert "w.pth holds no weights of this network" in error and reason[change] in error
    assert fid.ADDRESS + fid.WEIGHTS in error and "weights_only" not in error


def test_offline_it_says_where_to_put_the_weights(imgs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))

    def no_network(*args):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    error = refused(monkeypatch, capsys, imgs, imgs)
    assert fid.ADDRESS + fid.WEIGHTS in error and str(tmp_path / "hub/hub/checkpoints") in error
    folder = tmp_path / "hub/hub/checkpoints"
    (folder / fid.WEIGHTS).write_bytes(b"something else")
    assert "damaged: remove it" in refused(monkeypatch, capsys, imgs, imgs)


def test_weights_are_downloaded_once_and_checked(tmp_path, monkeypatch):
    torch.save(published_like(), "w.pth")
    content, asked = Path("w.pth").read_bytes(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(fid, "ADDRESS", f"http://127.0.0.1:{server.server_port}/")
    with pytest.raises(common.UserError, match="no download"):  # another hash than published
        fid.load_inception()
    monkeypatch.setattr(fid, "SHA256", hashlib.sha256(content).hexdigest()[:8])
    names = {fid.load_inception()[1] for _ in range(2)}
    server.shutdown()
    assert asked == [f"/{fid.WEIGHTS}"] * 2
    assert names == {fid.load_inception(weights="w.pth")[1]}


# --------------------------------------------------------------------------- features, statistics


def test_both_modes_make_299_pixels_as_their_models_do():
    pixels = np.random.default_rng(0).integers(256, size=(40, 30, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    legacy = F.interpolate(tensor, size=(299, 299), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(fid.to_input(pixels, "legacy"), 2 * legacy - 1)
    clean = fid.to_input(pixels, "clean").numpy()
    for i in range(3):
        band = Image.fromarray(pixels[..., i].astype(np.float32), mode="F")
        band = np.asarray(band.resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255)
        np.testing.assert_allclose(clean[i], (band - 128) / 128, atol=1e-6)
    grey = fid.to_input(pixels[..., :1], "legacy")
    assert grey.shape == (3, 299, 299) and torch.equal(grey[0], grey[2])


def test_moments_are_those_of_numpy_whatever_the_batches():
    rows = np.random.default_rng(0).normal(1e4, 1, (1000, 30)) @ np.diag(10.0 ** np.arange(-15, 15))
    moments, parts = fid.Moments(30), np.split(rows, [1, 2, 130, 500])
    for part in parts:
        moments.add(torch.from_numpy(part))
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.scatter / 999, np.cov(rows.T), rtol=1e-6)


def test_memory_does_not_grow_with_the_number_of_images():
    """With a small network in the place of Inception; peaks of processes of their own."""
    code = """
import resource, sys
sys.path.insert(0, {root!r})
import numpy as np, torch, fid
net = torch.nn.Sequential(torch.nn.AvgPool2d(43), torch.nn.Conv2d(3, 57, 1), torch.nn.Flatten())
net.append(torch.nn.Linear(57 * 36, 2048))
images = (np.full((64, 64, 3), i % 256, np.uint8) for i in range({n}))
print(fid.feature_stats(images, net)[2], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = []
    for n in (200, 800):
        done = subprocess.run(
            [sys.executable, "-c", code.format(root=str(ROOT), n=n)], capture_output=True, text=True
        )
        counted, peak = done.stdout.split()[-2:]
        assert int(counted) == n
        peaks.append(int(peak))
    assert peaks[1] < 1.05 * peaks[0]


def test_the_number_of_images_at_a_time_and_their_neighbours_change_nothing(net):
    images, _ = common.draw_glyphs(32, n=3)
    mu, sigma, n = fid.feature_stats(images, net, batch_size=2)
    assert mu.shape == (2048,) and sigma.shape == (2048, 2048) and n == 3
    rows = [fid.feature_stats([image, image], net, batch_size=2)[0] for image in images]
    np.testing.assert_allclose(mu, np.mean(rows, 0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(np.array(rows).T), atol=1e-10 * sigma.max())
    with pytest.raises(common.UserError, match="two images"):
        fid.feature_stats(images[:1], net)


@pytest.mark.parametrize("mode", ["legacy", "clean"])
def test_images_of_all_sizes_are_as_when_each_is_prepared_alone(mode, small, monkeypatch):
    """Those of one size are resized together, large ones in threads: the same features."""
    rng = np.random.default_rng(0)
    shapes = [(20, 30, 3), (20, 30, 3), (20, 30, 1), (700, 600, 3), (20, 30, 3), (299, 299, 1)]
    images = [rng.integers(256, size=shape, dtype=np.uint8) for shape in shapes]
    net, _ = fid.load_inception("random")
    device, seen = common.choose_device("auto"), []
    net.to(device).register_forward_pre_hook(lambda _, x: seen.append(x[0].cpu().clone()))
    fid.feature_stats(images, net, mode, 4)
    expected = torch.stack([fid.to_input(image, mode) for image in images])
    torch.testing.assert_close(torch.cat(seen)[:6], expected, rtol=0, atol=1e-6)
    assert len(seen) == 2 and len(seen[1]) == 4 and (seen[1][2:] == 0).all()
    resized = []
    interpolate = F.interpolate
    count = lambda x, *a, **k: resized.append(len(x)) or interpolate(x, *a, **k)
    monkeypatch.setattr(F, "interpolate", count)
    fid.feature_stats([images[0]] * 6, net, "legacy", 4)
    assert resized == [4, 2]


def test_on_a_gpu_it_resizes_sums_and_does_not_wait(small):
    if not torch.cuda.is_available():
        pytest.skip("no GPU, and no stand-in for one")
    net, _ = fid.load_inception("random", device="cuda")
    images = np.random.default_rng(0).integers(256, size=(40, 20, 20, 3), dtype=np.uint8)
    copied, move = [], torch.Tensor.to

    def noting(tensor, *args, **options):
        moved = move(tensor, *args, **options)
        if moved.is_cuda and not tensor.is_cuda:
            copied.append(tensor.dtype)
        return moved

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", noting)
        mu, sigma, n = fid.feature_stats(images, net, batch_size=8)
    assert n == 40 and copied == [torch.uint8] * 5
    on_cpu = fid.feature_stats(images, net.to("cpu"), batch_size=8)
    np.testing.assert_allclose(mu, on_cpu[0], rtol=1e-4)
    np.testing.assert_allclose(sigma, on_cpu[1], rtol=1e-3, atol=1e-5 * sigma.max())
    if "standin_gpu" not in sys.modules:
        return
    waits = []
    for count in (40, 80):
        before = sys.modules["standin_gpu"].counts()
        fid.feature_stats(np.resize(images, (count, 20, 20, 3)), net.to("cuda"), batch_size=8)
        after = sys.modules["standin_gpu"].counts()
        kinds = ("scalars", "d2h", "h2d_blocking")
        waits.append(sum(after[kind] - before[kind] for kind in kinds))
    assert waits[1] - waits[0] <= 5  # once in each of the five batches more


def test_photographs_are_never_held_whole(small, monkeypatch):
    """64 at a time are decoded, and as many wait: as what the network sees, not as they are."""
    Path("photos").mkdir()
    pixels = np.random.default_rng(0).integers(256, size=(1000, 1500, 3), dtype=np.uint8)
    for i in range(4):
        Image.fromarray(np.roll(pixels, i, 0)).save(f"photos/{i}.png")
    taken, stats = [], fid.feature_stats

    def noting(images, *options):
        taken.extend(images)
        return stats(taken, *options)

    monkeypatch.setattr(fid, "feature_stats", noting)
    call(monkeypatch, "photos", "--save_stats", "x.npz", "--features", "random")
    assert [tuple(image.shape) for image in taken] == [fid.INPUT] * 4
    assert torch.equal(taken[1], fid.to_input(np.roll(pixels, 1, 0), "legacy"))


# -------------------------------------------------------------------------------------- distance


@pytest.mark.filterwarnings("error")
def test_distance_in_closed_form():
    rng = np.random.default_rng(0)
    d = 50
    shift, a, b = rng.normal(size=d), rng.random(d) + 0.1, rng.random(d) + 0.1
    eye, zero = np.eye(d), np.zeros(d)
    assert fid.frechet_distance(zero, eye, shift, eye) == pytest.approx(shift @ shift, rel=1e-9)
    diagonal = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    distance = fid.frechet_distance(zero, np.diag(a), zero, np.diag(b))
    assert distance == pytest.approx(diagonal, rel=1e-9)
    assert fid.frechet_distance(zero, np.diag(a), zero, 0 * eye) == pytest.approx(a.sum())
    assert fid.frechet_distance(zero, 0 * eye, zero, 0 * eye) == 0
    assert fid.frechet_distance(zero, np.diag(a), zero, 4 * np.diag(a)) == pytest.approx(a.sum())
    with pytest.raises(ValueError, match="shapes"):
        fid.frechet_distance(zero, eye, zero[1:], eye)


def random_covariance(rng, d, n):
    return np.cov(rng.normal(size=(n, d)) * 10.0 ** rng.uniform(-2, 1, d), rowvar=False)


@pytest.mark.filterwarnings("error")
def test_distance_is_symmetric_zero_to_itself_and_that_of_the_matrix_root():
    rng = np.random.default_rng(1)
    a, b = random_covariance(rng, 40, 200), random_covariance(rng, 40, 300)
    mu = rng.normal(size=(2, 40))
    distance = fid.frechet_distance(mu[0], a, mu[1], b)
    assert fid.frechet_distance(mu[1], b, mu[0], a) == pytest.approx(distance, rel=1e-12)
    root = np.trace(sqrtm(a @ b).real)
    expected = ((mu[0] - mu[1]) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root
    assert distance == pytest.approx(expected, rel=1e-9)
    for n in (5, 30, 45, 500):
        c = random_covariance(rng, 40, n)
        assert 0 <= fid.frechet_distance(mu[0], c, mu[0], c) <= 1e-9 * np.trace(c)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("counts", [(10, 500), (500, 10), (10, 10)])
def test_singular_covariances_at_2048_dimensions(counts):
    """Tr (S1 S2)^(1/2) is the sum of singular values of X1 X2^T, X the centred, scaled features."""
    rng = np.random.default_rng(2)
    scale = 10.0 ** rng.uniform(-2, 1, 2048)
    rows = [np.maximum(rng.normal(size=(n, 2048)), 0) * scale for n in counts]
    centred = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in rows]
    root = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    shift = ((rows[0].mean(0) - rows[1].mean(0)) ** 2).sum()
    expected = shift + (centred[0] ** 2).sum() + (centred[1] ** 2).sum() - 2 * root
    stats = [(x.mean(0), np.cov(x, rowvar=False)) for x in rows]
    assert fid.frechet_distance(*stats[0], *stats[1]) == pytest.approx(expected, rel=1e-9)
    assert fid.frechet_distance(*stats[0], *stats[0]) <= 1e-9 * np.trace(stats[0][1])


# -------------------------------------------------------------------------------- command line


def number(text):
    return float(re.search(r"FID ([\d.]+) between", text)[1])


def test_a_generator_and_its_pngs_have_the_same_fid(imgs, monkeypatch, capsys):
    run = train(path=imgs, **TINY)
    pictures = common.load_images(imgs, 16, "3")
    Path("small").mkdir()
    for i, picture in enumerate(pictures[:12]):
        Image.fromarray(picture).save(f"small/{i:02d}.png")
    monkeypatch.setattr(sys, "argv", ["generate.py", "--img_num", "10", "--seed", "3"])
    generate.main()
    capsys.readouterr()
    how = ("--features", "random", "--batch_size", "4")
    call(monkeypatch, "small", run, *how, "--img_num", 10, "--seed", 3)
    of_run = capsys.readouterr().out
    call(monkeypatch, "small", "generated/dcgan-imgs", *how)
    of_files = capsys.readouterr().out
    assert re.search(r"FID [\d.]+", of_run)[0] == re.search(r"FID [\d.]+", of_files)[0]
    assert number(of_run) > 0
    assert "small (12 images) and runs/dcgan-imgs (10 images)" in of_run
    assert (
        "size 16, channels 3, mode legacy, features random-fp32-" in of_run
        and "size own" in of_files
    )
    assert "no measure of quality" in of_run and "singular" in of_run


def test_statistics_are_kept_and_must_fit(imgs, small, monkeypatch, capsys):
    how = ("--features", "random", "--batch_size", "8")
    call(monkeypatch, imgs, "--save_stats", "imgs.npz", *how)
    with np.load("imgs.npz") as stats:
        assert set(stats.files) == {"mu", "sigma", "n", *fid.SETTINGS}
        mu, sigma = stats["mu"], stats["sigma"]
        assert stats["n"] == 24 and stats["size"] == 0 and stats["mode"] == "legacy"
    call(monkeypatch, "imgs.npz", imgs, *how)
    assert number(capsys.readouterr().out) < 1e-9 * np.trace(sigma)
    call(monkeypatch, "imgs.npz", "imgs.npz")
    assert number(capsys.readouterr().out) < 1e-9 * np.trace(sigma)

    monkeypatch.setattr(fid, "feature_stats", lambda *_: pytest.fail("refused before any work"))
    assert "has mode legacy, not clean" in refused(
        monkeypatch, capsys, "imgs.npz", imgs, *how, "--mode", "clean"
    )
    bf16 = refused(monkeypatch, capsys, imgs, "imgs.npz", *how, "--precision", "bf16")
    assert "has features random-fp32" in bf16
    run = train(path=imgs, **TINY)
    capsys.readouterr()
    assert "has size 0, not 16" in refused(monkeypatch, capsys, "imgs.npz", run, *how)

    np.savez("foreign.npz", mu=mu, sigma=sigma)  # as pytorch-fid writes them
    call(monkeypatch, "foreign.npz", "imgs.npz")
    out = capsys.readouterr().out
    assert "unchecked" in out and number(out) < 1e-9 * np.trace(sigma)


def test_damaged_statistics_are_one_line(monkeypatch, capsys):
    good = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    np.savez("good.npz", **good)
    np.savez("shape.npz", mu=good["mu"], sigma=np.eye(3))
    np.savez("small.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez("nan.npz", mu=good["mu"] * np.nan, sigma=good["sigma"])
    np.savez("missing.npz", mu=good["mu"])
    np.savez("pickled.npz", mu=good["mu"], sigma=np.array([print], dtype=object))
    Path("cut.npz").write_bytes(Path("good.npz").read_bytes()[:-1000])
    Path("text.npz").write_text("no archive")
    np.savez("many.npz", **good, n=np.arange(3))
    for name in ("many", "shape", "small", "nan", "missing", "pickled", "cut", "text", "absent"):
        assert f"{name}.npz" in refused(monkeypatch, capsys, f"{name}.npz", "good.npz")
    assert "no .npz archive" in refused(monkeypatch, capsys, "text.npz", "good.npz")
    assert "sigma is not a file" in refused(monkeypatch, capsys, "missing.npz", "good.npz")


def test_what_is_no_covariance_is_refused(monkeypatch, capsys):
    """These gave an FID of 0.0000, or a traceback."""
    rows = np.random.default_rng(0).normal(size=(30, 2048))
    mu, sigma = rows.mean(0), np.cov(rows.T)
    askew, indefinite = sigma.copy(), sigma.copy()
    askew[0, 1] += sigma[0, 0]
    indefinite[0, 1] = indefinite[1, 0] = 3 * sigma[:2, :2].max()
    np.savez("good.npz", mu=mu, sigma=sigma, n=30)
    np.savez("negated.npz", mu=mu, sigma=-sigma)
    np.savez("askew.npz", mu=mu, sigma=askew)
    np.savez("indefinite.npz", mu=mu, sigma=indefinite)
    np.savez("complex.npz", mu=mu, sigma=sigma + 1j)
    np.savez("words.npz", mu=mu.astype(str), sigma=sigma)
    for n in (-5, 0, 1, 2.5, True):
        np.savez(f"n{n}.npz", mu=mu, sigma=sigma, n=n)
    bad = ["negated", "askew", "indefinite", "complex", "words"]
    bad += ["n-5", "n0", "n1", "n2.5", "nTrue"]
    for name in bad:
        for pair in ([f"{name}.npz", "good.npz"], ["good.npz", f"{name}.npz"]):
            assert f"{name}.npz holds no statistics" in refused(monkeypatch, capsys, *pair)
    np.savez("single.npz", mu=mu.astype(np.float32), sigma=sigma.astype(np.float32))  # sound
    np.savez("zero.npz", mu=mu, sigma=0 * sigma)  # of images that are all the same
    call(monkeypatch, "single.npz", "good.npz")
    assert number(capsys.readouterr().out) < 1e-4 * np.trace(sigma)
    call(monkeypatch, "zero.npz", "good.npz")
    assert number(capsys.readouterr().out) == pytest.approx(np.trace(sigma), rel=1e-6)


@pytest.mark.parametrize("candidate", ["empty", "one", "damaged"])
def test_too_few_images_are_named_before_any_work(candidate, imgs, small, monkeypatch, capsys):
    for name in ("empty", "one", "damaged"):
        Path(name).mkdir()
    (imgs / "001.png").rename("one/001.png")
    for name in "abc":
        Path(f"damaged/{name}.png").write_bytes(b"no image")
    monkeypatch.setattr(fid, "feature_stats", lambda *_: pytest.fail("refused before any work"))
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, imgs, candidate, "--features", "random")
    assert exit.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    found = {"empty": "no images in empty", "one": "one has 1 images", "damaged": "damaged has 0"}
    assert found[candidate] in error


def test_the_figure_comes_before_statistics_that_cannot_be_written(
    imgs, small, monkeypatch, capsys
):
    monkeypatch.setattr(fid, "frechet_distance", lambda *_: 1.25)
    Path("taken.npz").mkdir()
    how = ("--features", "random", "--batch_size", "8")
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, imgs, imgs, "--save_stats", "taken.npz", *how)
    captured = capsys.readouterr()
    assert exit.value.code == 2 and "cannot write taken.npz" in captured.err
    assert number(captured.out) == 1.25

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fid, "compare", stopped)
    with pytest.raises(SystemExit) as exit:  # stopped: the statistics are kept
        call(monkeypatch, imgs, imgs, "--save_stats", "kept.npz", *how)
    assert exit.value.code == 130 and Path("kept.npz").exists()


def test_progress_says_of_what_and_how_many(imgs, small, monkeypatch, capsys):
    monkeypatch.setattr(fid, "frechet_distance", lambda *_: 1.0)
    zipped = zipfile.ZipFile("other.zip", "w")
    for file in sorted(imgs.glob("*.png"))[:5]:
        zipped.write(file)
    zipped.close()
    call(monkeypatch, imgs, "other.zip", "--features", "random")
    out = capsys.readouterr().out
    assert "imgs: features of 24 of 24 images" in out
    assert "other.zip: features of 5 of 5 images" in out


def test_a_curve_over_the_snapshots(imgs, small, monkeypatch, capsys):
    run = train(path=imgs, **TINY)
    capsys.readouterr()
    call(monkeypatch, imgs, run, "--all", "--img_num", 4, "--features", "random")
    out = capsys.readouterr().out
    rows = [line.split(",") for line in (run / "fid.csv").read_text().splitlines()]
    assert rows[0] == ["snapshot", "step", "fid"]
    assert [row[:2] for row in rows[1:]] == [["generator_0001.pt", "3"], ["generator_0002.pt", "6"]]
    values = [float(row[2]) for row in rows[1:]]
    assert all(f"FID {value:.4f}" in out for value in values) and values[0] != values[1]
    assert f"best: {run}/generator_000{1 + int(np.argmin(values))}.pt" in out
    assert Image.open(run / "fid.png").size[0] > 100

    fids = iter([1.5])
    monkeypatch.setattr(fid, "compare", lambda *_: next(fids))
    with pytest.raises(StopIteration):  # stopped at the second snapshot: the first is kept
        call(monkeypatch, imgs, run, "--all", "--img_num", 4, "--features", "random")
    lines = (run / "fid.csv").read_text().splitlines()
    assert lines == ["snapshot,step,fid", "generator_0001.pt,3,1.500000"]


def test_every_kind_of_image_and_of_source(small, monkeypatch, capsys):
    write_images(Path("imgs"), 3)
    noise = np.random.default_rng(0).integers(65536, size=(33, 21), dtype=np.uint16)
    Image.fromarray(noise).save("imgs/16bit.png")
    Image.fromarray((noise >> 8).astype(np.uint8)).save("imgs/grey.jpg")
    Image.fromarray(np.stack([noise >> 8] * 4, -1).astype(np.uint8)).save("imgs/alpha.png")
    Path("imgs/broken.png").write_bytes(b"\x89PNG no more")
    how = ("--features", "random", "--batch_size", "8")
    call(monkeypatch, "imgs", "--save_stats", "six.npz", *how)
    with zipfile.ZipFile("two.zip", "w") as archive:
        archive.write("imgs/grey.jpg")
        archive.write("imgs/alpha.png")
    monkeypatch.setattr(common, "draw_glyphs", functools.partial(common.draw_glyphs, n=4))
    for candidate in ("two.zip", "glyphs"):
        call(monkeypatch, "six.npz", candidate, *how)
    captured = capsys.readouterr()
    assert "six.npz (6 images) and two.zip (2 images)" in captured.out
    assert "six.npz (6 images) and glyphs (4 images)" in captured.out
    assert captured.err.count("\n") == 1 and "skipped: broken.png: " in captured.err


def test_a_bare_name_is_the_data_set_and_one_with_a_slash_a_path(small, monkeypatch, capsys):
    write_images(Path("glyphs"), 3)
    monkeypatch.setattr(fid, "frechet_distance", lambda *_: 1.0)
    monkeypatch.setattr(common, "draw_glyphs", functools.partial(common.draw_glyphs, n=4))
    call(monkeypatch, "./glyphs", "glyphs", "--features", "random", "--batch_size", "8")
    out = capsys.readouterr().out
    assert "./glyphs (3 images) and glyphs (4 images)" in out
    assert "glyphs is the data set; for what lies here by that name type ./glyphs" in out


def test_a_run_of_some_classes_is_compared_with_those(small, monkeypatch, capsys):
    monkeypatch.setattr(common, "draw_glyphs", functools.partial(common.draw_glyphs, n=200))
    monkeypatch.setattr(fid, "frechet_distance", lambda *_: 1.0)
    labels = common.draw_glyphs(16)[1]
    n = int((labels == 3).sum() + (labels == 7).sum())
    settings = {"image_size": 16, "width": 4, "z_dim": 8, "batch_size": 8, "epochs": 1}
    run = train(dataset="glyphs", label=[3, 7], **settings)
    how = ("--features", "random", "--batch_size", "8", "--img_num", "4")
    for source in (run, run / "generator_0001.pt"):
        capsys.readouterr()
        call(monkeypatch, "glyphs", source, *how)
        out = capsys.readouterr().out
        assert "glyphs: only the classes count that the run has learned: 3 7" in out
        assert f"glyphs ({n} images) and {source} (4 images)" in out


def test_a_run_of_some_subfolders_is_compared_with_those(small, monkeypatch, capsys):
    for n, name in ((9, "bears"), (12, "cats"), (15, "dogs")):
        write_images(Path("animals", name), n)
    monkeypatch.setattr(fid, "frechet_distance", lambda *_: 1.0)
    settings = {"image_size": 16, "width": 4, "z_dim": 8, "batch_size": 8, "epochs": 1}
    run = train(path="animals", label=["dogs", "0"], **settings)  # a name, a number
    assert "classes: 0 bears, 1 cats, 2 dogs" in capsys.readouterr().out
    call(monkeypatch, "animals", run, "--features", "random", "--img_num", "4")
    assert f"animals (24 images) and {run} (4 images)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["imgs"], "add a CANDIDATE"),
        (["imgs", "--save_stats", "x.txt"], "must end with .npz"),
        (["imgs", "nowhere"], "nowhere does not exist"),
        (["", "imgs"], "the value is empty"),
        (["imgs", "", "--save_stats", "x.npz"], "the value is empty"),
        (["imgs", "imgs", "--img_num", "1"], "'1' is no int from 2"),
        (["imgs", "imgs", "--all"], "needs a run's folder"),
        (["imgs", "--all", "--save_stats", "x.npz"], "needs a run's folder"),
        (["x.npz", "imgs", "--save_stats", "y.npz"], "holds statistics already"),
        (["imgs", "--save_stats", "nowhere/y.npz"], "no such folder"),
        (["imgs", "README.md.pt"], "README.md.pt does not exist"),
        (["imgs", "imgs", "--img_num", "0"], "--img_num"),
        (["imgs", "imgs", "--device", "cuda:9"], "--device cuda:9: "),
    ],
)
def test_bad_input_is_one_line(argv, message, imgs, small, monkeypatch, capsys):
    assert message in refused(monkeypatch, capsys, *argv, "--features", "random")


def test_random_features_see_stronger_disturbances_as_farther(net):
    """The study of Heusel et al. (2017), appendix A1: noise, blur, black rectangles."""
    images, _ = common.draw_glyphs(32, n=8)
    reference = fid.feature_stats(images, net, batch_size=8)[:2]
    for kind in ("noise", "blur", "rectangles"):
        fids = []
        for level in (0.25, 0.5, 0.75):
            disturbed = disturbances.disturb(images, kind, level)
            stats = fid.feature_stats(disturbed, net, batch_size=8)[:2]
            fids.append(fid.frechet_distance(*reference, *stats))
        assert 0 < fids[0] < fids[1] < fids[2], (kind, fids)
