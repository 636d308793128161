"""What the training scripts share. No network, loss or update rule: those are in the train_*.py.

A script has a Generator(**generator_args), (N, numbers) -> float32 images in [-1, 1], by which
generate.py builds it anew, and a Discriminator, images -> float32 logits (N,).

data      decode, load_images, load_data; read_dataset: MNIST, CIFAR-10, drawn characters
model     prepare, averaged, update_ema, draw_latents, latents, generate, Augment, summary
pictures  to_uint8, save_grid, save_gif, save_curves
--------- to adapt a script you need not read on
flags     run_parser, parse_flags, config.ini
devices   setup, choose_device, sync_grads and the ranks of torchrun
files     UserError, exit_codes, replacing, save_file, load_file
Run       a run's folder and all that is written into it; its docstring is a timeline
"""

import argparse
import configparser
import contextlib
import copy
import datetime
import gzip
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

# ------------------------------------------------------------------------------------------ data

ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
OTHER_ENDINGS = (".heic", ".heif", ".avif", ".jp2", ".jxl", ".tga", ".psd", ".svg", ".dng")
GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L")


def decode(file, image_size=None, channels=3):
    """Decode an image file into uint8 (H, W, channels); raises whatever Pillow stumbles on.

    EXIF orientation is applied, 16-bit grey is scaled, transparency is laid on white, of an
    animation the first frame counts. With `image_size`: its central square, resized.
    """
    image = Image.open(file)
    if image_size:
        image.draft(None, (2 * image_size, 2 * image_size))  # JPEG: decode photographs small
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range: convert them to 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits, or 32 that hold 16
        values = np.asarray(image).astype(np.float32) / 257  # 65535 -> 255
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if image_size:
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(image.height, image.width, channels)


def decoded(names, open_image, work=None, **options):
    """Decode files in threads; yields (pixels, None) or (None, what is wrong), in their order."""

    def attempt(name):
        try:
            with open_image(name) as file:
                return (work or decode)(file, **options), None
        except Exception as error:  # decoders raise anything at all on damaged files
            return None, f"{name}: {str(error) or type(error).__name__}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(names), CHUNK):  # few at a time: photographs may be large
            yield from pool.map(attempt, names[start : start + CHUNK])
            done = min(start + CHUNK, len(names))
            progress(f"reading: {done:,} of {len(names):,} files", last=done == len(names))


def image_files(path):
    """Of a folder or .zip: sorted (name, bytes, time or hash) of its images, and what opens one."""
    path, names = Path(path), []
    if path.is_dir():
        place = lambda name: os.path.join(path, name)
        for folder, subfolders, inside in os.walk(path):
            if "checkpoint.pt" in inside:  # a run: its sample grids are no data
                inside = subfolders[:] = []
            subfolders[:] = [name for name in subfolders if name[0] != "."]
            names += [os.path.join(folder, name)[len(place("")) :] for name in inside]
        # of a link to nowhere its own facts
        stat = lambda name: os.stat(place(name), follow_symlinks=os.path.exists(place(name)))
        facts = lambda name: (stat(name).st_size, stat(name).st_mtime_ns)
        open_image = lambda name: open(place(name), "rb")  # noqa: SIM115
    else:
        try:
            names = (archive := zipfile.ZipFile(path)).namelist()
        except (OSError, zipfile.BadZipFile) as error:
            state = (
                f"is neither a folder nor a .zip ({error})" if path.exists() else "does not exist"
            )
            raise UserError(f"{path} {state}: pass a folder or .zip of images") from None
        facts = lambda name: (archive.getinfo(name).file_size, archive.getinfo(name).CRC)
        open_image = lambda name: io.BytesIO(archive.read(name))
    names = [name for name in names if "/." not in f"/{name}" and "__MACOSX" not in name]
    if other := sum(name.lower().endswith(OTHER_ENDINGS) for name in names):
        print(f"{other:,} images are left out: {' '.join(OTHER_ENDINGS)} are not read")
    names = sorted(name for name in names if name.lower().endswith(ENDINGS))
    if not names:
        searched = f"{' '.join(ENDINGS)}, also in subfolders that are no run"
        raise UserError(f"no images in {path} (looked for {searched}): pass another folder or .zip")
    return [(name, *facts(name)) for name in names], open_image


def load_images(path, image_size, channels="auto", cache=".cache"):
    """Decode a folder or .zip once; returns a memory-mapped uint8 (N, H, W, C) array.

    Images are cropped to their central square and resized to `image_size`. `channels` is "1", "3"
    or "auto": 1 if all files are grey. The result stays in `cache` while files and settings stay
    the same; its attribute `fingerprint` follows from the files' names and sizes. Undecodable files
    are skipped and listed; UserError if nothing is left.
    """
    files, open_image = image_files(path)
    names, whole = [name for name, *_ in files], Path(path).resolve()
    if channels == "auto":
        modes = decoded(names, open_image, work=lambda file: Image.open(file).mode)
        channels = 3 if any(mode not in (None, *GREY_MODES) for mode, _ in modes) else 1
    place = f"{whole.stem}-{short_hash(str(whole))[:6]}-{image_size}px-{channels}-"
    cached = Path(cache, f"{place}{short_hash((4, files))}.npy")  # another 4 where decode changes
    try:
        images = np.load(cached, mmap_mode="r")
    except (OSError, ValueError, EOFError):  # not there, or not whole
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            fill_cache(cached, names, open_image, image_size, int(channels))
            for stale in cached.parent.iterdir():  # made when the files were others
                if stale.name.startswith(place) and stale.stem != cached.stem:
                    stale.unlink(missing_ok=True)
        except (OSError, UserError) as error:
            raise UserError(f"cannot keep decoded images ({error}): pass another --cache") from None
        images = np.load(cached, mmap_mode="r")
    notes = cached.with_suffix(".txt")
    if not len(images):
        raise UserError(f"none of the {len(files)} images in {path} can be decoded, see {notes}")
    each, found = f"{images.shape[1:]} each, {images.nbytes / 1e6:,.0f} MB", ""
    with contextlib.suppress(OSError), notes.open(errors="replace") as file:
        found = f"; {file.readline().strip()}"
    print(f"{len(images):,} images of {path}, {each}{found}; in {cached}", flush=True)
    images.fingerprint = short_hash([(Path(name).name, size) for name, size, _ in files])
    return images


def short_hash(content):
    return hashlib.sha256(repr(content).encode()).hexdigest()[:12]


def fill_cache(cached, names, open_image, image_size, channels):
    """Decode files into the .npy `cached`; what failed, and copies, into a .txt beside it."""
    hashes, errors, shape = [], [], (image_size, image_size, channels)
    header = lambda: {"descr": "|u1", "fortran_order": False, "shape": (len(hashes), *shape)}
    with replacing(cached) as part, part.open("wb") as file:  # no map: the disk may be full
        np.lib.format.write_array_header_1_0(file, header())
        for pixels, error in decoded(names, open_image, image_size=image_size, channels=channels):
            if error:
                errors.append(error)
            else:
                file.write(pixels)
                hashes.append(hashlib.sha256(pixels).digest())
        file.seek(0)  # numpy leaves room in a header for any first axis
        np.lib.format.write_array_header_1_0(file, header())
    notes, duplicates = cached.with_suffix(".txt"), len(hashes) - len(set(hashes))
    facts = f"exact duplicates: {duplicates:,}"
    if errors:
        facts += f"; {len(errors):,} of {len(names):,} files cannot be decoded, see {notes}"
    write_file(notes, "\n".join([facts, *errors, ""]).encode("utf-8", "backslashreplace"))


