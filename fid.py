"""FID, the Frechet Inception distance (Heusel et al., 2017, arXiv:1706.08500): lower is better.

A network trained to recognise objects turns every image into 2048 features; FID is the distance
between two Gaussians, one fitted to those of real images and one to those of generated ones:

    FID = |mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2))

    python fid.py imgs/ runs/dcgan-imgs                       # real images, a run
    python fid.py imgs/ generated/dcgan-imgs                  # two folders or .zip
    python fid.py imgs/ runs/dcgan-imgs --all                 # all snapshots, as a curve
    python fid.py imgs/ runs/dcgan-imgs --save_stats imgs.npz # keep those of imgs/ ...
    python fid.py imgs.npz runs/dcgan-imgs                    # ... and reuse them

A source is a folder, a .zip, a data set (mnist, cifar10: the training images; glyphs), statistics
in an .npz, a snapshot .pt or a run's folder. A name with a slash in it, ./mnist, is always a path.
Beside a run or snapshot the other side's images are cropped and resized as for training, and a data
set is reduced to the classes of its --label; otherwise every image keeps its own size.
FIDs compare only where images on both sides, their size, --mode and features are the same.
"""

import contextlib
import hashlib
import itertools
import os
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import common
import generate

ADDRESS = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
WEIGHTS, SHA256 = "pt_inception-2015-12-05-6726825d.pth", "6726825d"  # its first digits
SIDE = 299  # pixels, of the network's input
INPUT, LARGE = (3, SIDE, SIDE), 3 * SIDE * SIDE * 4  # shape and bytes of one image there


def get_args(argv):
    parser = common.Parser(__doc__)
    add, bounded = parser.add_argument, common.bounded
    add("reference", metavar="REFERENCE", help="real images; or any other source, see above")
    add("candidate", metavar="CANDIDATE", nargs="?", help="what to measure: any source")
    add("--save_stats", type=Path, metavar="FILE.npz", help="keep REFERENCE's statistics")
    add("--all", action="store_true", help="every snapshot of the run CANDIDATE: fid.csv, fid.png")
    add("--img_num", type=bounded(int, 2), help="of a generator; default 10000, with --all 2500")
    add("--mode", choices=["legacy", "clean"], default="legacy", help="how images get 299 pixels")
    test = "random: a test without download, as slow (12 images/s on 2 cores): few images do"
    add("--features", choices=["inception", "random"], default="inception", help=test)
    add("--weights", type=Path, help=f"instead of the download of {WEIGHTS}")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: faster, less exact")
    add("--batch_size", type=bounded(int, 1), help="images at once; default 32, on a GPU 128")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--seed", type=bounded(int, 0), default=0, help="of a generator's images")
    add("--data_dir", default="data", help="where mnist and cifar10 are, or are downloaded to")
    add("--cache", default=".cache", help="folder for decoded images")
    args = parser.parse_args(argv)
    if not args.candidate and not args.save_stats:
        raise common.UserError("one source has no distance: add a CANDIDATE, or --save_stats FILE")
    if args.save_stats and args.save_stats.suffix != ".npz":
        raise common.UserError(f"--save_stats {args.save_stats}: its name must end with .npz")
    if args.save_stats and args.reference.endswith(".npz"):
        raise common.UserError(f"--save_stats: {args.reference} holds statistics already")
    args.img_num = args.img_num or (2500 if args.all else 10_000)
    return args


# --------------------------------------------------------------------------------------- network


class Conv(nn.Module):
    """A convolution with BatchNorm and ReLU; without a stride it keeps the size."""

    def __init__(self, before, after, kernel, stride=1, padding="same"):
        super().__init__()
        padding = padding if stride == 1 else 0
        self.conv = nn.Conv2d(before, after, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(after, eps=1e-3)

    def forward(self, h):
        return F.relu(self.bn(self.conv(h)), inplace=True)


class Mixed(nn.Module):
    """Branches that see the same input, their outputs side by side.

    A branch is a chain of layers (channels, kernel[, stride]); a list of two forks its end. The
    layers get the names of the published weights: branch1x1, branch5x5_1, branch3x3_2a, ...
    """

    def __init__(self, before, pool, **branches):
        super().__init__()
        self.pool, self.chains = pool, {}
        for branch, links in branches.items():
            self.chains[branch], channels = [], before
            for i, link in enumerate(links, 1):
                name = f"{branch}_{i}" if len(links) > 1 else branch
                layers = zip("ab", link) if isinstance(link, list) else [("", link)]
                layers = {name + letter: Conv(channels, *layer) for letter, layer in layers}
                for full_name, layer in layers.items():
                    self.add_module(full_name, layer)
                self.chains[branch].append([*layers.values()])
                channels = layer.conv.out_channels

    def forward(self, x):
        outputs = []
        for branch, links in self.chains.items():
            ends = [self.pool(x) if branch == "branch_pool" else x]
            for layers in links:
                ends = [layer(ends[0]) for layer in layers]
            outputs += ends
        return torch.cat(outputs, 1)


AVERAGE = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
MAX, HALVE = nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(3, 2)
ROW, COLUMN = (1, 7), (7, 1)  # kernels, as high and wide


def mixed_5(before, c):
    return Mixed(
        before, AVERAGE, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
        branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(c, 1)])  # fmt: skip


def mixed_6(c):
    return Mixed(
        768, AVERAGE, branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, ROW), (192, COLUMN)],
        branch7x7dbl=[(c, 1), (c, COLUMN), (c, ROW), (c, COLUMN), (192, ROW)],
        branch_pool=[(192, 1)])  # fmt: skip


def mixed_7(before, pool):
    ends = [(384, (1, 3)), (384, (3, 1))]
    return Mixed(
        before, pool, branch1x1=[(320, 1)], branch3x3=[(384, 1), ends],
        branch3x3dbl=[(448, 1), (384, 3), ends], branch_pool=[(192, 1)])  # fmt: skip