def load_data(args):
    """The images that the flags name, uint8 (N, H, W, C), and their classes, int64 (N,) or None.

    `args` gets a fingerprint of them, so that a run is not resumed with others.
    """
    if args.label and args.path:
        raise UserError(f"--label needs --dataset {' or '.join(DATASETS)}: --path has no classes")
    if RANK > 0:
        dist.barrier()  # rank 0 comes first: what it decodes or downloads is there for the others
    if args.path:
        images = load_images(args.path, args.image_size, args.channels, args.cache)
        args.fingerprint, labels = images.fingerprint, None
    else:
        data = args.dataset, args.data_dir, args.image_size, args.channels
        (images, labels), args.fingerprint = read_dataset(*data), args.dataset
    if RANK == 0 and WORLD_SIZE > 1:
        dist.barrier()
    chosen = np.isin(labels, args.label) if args.label else slice(None)
    return images[chosen], None if labels is None else labels[chosen]


# MNIST, CIFAR-10 and drawn characters

DATASETS = ("mnist", "cifar10", "glyphs")
MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
CIFAR10 = "https://www.cs.toronto.edu/~kriz/"
FILES = {  # address, the first digits of the sha256
    "train-images-idx3-ubyte.gz": (MNIST, "440fcabf73cc546fa21475e81ea37026"),
    "train-labels-idx1-ubyte.gz": (MNIST, "3552534a0a558bbed6aed32b30c495cc"),
    "cifar-10-binary.tar.gz": (CIFAR10, "c4a38c50a1bc5f3a1c5537f2155ab9d6"),
}


def read_dataset(name, data_dir="data", image_size=None, channels="auto"):
    """The training split of one of DATASETS: uint8 images (N, H, W, C) and labels, int64 (N,).

    Read from `data_dir`, downloaded into it if nothing is there; "glyphs" are drawn. Files that are
    there are checked for size and layout, downloads for their hash; UserError if that fails.
    """
    if name == "glyphs":
        return draw_glyphs(image_size or 32, 1 if channels == "1" else 3)
    folder, shape = Path(data_dir), (60_000, 28, 28)
    if name == "mnist":
        images = find_or_download("train-images-idx3-ubyte.gz", folder, read_idx, shape)[..., None]
        labels = find_or_download("train-labels-idx1-ubyte.gz", folder, read_idx, shape[:1])
    else:
        records = find_or_download("cifar-10-binary.tar.gz", folder, read_cifar10)
        labels, images = records[:, 0], records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return resized(images, image_size or images.shape[1], channels), labels.astype(np.int64)


def find_or_download(name, folder, read, *options):
    """What `read` makes of a file in one of its usual places below `folder`, or downloaded."""
    plain = name.removesuffix(".gz")
    places = [name, plain, f"MNIST/raw/{name}", f"MNIST/raw/{plain}"]
    places += ["cifar-10-batches-bin"] if name.startswith("cifar") else []
    path = next((folder / place for place in places if (folder / place).exists()), folder / name)
    if not path.exists():
        download(FILES[name][0] + name, path, FILES[name][1])
    try:
        return read(path, *options)
    except Exception as error:  # a damaged archive raises whatever its reader stumbles on
        raise UserError(f"{path} is no {plain} ({error}): remove it") from None


def download(url, path, sha256):
    """Fetch a file, which takes its name once its hash is right; UserError says where to put it."""
    print(f"downloading {url} to {path}", flush=True)
    socket.setdefaulttimeout(60)  # seconds of silence
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), sha256)
    except Exception as error:  # no network, a cut line, another hash
        raise UserError(f"no download of {url} ({error}): put it into {path.parent}") from None


def read_idx(path, shape):
    """The values of an IDX file of bytes, plain or gzipped, if it has this shape."""
    header = np.array([0x800 + len(shape), *shape], ">i4").tobytes()
    content = path.read_bytes()
    content = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    if len(content) != len(header) + math.prod(shape) or not content.startswith(header):
        raise ValueError("wrong size or header")
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)


def read_cifar10(path):
    """The records of the five training batches, from the .tar.gz or the folder it unpacks to."""
    names = [f"data_batch_{i}.bin" for i in range(1, 6)]
    if path.is_dir():
        batches = [(path / name).read_bytes() for name in names]
    else:
        with tarfile.open(path) as archive:  # read, never unpacked
            batches = [archive.extractfile(f"cifar-10-batches-bin/{n}").read() for n in names]
    records = np.frombuffer(b"".join(batches), np.uint8).reshape(50_000, 3073)
    if records[:, 0].max() > 9:
        raise ValueError("wrong labels")
    return records


def resized(images, image_size, channels):
    """uint8 (N, H, W, C) at another size, and in grey or colour where asked for."""
    mode, size = {"auto": None, "1": "L", "3": "RGB"}[channels], (image_size, image_size)
    if images.shape[1] == image_size and not mode:
        return images
    pictures = (to_picture(row).resize(size, Image.Resampling.BICUBIC) for row in images)
    rows = [np.asarray(picture.convert(mode) if mode else picture) for picture in pictures]
    return np.stack(rows).reshape(len(images), *size, -1)


GLYPHS = "ABEHKSTX2345"  # few and unlike: a small network learns them in minutes


def draw_glyphs(image_size, channels=3, n=4800, seed=0):
    """n coloured characters in Pillow's own font, uint8 (n, image_size, image_size, channels), and
    which of GLYPHS each is, int64 (n,)."""
    rng = np.random.default_rng(seed)
    side = 3 * image_size  # drawn large, turned, then reduced: smooth edges
    fonts = [ImageFont.load_default(side * share) for share in (0.7, 0.8, 0.9)]
    images, labels = [], []
    for _ in range(n):
        mask, place = Image.new("L", (side, side)), side * rng.uniform(0.45, 0.55, 2)
        font, label = fonts[rng.integers(3)], rng.integers(len(GLYPHS))
        ImageDraw.Draw(mask).text(
            tuple(place), GLYPHS[label], 255, font, "mm", stroke_width=side // 40
        )
        mask = mask.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
        mask = mask.resize((image_size, image_size), Image.Resampling.BOX)
        hue = rng.integers(360)
        image = Image.new("RGB", mask.size, f"hsl({hue}, 60%, 85%)")
        image.paste(f"hsl({hue + rng.integers(60, 300)}, 80%, 30%)", mask=mask)
        images.append(np.asarray(image.convert("L" if channels == 1 else "RGB")))
        labels.append(label)
    return np.stack(images).reshape(n, image_size, image_size, channels), np.array(labels)


# ----------------------------------------------------------------------------------------- model


def prepare(net, device, args):
    """Place a network: channels_last; its forward pass in bf16 or compiled, where asked for.

    Parameters stay float32. Outside the forward pass, so in the losses, nothing is in bf16.
    """
    net.to(device, memory_format=torch.channels_last)
    if args.precision == "bf16":
        net.forward = torch.autocast(device.type, torch.bfloat16)(net.forward)
    if args.compile:
        net.compile()
    return net