class Inception(nn.Module):
    """Inception-v3 as TensorFlow's FID has it: (N, 3, 299, 299) in [-1, 1] -> features (N, 2048).
    Szegedy et al., 2015, arXiv:1512.00567; names and details as in pytorch-fid's weights."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)  # 149 pixels
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)  # 147, then halved
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=0)  # 71, then halved
        self.Mixed_5b, self.Mixed_5c = mixed_5(192, 32), mixed_5(256, 64)  # 35
        self.Mixed_5d = mixed_5(288, 64)
        three, double = [(384, 3, 2)], [(64, 1), (96, 3), (96, 3, 2)]
        self.Mixed_6a = Mixed(288, HALVE, branch3x3=three, branch3x3dbl=double, branch_pool=[])
        self.Mixed_6b, self.Mixed_6c = mixed_6(128), mixed_6(160)  # 17
        self.Mixed_6d, self.Mixed_6e = mixed_6(160), mixed_6(192)
        three, seven = [(192, 1), (320, 3, 2)], [(192, 1), (192, ROW), (192, COLUMN), (192, 3, 2)]
        self.Mixed_7a = Mixed(768, HALVE, branch3x3=three, branch7x7x3=seven, branch_pool=[])
        self.Mixed_7b, self.Mixed_7c = mixed_7(1280, AVERAGE), mixed_7(2048, MAX)  # 8

    def forward(self, h):
        for name, layer in self.named_children():
            h = layer(h)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                h = HALVE(h)
        return h.mean((2, 3))


def load_inception(features="inception", weights=None, device="cpu", precision="fp32"):
    """The network, ready for use, and a name for its features: a hash of its weights.

    `features` "inception": the published weights, or those of the file `weights`; "random":
    He-normal ones, always the same. UserError for a file with other tensors than the network's.
    """
    net = Inception().eval().requires_grad_(False)
    if features == "random":
        source = torch.Generator().manual_seed(0)
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=source)
    else:
        path = weights or Path(torch.hub.get_dir(), "checkpoints", WEIGHTS)
        if not weights and not path.exists():
            common.download(ADDRESS + WEIGHTS, path, SHA256)
        unused = lambda name: name.startswith("fc.") or name.endswith("num_batches_tracked")
        try:
            if not weights and hashlib.sha256(path.read_bytes()).hexdigest()[:8] != SHA256:
                raise ValueError("damaged: remove it, and it is downloaded again")
            state = torch.load(path, map_location="cpu", weights_only=True)
            net.load_state_dict({k: v for k, v in state.items() if not unused(k)})
        except Exception as error:  # no file, damaged, wrong shapes, objects that torch would trust
            reason = "not tensors alone" if "Weights only" in str(error) else str(error)[:200]
            why = f"{path} holds no weights of this network ({reason or 'empty'})"
            raise common.UserError(f"{why}: take {ADDRESS}{WEIGHTS}") from None
    content = b"".join(tensor.numpy().tobytes() for tensor in net.state_dict().values())
    name = f"{features}-{precision}-{hashlib.sha256(content).hexdigest()[:8]}"
    for layer in net.modules():  # each BatchNorm into its convolution: the same function, faster
        if isinstance(layer, Conv):
            layer.conv, layer.bn = fuse_conv_bn_eval(layer.conv, layer.bn), nn.Identity()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return net.to(device, dtype, memory_format=torch.channels_last), name


# --------------------------------------------------------------------------- features, statistics


def bilinear(pixels):
    """uint8 (N, H, W, C), or float32 that it uses up -> (N, 3, 299, 299) in [-1, 1], float32."""
    images = pixels.permute(0, 3, 1, 2).float().div_(255)
    return F.interpolate(images, SIDE, mode="bilinear").mul_(2).sub_(1).expand(-1, 3, -1, -1)


def to_input(pixels, mode):
    """uint8 (H, W, 1 or 3) -> float32 (3, 299, 299) about [-1, 1], on the CPU.

    "legacy": bilinear, not antialiased, as pytorch-fid; "clean": Pillow's bicubic, antialiased, in
    float, as clean-fid (Parmar et al., 2022, arXiv:2104.11222).
    """
    if mode == "legacy":
        return bilinear(torch.from_numpy(pixels.astype(np.float32))[None])[0]
    bands = (Image.fromarray(band.astype(np.float32)) for band in pixels.transpose(2, 0, 1))
    bands = [np.asarray(band.resize((SIDE, SIDE), Image.BICUBIC)) for band in bands]
    return ((torch.from_numpy(np.stack(bands)).clamp(0, 255) - 128) / 128).expand(INPUT)


def prepared(image, mode):
    """to_input of an image, on the CPU, where it must be or saves memory; else the image itself."""
    late = image.shape == INPUT or (mode == "legacy" and image.nbytes <= LARGE)
    return image if late else to_input(image, mode)


class Moments:
    """Mean and covariance of rows as they pass, float64; memory does not grow with their number."""

    def __init__(self, d=2048, device="cpu"):
        self.n, self.mean = 0, torch.zeros(d, dtype=torch.float64, device=device)
        self.scatter = self.mean.new_zeros(d, d)  # n - 1 times the covariance

    def add(self, rows):
        """Take in rows (n, d); Chan et al., 1983."""
        rows, n = rows.to(self.mean.device).double(), self.n + len(rows)
        mean = rows.mean(0)
        centred, shift = rows - mean, mean - self.mean
        self.scatter.addmm_(centred.T, centred).addr_(shift, shift, alpha=self.n * len(rows) / n)
        self.mean += shift * len(rows) / n
        self.n = n


def feature_stats(images, net=None, mode="legacy", batch_size=None, source="images", total=None):
    """Mean (2048,), covariance (2048, 2048) and number of the features of images, in float64.

    images: a uint8 array (N, H, W, C), or any iterable of (H, W, C) of any sizes, C 1 or 3, or of
    what to_input makes of them. net: of load_inception; mode: see to_input; batch_size: 32 on a
    CPU, else 128. `source` and `total` are for the progress. UserError for fewer than two images.
    """
    net = net or load_inception()[0]
    weight = next(net.parameters())
    batch_size = batch_size or (32 if weight.device.type == "cpu" else 128)
    inputs = weight.new_empty(batch_size, *INPUT).to(memory_format=torch.channels_last)
    moments = Moments(device=weight.device if weight.is_cuda else "cpu")  # mps has no float64
    prepare, images = lambda image: prepared(image, mode), iter(images)
    say = lambda: f"{source}: features of {moments.n:,}{f' of {total:,}' if total else ''} images"
    with ThreadPoolExecutor(os.cpu_count()) as pool, torch.no_grad(), common.exact():
        while part := list(pool.map(prepare, itertools.islice(images, batch_size))):
            common.progress(say())
            end = 0
            for shape, group in itertools.groupby(part, lambda image: tuple(image.shape)):
                group = torch.from_numpy(np.stack([*group]))
                group = group.to(weight.device, non_blocking=weight.is_cuda)
                start, end = end, end + len(group)
                inputs[start:end] = group if shape == INPUT else bilinear(group)
            inputs[end:] = 0  # always full batches, since rounding may depend on their size
            moments.add(net(inputs)[:end])
    common.progress(say(), last=True)
    if moments.n < 2:
        raise common.UserError("statistics need two images or more")
    return moments.mean.cpu().numpy(), moments.scatter.div_(moments.n - 1).cpu().numpy(), moments.n


# -------------------------------------------------------------------------------------- distance


def factor(sigma):
    """L (d, rank) with L L^T = sigma: by Cholesky, or out of eigenvectors where it is singular."""
    noise = len(sigma) * np.finfo(float).eps * sigma.diagonal().max()
    with contextlib.suppress(np.linalg.LinAlgError):
        L = np.linalg.cholesky(sigma)
        if L.diagonal().min() ** 2 > noise:
            return L
    values, vectors = scipy.linalg.eigh(sigma)
    kept = values > noise
    return vectors[:, kept] * np.sqrt(values[kept])


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Between N(mu1, sigma1) and N(mu2, sigma2), means (d,) and covariances (d, d); a float >= 0.

    |mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Dowson & Landau, 1982). With S1 = L1 L1^T and
    S2 = L2 L2^T the eigenvalues of (S1 S2)^(1/2) are the singular values of L1^T L2: real, never
    negative, and exact for singular covariances too, unlike a matrix square root.
    """
    mu1, mu2, sigma1, sigma2 = (np.asarray(x, np.float64) for x in (mu1, mu2, sigma1, sigma2))
    if mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == (*mu1.shape, *mu1.shape):
        raise ValueError(f"shapes {mu1.shape} {sigma1.shape} and {mu2.shape} {sigma2.shape}")
    between = torch.from_numpy(factor(sigma1).T @ factor(sigma2))
    root = torch.linalg.svdvals(between).sum().item()
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root
    return max(0.0, float(distance))