def averaged(G, device):
    """A copy of G, before it is prepared, for the average of its weights."""
    G_ema = copy.deepcopy(G).requires_grad_(False).eval()
    return G_ema.to(device, memory_format=torch.channels_last)


@torch.no_grad()
def update_ema(G_ema, G, step, decay):
    """Move the averaged generator towards G, faster in the first steps; `step` counts from 0.

    Buffers are copied, but for BatchNorm's: Run makes those when G_ema is used.
    """
    average = get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))
    average(list(G_ema.parameters()), list(G.parameters()), step)
    torch.autograd.graph.increment_version(list(G_ema.parameters()))  # a GPU does not by itself
    for ours, theirs in zip(G_ema.modules(), G.modules()):
        if not isinstance(ours, nn.modules.batchnorm._BatchNorm):
            for buffer, current in zip(ours.buffers(False), theirs.buffers(False)):
                buffer.copy_(current)


@contextlib.contextmanager
def exact():
    """In the block a GPU computes float32 as such, and the same bits each time."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    with cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        try:
            yield
        finally:
            matmul.allow_tf32 = before


@exact()
@torch.no_grad()
def refresh_batchnorm(G_ema, latent, generator, device="cpu"):
    """Estimate the BatchNorm statistics of averaged weights anew: no copy of G's would fit them."""
    layers = [m for m in G_ema.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for layer in layers:  # they alone learn: spectral normalisation, dropout stay as they are
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all batches
        layer.train()
    for _ in range(8 if layers else 0):
        G_ema(draw_latents(latent, CHUNK, generator=generator).to(device))
    G_ema.eval()


def draw_latents(latent, n, device="cpu", generator=None, label=None):
    """n inputs of G, (n, dim): {"dim": 100, "distribution": "normal" or "uniform"} says how.

    With {"classes": 10} besides, a class follows in one-hot form, (n, dim + 10): `label`, or any.
    """
    draw = torch.rand if latent["distribution"] == "uniform" else torch.randn
    z = draw(n, latent["dim"], device=device, generator=generator)
    z = z * 2 - 1 if latent["distribution"] == "uniform" else z
    if "classes" not in latent:
        return z
    label = torch.randint(latent["classes"], (n,), generator=generator) if label is None else label
    return torch.cat([z, torch.eye(latent["classes"], device=device)[label].expand(n, -1)], 1)


def latents(latent, seed, numbers, label=None):
    """G's inputs for the images with these numbers, each from (seed, number) alone; on the CPU.

    Where there are classes, they take turns, or all are of class `label`.
    """
    source, rows = torch.Generator(), []
    for number in numbers:
        source.manual_seed(mixed(seed, "image", number))
        its_class = number % latent.get("classes", 1) if label is None else label
        rows.append(draw_latents(latent, 1, generator=source, label=its_class))
    return torch.cat(rows)


def mixed(*key):
    """One 63-bit seed out of several numbers and words, so that their streams are independent."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


CHUNK = 64  # images generated at once; always as many, since rounding may depend on it


@exact()
@torch.no_grad()
def generate(G, z):
    """Images uint8 (n, H, W, C) of z (n, dim); each the same whatever is beside it."""
    device, images = next(G.parameters()).device, []
    for part in z.split(CHUNK):
        padded = F.pad(part, (0, 0, 0, CHUNK - len(part)))
        images.append(to_uint8(G(padded.to(device))[: len(part)]))
    return np.concatenate(images)


KINDS = ("translation", "scale", "stretch", "colour", "cutout")
BY_NEED = KINDS[:3]
TARGET, MOST, PACE = 0.75, 0.5, 50_000  # of `sure`; of p; images for p to go from 0 to 1


class Augment(nn.Module):
    """Disturbs what D sees, images (N, C, H, W), real and generated alike; G learns through it.

    A list of KINDS: each on every image (DiffAugment, Zhao et al., 2020, arXiv:2006.10738). "need":
    BY_NEED, each on an image with probability p, which `update` moves (Karras et al., 2020,
    arXiv:2006.06676). "none": nothing.
    """

    def __init__(self, policy):
        super().__init__()
        self.by_need = policy == "need"
        self.kinds = BY_NEED if self.by_need else policy.split(",")
        always = float(policy not in ("need", "none"))
        self.register_buffer("p", torch.tensor(always), persistent=self.by_need)
        self.register_buffer("sure", torch.tensor(0.0), persistent=self.by_need)

    @torch.no_grad()
    def update(self, logits_real):
        """After an update of D: move p by D's logits of the real images as it saw them, (N,)."""
        if self.by_need:
            self.sure.lerp_(rank_mean(logits_real.sign().mean()), 0.03)
            step = len(logits_real) * WORLD_SIZE / PACE
            self.p.add_((self.sure - TARGET).sign(), alpha=step).clamp_(0, MOST)

    def forward(self, images):
        if "none" in self.kinds:
            return images
        n, _, height, width = images.shape
        rand = lambda: torch.rand(n, 1, 1, 1, device=images.device)
        some = lambda values: values * (rand() < self.p)  # 0 leaves an image as it is
        if "colour" in self.kinds:
            images = images + some(rand() - 0.5)  # brightness
            grey = images.mean(1, keepdim=True)
            images = (images - grey) * (1 + some(2 * rand() - 1)) + grey  # saturation
            mean = images.mean((1, 2, 3), keepdim=True)
            images = (images - mean) * (1 + some(rand() - 0.5)) + mean  # contrast
        zero = torch.zeros(n, 1, 1, 1, device=images.device)
        scale = some(0.2 * torch.randn_like(zero)) if "scale" in self.kinds else zero
        stretch = some(0.2 * torch.randn_like(zero)) if "stretch" in self.kinds else zero
        moved = "translation" in self.kinds  # by whole pixels, up to an eighth
        shift = lambda side: some((rand() - 0.5) * side / 4).round() if moved else zero
        down, right = shift(height), shift(width)
        rows = resampling(height, 2 ** (scale - stretch), down)
        columns = resampling(width, 2 ** (scale + stretch), right)
        images = rows @ images @ columns.mT
        if "cutout" in self.kinds:  # a square hole of half the side, centred anywhere
            y, x = (torch.arange(side, device=images.device) for side in (height, width))
            tall = (y[:, None] - rand() * height).abs() < height / 4
            wide = (x - rand() * width).abs() < width / 4
            images = images * ~(tall & wide & (rand() < self.p))
        return images


def resampling(side, scale, shift):
    """Matrices (N, 1, side, side) that resize rows about their centre, then shift them by pixels:
    bilinear, with zeros from outside. `scale`, `shift`: (N, 1, 1, 1)."""
    place = torch.arange(side, device=scale.device) - (side - 1) / 2
    return F.relu(1 - ((place[:, None] - shift) / scale - place).abs())


def summary(net, *inputs):
    """The layers of `net` as PyTorch prints them, its input and output shapes and parameters."""
    with torch.no_grad():
        output = net(*inputs)
    shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
    count = sum(p.numel() for p in net.parameters())
    return f"{net}\n{shapes} -> {tuple(output.shape)}, {count:,} parameters"


# -------------------------------------------------------------------------------------- pictures


def to_uint8(images):
    """(N, C, H, W) in [-1, 1] -> uint8 (N, H, W, C) array."""
    pixels = images.float().mul(127.5).add(127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def to_picture(pixels):
    """uint8 (H, W, C) -> Pillow image."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def encoded(image, kind="PNG", **options):
    """The bytes of an image file; in memory, as Pillow's writing hides that a disk is full."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def save_grid(images, path, columns=None, gap=2):
    """Save uint8 (n, H, W, C) as one PNG, row by row; by default as wide as high."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    missing = -len(images) % columns
    images = np.pad(images, ((0, missing), (0, gap), (0, gap), (0, 0)), constant_values=255)
    n, height, width, channels = images.shape
    grid = images.reshape(n // columns, columns, height, width, channels).swapaxes(1, 2)
    grid = grid.reshape(n // columns * height, columns * width, channels)
    grid = np.pad(grid, ((gap, 0), (gap, 0), (0, 0)), constant_values=255)
    write_file(path, encoded(to_picture(grid)))


def save_gif(frames, path, limit=10_000_000):
    """Save Pillow images as an animation of about 10 s; reduced, where it takes `limit` bytes."""
    times = [max(40, 10_000 // len(frames))] * (len(frames) - 1) + [2000]  # ms; rests on the last
    width, height = frames[0].size
    scale = min(1, math.sqrt(limit / (width * height * len(frames))))  # a byte a pixel, about
    content = bytes(limit)
    while len(content) >= limit:
        size = math.ceil(width * scale), math.ceil(height * scale)
        small = [frame.convert("RGB").resize(size).quantize() for frame in frames]
        options = {"save_all": True, "append_images": small[1:], "duration": times, "loop": 0}
        content, scale = encoded(small[0], "GIF", **options), 0.8 * scale
    write_file(path, content)


COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


def save_curves(panels, path, xlabel, width=900, height=300):
    """Draw line charts one below the other: panels is [(title, x, {label: y, ...}), ...], with up
    to four curves each."""
    canvas = Image.new("RGB", (width, height * len(panels)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for i, (title, x, curves) in enumerate(panels):
        left, top, right, bottom = 70, i * height + 40, width - 20, (i + 1) * height - 45
        ys = np.array(list(curves.values()))
        x_ticks, y_ticks = np.linspace(min(x), max(x), 5), np.linspace(ys.min(), ys.max(), 5)
        columns, rows = np.linspace(left, right, 5), np.linspace(bottom, top, 5)
        for column, row, x_tick, y_tick in zip(columns, rows, x_ticks, y_ticks, strict=True):
            draw.line((left, row, right, row), "#dddddd")
            draw.text((left - 6, row), f"{y_tick:.3g}", "black", font, anchor="rm")
            draw.text((column, bottom + 6), f"{x_tick:.4g}", "black", font, anchor="mt")
        draw.text(((left + right) / 2, bottom + 24), xlabel, "black", font, anchor="mt")
        draw.text((left, top - 8), title, "black", font, anchor="lb")
        for j, ((label, y), colour) in enumerate(zip(curves.items(), COLOURS)):
            xy = np.interp(x, x_ticks, columns), np.interp(y, y_ticks, rows)
            draw.line(list(zip(*xy, strict=True)), colour, 2, joint="curve")
            draw.text((right - 130 * j, top - 8), label, colour, font, anchor="rb")
    write_file(path, encoded(canvas))


# ------------------------------------------------------------------------------------------------
# What follows carries a run along. To adapt a script you need not read it: what a copy may rely on
# stands in the README, "Your own variant".
# ----------------------------------------------------------------------------------------- flags


class HelpLayout(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class Parser(argparse.ArgumentParser):
    def __init__(self, manual, prog=None):
        super().__init__(prog, description=manual, formatter_class=HelpLayout, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def bounded(kind, low, high=math.inf):
    """An argparse type: an int or float in [low, high]."""

    def convert(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        limits = f"of {low} or more" if high == math.inf else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__} {limits}")

    return convert


def augment_policy(text):
    """An argparse type: "need", "none", or a list out of KINDS."""
    if text in ("need", "none") or set(text.split(",")) <= set(KINDS):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not need, none or some of {','.join(KINDS)}")


def run_parser(script, manual, epochs, batch_size, ema=0.999, augment="none"):
    """A parser with the flags that all training scripts share; `script` is the caller's file."""
    parser = Parser(manual, Path(script).name)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--path", help="images to train on: a folder (with its subfolders) or a .zip")
    add("--dataset", choices=DATASETS, help="instead of --path; glyphs: drawn, needs no files")
    add("--data_dir", default="data", help="where MNIST and CIFAR-10 are, or are downloaded to")
    add("--label", type=bounded(int, 0), nargs="+", help="train on these classes of them only")
    add("--image_size", type=bounded(int, 1, 1024), help="pixels of a side, after a centre crop")
    add("--channels", choices=["auto", "1", "3"], default="auto", help="auto: 1 if all are grey")
    add("--flip", action=switch, default=False, help="mirror at random: faces yes, letters no")
    add("--epochs", type=bounded(int, 1), default=epochs, help="total passes over the images")
    add("--batch_size", type=bounded(int, 2), default=batch_size, help="real images for D")
    add("--ema", type=bounded(float, 0, 1), default=ema, help="decay of the averaged generator")
    add("--augment", type=augment_policy, default=augment, help="need, none, or a list of kinds")
    add("--seed", type=bounded(int, 0), default=0, help="everything random follows from it")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 if fast")
    add("--compile", action=switch, default=False, help="torch.compile: slow start, faster steps")
    add("--checkpoint", type=bounded(int, 1), help="epochs between snapshots; default: 10 in all")
    add("--sample_every", type=bounded(int, 1), help="epochs between grids; default: 100 in all")
    add("--out", help="the run's folder; default runs/<variant>-<data>")
    add("--resume", nargs="?", const="newest", help="run to continue; alone: the newest in runs/")
    add("--config", help="a run's config.ini to repeat; flags typed beside it win")
    add("--cache", default=".cache", help="folder for the decoded images")
    add("--tensorboard", action=switch, default=False, help="log for TensorBoard too")
    add("--summary", action=switch, default=False, help="show the networks' layers and stop")
    return parser


OF_A_START = ("out", "resume", "config", "summary", "typed", "fingerprint")
MAY_CHANGE = ("epochs", "device", "precision", "compile", "checkpoint", "sample_every")
MAY_CHANGE += ("tensorboard", "path", "data_dir", "cache")


def settings_of(args):
    """The settings of an experiment, in plain types: every flag but those of one start of it."""
    settings = {name: value for name, value in vars(args).items() if name not in OF_A_START}
    return json.loads(json.dumps(settings, default=str))


def parse_flags(parser, argv, flags):
    """Parse `argv`; behind what is typed there count `flags`, then those of --config or --resume.

    `args.typed` keeps the settings as they were typed, for before a script settles what is unset.
    """
    adopt(parser, flags)
    args = parser.parse_args(argv)
    if args.config:
        settings = read_ini(args.config)
        if args.path or args.dataset:  # other data than in the file
            settings = {k: v for k, v in settings.items() if k not in ("path", "dataset", "label")}
        try:
            adopt(parser, settings | flags)
        except UserError as error:
            raise UserError(f"--config {args.config}: {error}") from None
        args = parser.parse_args(argv)
    args.typed, resume = settings_of(args), args.resume
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # torchrun --max_restarts
    if restarted and args.out and Path(args.out, "checkpoint.pt").exists():
        resume = args.out
    elif resume and (args.out or args.config):
        raise UserError("--resume keeps the run's folder and settings: omit --out and --config")
    if resume:
        script = Path(parser.prog).stem
        folder = newest_run(script) if resume in (True, "newest") else Path(resume)
        folder = folder.parent if folder.suffix == ".pt" else folder
        run = load_file(folder / "checkpoint.pt")
        if run["script"] != script:
            raise UserError(f"{folder} was trained by {run['script']}.py: resume it with that")
        typed = run["typed"] if isinstance(run.get("typed"), dict) else run["config"]
        then = {name: value for name, value in run["config"].items() if name in args.typed}
        adopt(parser, then | {"precision": typed.get("precision", "auto")} | flags)
        now = settings_of(args := parser.parse_args(argv))
        changed = {name: now[name] for name in now if now[name] != then.get(name, now[name])}
        for name in sorted(changed.keys() - set(MAY_CHANGE)):
            raise UserError(f"--{name} is {then[name]} in {folder} and cannot change on --resume")
        args.resume, args.typed = folder, typed | changed
    out, images = (Path(name or "").resolve() for name in (args.out, args.path))
    if args.out and args.path and not resume and out.is_relative_to(images):
        raise UserError(f"--out {args.out} lies in --path: its pictures would be trained on")
    if args.path and args.dataset:
        raise UserError("--path and --dataset both name the data: omit one of them")
    return args


def adopt(parser, settings):
    """Make settings the parser's defaults; texts and numbers are checked as if they were typed."""
    actions = {action.dest: action for action in parser._actions}
    for name, value in settings.items():
        if name not in actions:
            raise UserError(f"unknown setting {name!r} (known: {', '.join(actions)})")
        flags, nargs = actions[name].option_strings, actions[name].nargs
        if nargs == 0:  # a switch; written by hand, a text
            if str(value).lower() not in ("true", "false"):
                raise UserError(f"argument {'/'.join(flags)}: write true or false")
            value = str(value).lower() == "true"
        elif value is not True and (value, actions[name].default) != (None, None):
            several = nargs and isinstance(value, list | tuple)
            words = [flags[-1], *map(str, value)] if several else [f"{flags[-1]}={value}"]
            value = getattr(parser.parse_args(words), name)
        parser.set_defaults(**{name: value})


def read_ini(path):
    """The settings of an INI file: values in JSON, as Run writes them, or text."""
    ini, settings = configparser.ConfigParser(interpolation=None), {}
    ini.optionxform = str  # keeps capitals
    try:
        ini.read_string("[before any section]\n" + Path(path).read_text(encoding="utf-8"))
        for name, text in [pair for section in ini.values() for pair in section.items()]:
            settings[name] = text
            with contextlib.suppress(ValueError, RecursionError):  # written by hand
                settings[name] = json.loads(text)
    except (OSError, ValueError, configparser.Error) as error:
        raise UserError(f"--config {path}: {error}".partition("\n")[0]) from None
    return settings


# --------------------------------------------------------------------------------------- devices

RANK = int(os.environ.get("RANK", 0))  # this process among those that torchrun has started
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def setup(args):
    """Choose device and precision (which goes back into `args`), seed; returns the device."""
    device = choose_device(args.device)
    join_ranks(device)
    if args.batch_size % WORLD_SIZE:
        raise UserError(f"--batch_size {args.batch_size} does not divide by {WORLD_SIZE} processes")
    if args.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
        raise UserError("--compile needs a C++ compiler: install g++ or clang++, or omit it")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UserError("--tensorboard needs a package: pip install tensorboard")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    fast = device.type == "cpu" and bf16
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        if args.precision == "bf16" and not fast:
            print("this GPU does not multiply in bf16: going on in fp32")
            args.precision = "fp32"
    if args.precision == "auto":
        args.precision = "bf16" if fast else "fp32"
    torch.manual_seed(mixed(args.seed, "init"))
    return device


def choose_device(name):
    """The torch.device of --device, index included; under torchrun a GPU for each process."""
    try:
        found = name == "auto" and torch.accelerator.current_accelerator(check_available=True)
        device = found or torch.device("cpu" if name == "auto" else name)
        built_for = torch.version.cuda
        missing = name == "auto" and not found and RANK == 0
        if missing and (built_for or shutil.which("nvidia-smi")):
            cpus = "this torch is built for CPUs: https://pytorch.org/get-started has others"
            why = f"no driver that fits CUDA {built_for}, see nvidia-smi" if built_for else cpus
            print(f"WARNING: no GPU is used ({why})")
        if device.type == "cuda":
            index = os.environ.get("LOCAL_RANK", device.index)
            index = torch.cuda.current_device() if index is None else int(index)
            device = torch.device("cuda", index)
            torch.cuda.set_device(device)  # before anything touches the first one
        torch.zeros(1, device=device).item()
        return device
    except Exception:  # each backend that is missing raises something else
        why = "is not available here: try cpu, or fewer processes"
        raise UserError(f"--device {name} {why}") from None


def join_ranks(device):
    """Under torchrun: meet the other processes; rank 0 speaks for all."""
    if "RANK" not in os.environ:
        return
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"several processes work with cuda or --device cpu, not {device.type}")
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        patience = {"timeout": datetime.timedelta(hours=6)}  # rank 0 may decode many images
        store, number, size = next(dist.rendezvous("env://", **patience))
        # processes that torchrun starts again must not meet the traces of those before
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=number, world_size=size, **patience)
    if RANK > 0:
        sys.stdout = Path(os.devnull).open("w", errors="backslashreplace")  # noqa: SIM115


def leave_ranks(code):
    """End a process that join_ranks brought in at once: threads of gloo can abort a slow exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def rank_mean(tensor):
    """Its mean over all ranks, the same bits on each; alone, the tensor itself."""
    if WORLD_SIZE > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        tensor /= WORLD_SIZE
    return tensor


def sync_grads(net):
    """Average the gradients of a network over all ranks; alone, nothing happens."""
    if WORLD_SIZE > 1:
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        parts = rank_mean(torch.cat([grad.flatten() for grad in grads]))
        for grad, part in zip(grads, parts.split([grad.numel() for grad in grads])):
            grad.copy_(part.view(grad.shape))


# ----------------------------------------------------------------------------------------- files


class UserError(ValueError):
    """Something the user can mend; the message says how. Command lines print it and exit with 2."""


@contextlib.contextmanager
def exit_codes():
    """Turn what the user can mend into one line and exit code 2, and a stop into exit code 130."""
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid text
    try:
        yield
        leave_ranks(0)
    except KeyboardInterrupt:
        leave_ranks(130)
        sys.exit(130)
    except Exception as error:
        message = str(error)
        no_memory = r"out of memory|not enough memory|allocate memory|alloc(ation)?_failed"
        if isinstance(error, MemoryError) or re.search(no_memory, message, re.IGNORECASE):
            message = "out of memory: lower --batch_size, --width or --image_size"
        elif dist.is_initialized() and "by peer" in message:  # connection closed, reset
            message = "another process has ended: its error is the reason"
        elif not isinstance(error, (UserError, OSError)):
            raise
        line = message.replace("\n", " ").encode("ascii", "backslashreplace").decode()
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary name beside `path` that takes its place once it is safely on disk.

    Whatever interrupts the block, `path` holds its old content or the new one, never a part.
    """
    temporary = Path(path).with_name(f".{Path(path).name}.{os.urandom(6).hex()}.part")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error}): what was there is unchanged") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path, content):
    """Write bytes, as a whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def check_plain(content, name):
    """ValueError, with the culprit's name, unless `content` can be saved and loaded again: plain
    types, and tensors that hold as many numbers as they show."""
    if isinstance(content, torch.Tensor):
        if content.numel() * content.itemsize > content.untyped_storage().nbytes():
            raise ValueError(f"{name} shows more numbers than it holds")
    elif isinstance(content, dict | list | tuple):
        for key, part in content.items() if isinstance(content, dict) else enumerate(content):
            check_plain(part, f"{name}[{key!r}]" if name else key)
    elif type(content) not in (str, int, float, bool, type(None)):
        raise ValueError(f"{name} is of type {type(content).__name__}, not a tensor or a plain one")


def save_file(content, path):
    """Write a dict of tensors and plain types; UserError for anything else in it."""
    try:
        check_plain(content, "")
    except ValueError as error:
        raise UserError(f"cannot save {path}: {error}") from None
    buffer = io.BytesIO()  # torch.save into a file hides that a disk is full
    torch.save(content, buffer)
    write_file(path, buffer.getbuffer())


PARTS = {"script": str, "generator_args": dict, "z": dict, "config": dict, "G_ema": dict}


def load_file(path):
    """Read a checkpoint or snapshot onto the CPU: tensors and plain types, never objects."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.save compresses nothing: no member is larger
            if sum(member.file_size for member in archive.infolist()) > os.path.getsize(path):
                raise ValueError("it claims to hold more than it does")
        content = torch.load(path, map_location="cpu", weights_only=True)
        check_plain(content, "")
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except Exception as error:  # a damaged archive raises whatever its reader stumbles on
        reason = str(error).partition("\n")[0][:100]
        raise UserError(f"{path} is damaged or no file of these scripts ({reason})") from None
    fits = lambda name: isinstance(content.get(name), PARTS[name])
    if not isinstance(content, dict) or not all(map(fits, PARTS)):
        raise UserError(f"{path} is neither a checkpoint nor a snapshot")
    return content