# --------------------------------------------------------------------------------------- sources

SETTINGS = ("size", "channels", "mode", "features")  # must agree; size 0: every image its own


def is_generator(source):
    return source.suffix == ".pt" or common.is_run(source)


def images_of(source, like, label, args):
    """Of a source, a word of the command line: how many images it may have, then the images.

    They are uint8 (H, W, C), or what `prepared` makes of them. A bare "mnist" is the data set.
    `like`: (image_size, channels) as for training, None: own sizes; `label`: classes or None.
    """
    names, labels = [], None
    if source in common.DATASETS:
        size, channels = like or (None, "auto")
        images, labels = common.read_dataset(source, args.data_dir, size, str(channels))
        names = [str(number) for number in range(labels.max() + 1)]
    elif is_generator(Path(source)):
        (G, z), numbers = generate.load_generator(source, args.device), range(args.img_num)
        yield args.img_num
        for i in range(0, args.img_num, common.CHUNK):
            yield from generate.sample(G, z, numbers[i : i + common.CHUNK], args.seed)
        return
    elif like:
        images = common.load_images(source, like[0], str(like[1]), args.cache)
        names, labels = common.classes_of(images.names)
    else:
        files, open_image = common.image_files(source)
        yield len(files)
        work = lambda file: prepared(common.decode(file), args.mode)  # many large ones fill memory
        for (image, error), name in zip(common.decoded([*files], open_image, work), files):
            if error:
                print(f"skipped: {name}: {error}", file=sys.stderr)
            else:
                yield image
        return
    if label and labels is not None:
        print(f"{source}: only the classes count that the run has learned: {' '.join(label)}")
        images = images[np.isin(labels, common.class_numbers(label, names))]
    yield from itertools.chain([len(images)], images)