def newest_run(script=""):
    """The folder in runs/ whose checkpoint was written last, of this script where one is named."""
    runs = [path.parent for path in Path("runs").glob("*/checkpoint.pt")]
    head = lambda ini: ini.read_text(errors="replace") if ini.exists() else ""
    runs = [run for run in runs if not script or f"[{script}]" in head(run / "config.ini")]
    kind = f"of {script}.py " if script else ""
    if not runs:
        raise UserError(f"there is no run {kind}in runs/: train one first, or name its folder")
    newest = max(runs, key=lambda run: (run / "checkpoint.pt").stat().st_mtime)
    print(f"{newest} is the newest run {kind}in runs/")
    return newest


def by_epoch(paths):
    """Files such as epoch_0050.png in order; from epoch 10,000 on their names are longer."""
    return sorted(paths, key=lambda path: (len(path.name), path.name))


def progress(text, last=False):
    """A line rewritten in place on a terminal; elsewhere a plain line every 15 seconds."""
    if sys.stdout.isatty():
        width = os.get_terminal_size().columns - 1
        print(f"\r\x1b[K{text[:width]}", end="\n" if last else "", flush=True)
    elif last or time.monotonic() > progress.shown + 15:
        progress.shown = time.monotonic()
        print(text, flush=True)


progress.shown = -math.inf

# ------------------------------------------------------------------------------------------- run

COLUMNS = ["step", "epoch", "kimg", "seconds"]
COLUMNS += ["loss_d", "loss_g", "d_real", "d_fake", "d_fake_after", "images_per_s"]
PATIENCE = 1000  # steps before it is said that a network has won or collapsed
ROWS_PER_EPOCH = 20  # of metrics.csv, each the mean over the steps since the last
GRIDS, SNAPSHOTS = 100, 10  # in a run, about, where --sample_every and --checkpoint are unset
LATEST = 60  # seconds between two samples/latest.png
SAVE_AFTER = 600  # seconds between checkpoints within an epoch
REST = 30  # seconds: ends of epochs that follow the last checkpoint faster write none


class Run:
    """A training run, from start to end:

    start        config.ini, samples/real.png, samples/epoch_0000.png, checkpoint.pt
    step         batches() seeds torch and yields the real images; end_step(stats) counts it
    20 an epoch  a row of metrics.csv and the line of progress; a loss that is NaN stops the run
    minute       samples/latest.png
    epoch        samples/epoch_*.png (--sample_every), generator_*.pt (--checkpoint: snapshots);
                 checkpoint.pt, but not within 30 s of the last
    10 minutes   checkpoint.pt
    Ctrl-C       the step ends; a row, checkpoint.pt, training.gif, losses.png; batches() raises
                 KeyboardInterrupt, which is exit code 130. A second one ends at once
    end          all of these

    Only rank 0 writes. `latent` says how G's inputs are drawn, see draw_latents. `state` holds G,
    D, G_ema, the optimisers and whatever else has a state_dict; --resume loads it here. G_ema can
    be used at any time: its BatchNorm statistics are made when it is called.
    """

    def __init__(self, args, script, images, device, generator_args, latent, k=1, **state):
        self.args, self.script, self.images, self.device = args, Path(script).stem, images, device
        self.generator_args, self.latent, self.k, self.state = generator_args, latent, k, state
        batch_size = min(args.batch_size, len(images) // k // WORLD_SIZE * WORLD_SIZE)
        if batch_size < 2 * WORLD_SIZE:
            need = f"{2 * k * WORLD_SIZE} (2 * k" + f" * {WORLD_SIZE} processes" * (WORLD_SIZE > 1)
            raise UserError(f"{len(images)} images are too few: a step needs {need})")
        if batch_size < args.batch_size:
            print(f"batches of {batch_size}: there are only {len(images)} images")
        self.images_per_step = k * batch_size
        self.steps_per_epoch = len(images) // self.images_per_step
        self.steps = args.epochs * self.steps_per_epoch
        self.step, self.seconds, self.pending = 0, 0.0, []
        self.stop_asked = self.stopping = False  # by a signal to this rank; agreed among all
        self.ordered = self.refreshed = self.columns = self.writer = None
        self.won_steps, self.warned = 0, set()
        folder = [args.resume or (self.new_folder() if RANK == 0 else None)]
        if WORLD_SIZE > 1:
            dist.broadcast_object_list(folder)
        self.folder = folder[0]
        self.lock = lock_folder(self.folder) if RANK == 0 else contextlib.nullcontext()
        if args.resume:
            self.restore()
        state["G_ema"].register_forward_pre_hook(lambda *_: self.refresh_batchnorm())

    @property
    def epoch(self):
        return self.step // self.steps_per_epoch

    def batches(self):
        """Yield each step's real images, (k * batch_size, C, H, W) in [-1, 1], until the end.

        Of several ranks each gets its share. self.indices, on the device, are the images' numbers
        in load_data's order. Everything random in a step follows from (seed, step). After Ctrl-C
        or SIGTERM it raises KeyboardInterrupt.
        """
        again = f"python {self.script}.py --resume {shlex.quote(str(self.folder))}"
        handlers = {}
        with contextlib.suppress(ValueError):  # only the main thread may handle signals
            for number in (signal.SIGINT, signal.SIGTERM):
                handlers[number] = signal.signal(number, self.stop)
        try:
            with self.lock:
                if self.step >= self.steps:
                    state = f"{self.folder} has reached epoch {self.epoch} of {self.args.epochs}"
                    more = self.epoch + self.args.epochs
                    return print(f"{state}: nothing to do. To go on: {again} --epochs {more}")
                images = self.start()
                while self.step < self.steps and not self.stopping:
                    yield self.next_batch(images)
                if RANK == 0:
                    self.draw()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.stopping:
            print(f"stopped; to go on: {again}", flush=True)
            raise KeyboardInterrupt

    def stop(self, number, frame):
        self.stop_asked = True
        if not dist.is_initialized():  # torchrun repeats the signal
            signal.signal(number, signal.SIG_DFL)  # a second Ctrl-C ends at once

    def start(self):
        """Say what is about to happen, write what comes first; returns the images, on a GPU if
        they fill no more than a quarter of its free memory."""
        words = [f"{self.script}.py"]
        for name, value in settings_of(self.args).items():
            if isinstance(value, list):
                words += [f"--{name}", *map(str, value)]
            elif value is not None and value is not False:
                words.append(f"--{name}={value}".removesuffix("=True"))
        counts = [sum(p.numel() for p in self.state[name].parameters()) for name in ("G", "D")]
        where = f"on {self.device}" + f", {WORLD_SIZE} processes" * (WORLD_SIZE > 1)
        span = f"step {self.step} to {self.steps}, {self.steps_per_epoch} an epoch"
        print(f"settings: python {shlex.join(words)}\n{self.folder}: {span}", flush=True)
        print(f"G has {counts[0]:,} parameters, D {counts[1]:,}, {where}", flush=True)
        self.marked = self.saved = self.shown = time.monotonic()
        self.started = self.marked - self.seconds
        if RANK == 0:
            (self.folder / "samples").mkdir(exist_ok=True)
            lines = [f"{name} = {json.dumps(value)}\n" for name, value in self.args.typed.items()]
            ini = f"[{self.script}]\n{''.join(lines)}"  # JSON's quotes let any path survive
            write_file(self.folder / "config.ini", ini.encode())
            if self.args.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(self.folder, purge_step=self.step + 1)
            shown = np.random.default_rng(self.args.seed).permutation(len(self.images))[:CHUNK]
            real = self.images[np.sort(shown)]
            self.real_diversity = diversity(real)
            if self.step == 0:
                save_grid(real, self.folder / "samples/real.png")
                self.sample(keep=True)
                self.save()
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0
        fits = self.images.nbytes < free / 4
        return torch.from_numpy(np.array(self.images)).to(self.device) if fits else self.images

    def next_batch(self, images):
        """This rank's real images of a step, in an epoch each at most once; seeds torch for it."""
        epoch, i = divmod(self.step, self.steps_per_epoch)
        if epoch != self.ordered:
            rng, self.ordered = np.random.default_rng((self.args.seed, epoch)), epoch
            self.order = torch.from_numpy(rng.permutation(len(images)))
            self.mirrored = torch.from_numpy(rng.random(len(images)) < 0.5)
        batch = slice(i * self.images_per_step, (i + 1) * self.images_per_step)
        share = lambda whole: whole[batch].view(self.k, WORLD_SIZE, -1)[:, RANK].flatten()
        self.indices = share(self.order).to(self.device, non_blocking=True)
        if isinstance(images, torch.Tensor):
            real = images[self.indices]
        else:
            real = torch.from_numpy(images[share(self.order).numpy()])
            real = real.pin_memory() if self.device.type == "cuda" else real
        real = real.to(self.device, non_blocking=True).permute(0, 3, 1, 2)  # channels_last
        real = real.float().div_(127.5).sub_(1)
        if self.args.flip:
            mirrored = share(self.mirrored).to(self.device, non_blocking=True)
            real = torch.where(mirrored[:, None, None, None], real.flip(3), real)
        own = (RANK,) if RANK else ()  # rank 0 draws what a process alone does
        seed = mixed(self.args.seed, "step", self.step, *own)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 0.2 ms
        for generator in torch.cuda.default_generators:
            generator.manual_seed(seed)
        if self.device.type == "mps":
            torch.mps.manual_seed(seed)
        return real

    def end_step(self, stats):
        """Count a step, with its 0-d tensors `stats`; write what is due."""
        self.step += 1
        self.pending.append(stats)
        now, within = time.monotonic(), self.step % self.steps_per_epoch
        last = self.step == self.steps
        save_due = RANK == 0 and now > self.saved + (SAVE_AFTER if within else REST)
        asked = rank_mean(torch.tensor([self.stop_asked, save_due], dtype=torch.float32))
        self.stopping, save_due = (asked > 0).tolist()
        save_due |= last or self.stopping
        if save_due or within % math.ceil(self.steps_per_epoch / ROWS_PER_EPOCH) == 0:
            self.write_row()
        if RANK > 0:
            return
        due = lambda every, n: last or self.epoch % (every or math.ceil(self.args.epochs / n)) == 0
        keep = within == 0 and due(self.args.sample_every, GRIDS)
        if keep or now > self.shown + LATEST:
            self.sample(keep)
        if within == 0 and due(self.args.checkpoint, SNAPSHOTS):
            save_file(self.snapshot(), self.folder / f"generator_{self.epoch:04d}.pt")
        if save_due:
            self.save()
        if not self.pending:  # the next row's speed is that of steps alone
            self.marked = time.monotonic()

    def write_row(self):
        """A row of metrics.csv, means since the last; UserError if a loss or weight is infinite."""
        steps, names = len(self.pending), [*self.pending[0]]
        table = torch.stack([torch.stack([*stats.values()]) for stats in self.pending])
        means, self.pending = rank_mean(table.cpu().double().mean(0)).tolist(), []
        weights = [p.sum() for name in ("G", "D") for p in self.state[name].parameters()]
        if not math.isfinite(sum(means)) or not torch.stack(weights).isfinite().all():
            kept = f"{self.folder}/checkpoint.pt keeps the last good state"
            cure = "Try lower rates, --precision fp32 or another --seed"
            raise UserError(f"a loss or weight is not finite at step {self.step}; {kept}. {cure}")
        if RANK > 0:
            return
        now, path = time.monotonic(), self.folder / "metrics.csv"
        row = dict.fromkeys(COLUMNS) | dict(zip(names, means, strict=True))
        row["step"], row["epoch"] = self.step, math.ceil(self.step / self.steps_per_epoch)
        row["kimg"], row["seconds"] = self.step * self.images_per_step / 1000, now - self.started
        row["images_per_s"] = steps * self.images_per_step / (now - self.marked)
        header = ",".join(row) + "\n" if self.columns != [*row] else ""
        if header and self.columns:  # a copy whose statistics have changed since the checkpoint
            path.rename(path.with_name(f"metrics_to_{self.step - steps}.csv"))
        self.columns = [*row]
        with path.open("a") as file:
            file.write(header + ",".join(f"{value:.12g}" for value in row.values()) + "\n")
        for name in row if self.writer else ():
            self.writer.add_scalar(name, row[name], self.step)
        won = 0 <= row["loss_d"] < 0.1 and row["d_real"] > 0.7 and row["d_fake"] < 0.3
        self.won_steps = self.won_steps + steps if won else 0
        if self.won_steps >= PATIENCE:
            self.warn("D has won", f"its loss has been below 0.1 for {self.won_steps} steps")
        minutes, speed = row["seconds"] / 60, row["images_per_s"]
        line = f"epoch {row['epoch']}/{self.args.epochs}, {minutes:.1f} of "
        line += f"{minutes * self.steps / self.step:.1f} min, {speed:.0f}/s, D {row['loss_d']:.2f} "
        line += f"G {row['loss_g']:.2f}, D(x) {row['d_real']:.2f} D(G(z)) {row['d_fake']:.2f}"
        progress(line, last=self.step == self.steps or self.stopping)

    def warn(self, what, why):
        """Say once that a network has won or collapsed; what helps stands in the README."""
        if what not in self.warned:
            self.warned.add(what)
            print(f'\nwarning: {what}: {why}. See README, "When it does not work"', flush=True)

    def new_folder(self):
        """Make the run's folder; one that holds a run is left alone."""
        out, data = self.args.out, Path(self.args.path or self.args.dataset).resolve().stem
        if out and Path(out, "checkpoint.pt").exists():
            again = f"--resume {shlex.quote(str(out))}"
            raise UserError(f"{out} holds a run: {again} goes on, or pass another --out")
        name, number = f"runs/{self.script.removeprefix('train_')}-{data}", 2
        path = Path(out or name)
        while path.exists() and not out:
            path, number = Path(f"{name}-{number}"), number + 1
        path.mkdir(parents=True, exist_ok=bool(out))
        return path

    def restore(self):
        """Take over the state of checkpoint.pt, and cut metrics.csv back to its step."""
        path, metrics = self.folder / "checkpoint.pt", self.folder / "metrics.csv"
        run, args = load_file(path), self.args
        try:
            for name, part in self.state.items():
                part.load_state_dict(run.get(name, {}))
                if isinstance(part, torch.optim.Optimizer):
                    restore_layout(part)
            self.step, self.seconds, n = run["step"] + 0, run["seconds"] + 0.0, run["n_images"] + 0
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"{path} does not fit {self.script}.py ({reason})") from None
        if n != len(self.images):
            print(f"{len(self.images):,} images, {n:,} until now: epochs go by the new number")
        elif run.get("fingerprint", args.fingerprint) != args.fingerprint:
            raise UserError(f"{path} knows {n} images of other names or sizes: start a new run")
        if args.precision != (before := run["config"].get("precision")):
            print(f"going on in {args.precision}, the run was in {before} until now")
        if RANK > 0:
            return
        for leftover in self.folder.glob("**/.*.part"):  # of a killed process
            leftover.unlink()
        if metrics.exists():
            lines = [line for line in metrics.open() if line.endswith("\n")]
            kept = [line for line in lines[1:] if int(line.partition(",")[0]) <= self.step]
            if kept:
                write_file(metrics, "".join(lines[:1] + kept).encode())
                self.columns = lines[0].strip().split(",")
            else:
                metrics.unlink()

    def refresh_batchnorm(self):
        """Give G_ema statistics of its own, once for the same weights."""
        weights = self.step, sum(p._version for p in self.state["G_ema"].parameters())
        if self.refreshed != weights:
            self.refreshed = weights
            source = torch.Generator().manual_seed(mixed(self.args.seed, "batchnorm"))
            refresh_batchnorm(self.state["G_ema"], self.latent, source, self.device)

    def sample(self, keep):
        """Draw samples/latest.png, and with `keep` the grid of this epoch."""
        self.shown = time.monotonic()
        images = generate(self.state["G_ema"], latents(self.latent, self.args.seed, range(CHUNK)))
        ours, theirs = diversity(images), self.real_diversity
        if self.step >= PATIENCE and ours < 0.4 * theirs:  # healthy runs: 0.8 and more
            levels = f"{ours:.0f} grey levels over its samples, by {theirs:.0f} over real images"
            self.warn("G has collapsed", f"a pixel varies by {levels}")
        for name in ["latest", f"epoch_{self.epoch:04d}"][: 1 + keep]:
            save_grid(images, self.folder / f"samples/{name}.png")
        if keep and self.writer:
            pixels = np.asarray(Image.open(self.folder / "samples/latest.png").convert("RGB"))
            self.writer.add_image("samples", pixels, self.step, dataformats="HWC")

    def snapshot(self):
        """All that generate.py needs, and where it comes from."""
        self.refresh_batchnorm()
        return {"script": self.script, "generator_args": self.generator_args, "z": self.latent,
                "config": settings_of(self.args), "step": self.step,
                "G_ema": self.state["G_ema"].state_dict()}  # fmt: skip

    def save(self):
        """Write checkpoint.pt: all that --resume needs."""
        self.saved, path = time.monotonic(), self.folder / "checkpoint.pt"
        parts = {name: part.state_dict() for name, part in self.state.items()}
        parts |= {"n_images": len(self.images), "fingerprint": self.args.fingerprint}
        parts |= {"seconds": self.saved - self.started, "typed": self.args.typed}
        save_file(self.snapshot() | parts, path)
        if self.stopping:
            print(f"saved: {path} at step {self.step}; now the pictures", flush=True)

    def draw(self):
        """Draw training.gif and losses.png."""
        if self.writer:
            self.writer.close()
        if grids := by_epoch(self.folder.glob("samples/epoch_*.png")):
            shown = np.linspace(0, len(grids) - 1, min(len(grids), 60)).astype(int)
            save_gif([Image.open(grids[i]) for i in shown], self.folder / "training.gif")
        rows = np.loadtxt(self.folder / "metrics.csv", delimiter=",", skiprows=1, ndmin=2)
        of = dict(zip(self.columns, rows.T.tolist(), strict=True))
        groups = {"loss": ["loss_d", "loss_g"], "D's answer": ["d_real", "d_fake"]}
        groups |= {name: [name] for name in of if name not in COLUMNS}
        panels = [(title, of["kimg"], {y: of[y] for y in ys}) for title, ys in groups.items()]
        save_curves(panels, self.folder / "losses.png", "thousand images seen")


def lock_folder(folder):
    """A file that keeps other processes out of a run until it is closed, or its process ends."""
    file = (folder / ".lock").open("w")
    with contextlib.suppress(ImportError, OSError):  # Windows, or a file system without locks
        import fcntl

        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process trains in {folder}: pass another --out") from None
    return file


def restore_layout(opt):
    """Give loaded moments the layout of their parameters: else the next fused step would crash."""
    for p, held in opt.state.items():
        for name, value in held.items():
            if isinstance(value, torch.Tensor) and value.dim():
                if value.shape != p.shape:
                    raise ValueError(f"{name} has other shapes")
                held[name] = torch.empty_like(p).copy_(value)


def diversity(images):
    """How much images (N, H, W, C) differ: the standard deviation of a pixel, in grey levels."""
    return images.astype(np.float32).std(0).mean()