def opened(source, net, like, label, settings, args):
    """Look at a source, to fail early; returns what makes a dict of mu, sigma, n, `settings`."""
    images = images_of(source, like, label, args)
    total, *first = itertools.islice(images, 3)
    if len(first) < 2:
        raise common.UserError(f"{source} has {len(first)} images to read: FID needs two or more")
    options = net, args.mode, args.batch_size, source, total
    measured = lambda: feature_stats(itertools.chain(first, images), *options)
    return lambda: dict(zip(("mu", "sigma", "n"), measured())) | settings


def read_stats(path, settings):
    """Statistics out of an .npz; UserError where they are none, or do not fit `settings`.
    Files of pytorch-fid and TTUR hold mu and sigma alone: taken on trust, and it is said."""
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("no .npz archive, or cut short")
        with np.load(path, allow_pickle=False) as file:
            stats = {name: file[name] for name in ("mu", "sigma", *file.files)}
        stats |= {name: stats[name].item() for name in ("n", *SETTINGS) if name in stats}
        mu, sigma, n = stats["mu"], stats["sigma"], stats.get("n", 2)
        kinds = mu.shape, sigma.shape, mu.dtype.kind, sigma.dtype.kind
        if kinds != ((2048,), (2048, 2048), "f", "f") or not isinstance(n, int) or n < 2:
            raise ValueError(f"mu {mu.shape} {mu.dtype}, sigma {sigma.shape} {sigma.dtype}, n {n}")
        noise = 1e-6 * np.trace(sigma) + 1e-30  # of rounding to float32; more than 0 for cholesky
        finite = np.isfinite(mu).all() and np.isfinite(sigma).all()
        if not finite or abs(sigma - sigma.T).max() > noise:
            raise ValueError("values that are not finite, or sigma is no covariance")
        np.linalg.cholesky(sigma + noise * np.eye(2048))  # a LinAlgError: not positive definite
    except Exception as error:  # whatever numpy stumbles on
        raise common.UserError(f"{path} holds no statistics ({error})") from None
    for name, ours in settings.items():
        if stats.get(name, ours) != ours:
            why = f"{path} has {name} {stats[name]}, not {ours} as needed here: make it anew"
            raise common.UserError(f"{why} with --save_stats, beside this candidate and flags")
    if "n" not in stats:
        print(f"{path} does not say where it comes from: n, size, mode and features unchecked")
    return {"n": 0, **settings, **stats}


def compare(reference, candidate, names):
    """Print and return the FID of two statistics, with where it comes from."""
    fid = frechet_distance(*(stats[x] for stats in (reference, candidate) for x in ("mu", "sigma")))
    counts = [stats["n"] for stats in (reference, candidate)]
    least = min((n for n in counts if n), default=10_000)
    sides = " and ".join(f"{name} ({n or '?'} images)" for name, n in zip(names, counts))
    how = ", ".join(f"{name} {candidate.get(name, 'unknown')}" for name in SETTINGS)
    how = how.replace("size 0, channels 0", "size own")
    print(f"FID {fid:.4f} between {sides}; {how}", flush=True)
    if least < 10_000:
        print(f"{least:,} images give a higher FID than more would: compare like with like")
    if least < 2048:
        print("below 2,048 images the covariance is singular: a rough figure only")
    if "features random" in how:
        print("random features: a test of the plumbing, no measure of quality")
    return fid


def measure_all(run, reference, net, like, settings, args):
    """The FID of each snapshot of a run, into fid.csv and fid.png of its folder."""
    steps, fids, lines = [], [], ["snapshot,step,fid\n"]
    snapshots = common.by_epoch(run.glob("generator_*.pt"))
    for path in snapshots:
        stats = opened(str(path), net, like, None, settings, args)()
        steps.append(common.load_file(path).get("step", 0))
        fids.append(compare(reference, stats, (args.reference, path)))
        lines.append(f"{path.name},{steps[-1]},{fids[-1]:.6f}\n")
        common.write_file(run / "fid.csv", "".join(lines).encode())
    title = f"FID to {args.reference}, {args.img_num:,} samples, {settings['features']}"
    common.save_curves([(title, steps, {"": fids})], run / "fid.png", "steps")
    print(f"best: {snapshots[np.argmin(fids)]}, {min(fids):.4f}; all in {run}/fid.csv and fid.png")


def facts_of(run):
    """(image_size, channels) of what a run or snapshot generates, and the --label it learned."""
    _, _, size, channels = generate.sample(*generate.load_generator(run), [0]).shape
    return (size, channels), common.load_file(run)["config"].get("label")


def check_places(args):
    """UserError, before hours of work, for what would fail after them."""
    for source in filter(None, (args.reference, args.candidate)):
        if source in common.DATASETS and Path(source).exists():
            print(f"{source} is the data set; for what lies here by that name type ./{source}")
        elif source not in common.DATASETS and not Path(source).exists():
            raise common.UserError(f"{source} does not exist: name a folder, a .zip, a run, ...")
    if args.save_stats and not os.access(args.save_stats.parent, os.W_OK):
        raise common.UserError(f"--save_stats {args.save_stats}: no such folder to write in")
    if args.all and not (args.candidate and any(Path(args.candidate).glob("generator_*.pt"))):
        raise common.UserError("--all needs a run's folder with snapshots as CANDIDATE")


def main():
    with common.exit_codes():
        args = get_args(sys.argv[1:])
        check_places(args)
        args.device = common.choose_device(args.device)
        sources = [name for name in (args.reference, args.candidate) if name]
        paths = [Path(name) for name in sources if name not in common.DATASETS]
        facts = [facts_of(path) for path in paths if is_generator(path)]
        like, label = facts[0] if facts else (None, None)
        if any(shape != like for shape, _ in facts):
            raise common.UserError(f"the generators differ in (size, channels): {facts}")
        net, settings, stats = None, {}, {}
        if not all(name.endswith(".npz") for name in sources):
            net, features = load_inception(args.features, args.weights, args.device, args.precision)
            settings = dict(zip(SETTINGS, (*(like or (0, 0)), args.mode, features), strict=True))
        if args.all:
            sources.pop()  # its snapshots are measured one by one
        for name in [name for name in sources if name.endswith(".npz")]:  # fails early
            stats[name] = read_stats(name, settings)
            settings = settings or {k: v for k, v in stats[name].items() if k in SETTINGS}
        jobs = {x: opened(x, net, like, label, settings, args) for x in sources if x not in stats}
        stats |= {name: job() for name, job in jobs.items()}
        reference = stats[args.reference]
        try:
            if args.all:
                measure_all(Path(args.candidate), reference, net, like, settings, args)
            elif args.candidate:
                compare(reference, stats[args.candidate], sources)
        finally:  # a disk that is full must not cost the figure, nor Ctrl-C the statistics
            if args.save_stats:
                with common.replacing(args.save_stats) as temporary, temporary.open("wb") as file:
                    np.savez(file, **reference)
                print(f"{args.save_stats}: statistics of {args.reference}")


if __name__ == "__main__":
    main()
