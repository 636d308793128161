"""What the training scripts share. No network, loss or update rule: those are in the train_*.py.

A script has a Generator(**generator_args), (N, numbers) -> float32 images in [-1, 1], by which
generate.py builds it anew, and a Discriminator, images -> float32 logits (N,).

data      decode, load_images, load_data; read_dataset: MNIST, CIFAR-10, drawn characters
model     prepare, averaged, update_ema, draw_latents, latents, generate, Recorded
pictures  to_uint8, save_grid, save_gif, save_curves
--------- to adapt a script you need not read on
flags     run_parser, parse_flags, config.ini
devices   setup, choose_device, sync_grads and the ranks of torchrun
files     UserError, exit_codes, replacing, save_file, load_file
Run       a run's folder and all that is written into it; its docstring is a timeline
"""

import argparse
import collections
import configparser
import contextlib
import copy
import datetime
import gzip
import hashlib
import importlib.util
import inspect
import io
import itertools
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# ------------------------------------------------------------------------------------------ data

NO_PIXELS = ("EPS", "PDF", "WMF", "MPEG", "HDF5", "GRIB", "BUFR")  # Pillow only knows their names
OTHER_ENDINGS = (".heic", ".heif", ".avif", ".jxl", ".svg", ".dng", ".cr2", ".nef", ".arw", ".raw")
HIDDEN = re.compile(r"(^|/)(\.(?!/)|__MACOSX)")  # but ./a.png is a.png


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


def decoded(names, open_image, work=decode, **options):
    """Decode files in threads; yields (pixels, None) or (None, what is wrong), in their order."""

    def attempt(name):
        try:
            with open_image(name) as file:
                return work(file, **options), None
        except Exception as error:  # decoders raise anything at all on damaged files
            return None, str(error) or type(error).__name__

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(names), CHUNK):  # few at a time: photographs may be large
            yield from pool.map(attempt, names[start : start + CHUNK])
            done = min(start + CHUNK, len(names))
            progress(f"reading: {done:,} of {len(names):,} files", last=done == len(names))


def image_files(path):
    """Of a folder or .zip: {name: (bytes, time or hash)} of its images, and what opens one. Links
    are followed; what these scripts wrote, runs and samples, is left out."""
    if os.path.isdir(path):
        found = files_below(path)
        open_image = lambda name: open(os.path.join(path, name), "rb")  # noqa: SIM115
    else:
        try:
            archive = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            no_zip = f"is neither a folder nor a .zip ({error})"
            why = no_zip if os.path.exists(path) else "does not exist"
            raise UserError(f"{path} {why}: pass a folder or .zip of images") from None
        found = {member.filename: (member.file_size, member.CRC) for member in archive.infolist()}
        open_image = lambda name: io.BytesIO(archive.read(name))
    kinds = Image.registered_extensions().items()
    endings = tuple(end for end, kind in kinds if kind in Image.OPEN and kind not in NO_PIXELS)
    named = lambda ends: [x for x in found if x.lower().endswith(ends) and not HIDDEN.search(x)]
    if other := named(OTHER_ENDINGS):
        say(f"{len(other):,} images are left out, such as {other[0]}: Pillow does not read them")
    if not (files := {name: found[name] for name in sorted(named(endings))}):
        searched = "whatever Pillow reads, .jpg .png .webp ..., also in subfolders that are no run"
        raise UserError(f"no images in {path} (looked for {searched}): pass another folder or .zip")
    return files, open_image


def files_below(root):
    """{name: (bytes, time)} of all files below a folder, but for those of these scripts."""
    root, found, seen = os.path.join(root, ""), {}, set()
    unlisted = lambda error: say(f"WARNING: left out, as it cannot be listed: {error}")
    for folder, below, names in os.walk(root, onerror=unlisted, followlinks=True):
        whole = os.path.realpath(folder)
        if whole in seen or is_run(folder):  # links may go in circles
            below.clear()
            continue
        seen.add(whole)
        ours = tuple(name for name in below if Path(folder, name, ".run").exists())  # samples
        grids = tuple(f"{name}-" for name in ours)  # of generate.py, beside its samples
        below[:] = sorted(name for name in below if name not in ours and not HIDDEN.match(name))
        place = os.path.join(folder, "")
        prefix = place[len(root) :].replace(os.sep, "/")
        for name in names:
            if not name.startswith(grids):
                try:
                    facts = os.stat(place + name)
                    found[prefix + name] = facts.st_size, facts.st_mtime_ns
                except OSError:  # a link to nowhere
                    found[prefix + name] = None
    return found


def is_run(folder):
    return all(Path(folder, name).is_file() for name in ("checkpoint.pt", "config.ini"))


def load_images(path, image_size, channels="auto", cache=".cache"):
    """Decode a folder or .zip once, into `cache`; returns a memory-mapped uint8 (N, H, W, C) array.

    Of each image the central square, resized to `image_size`. `channels`: "1", "3", or "auto", 1 if
    all are grey; what the files do not have is made in memory. Attributes of the array: `names` of
    the files that could be decoded, and `fingerprint`, of the pixels. UserError if none is left.
    """
    files, open_image = image_files(path)
    whole = Path(path).resolve()
    place = f"{whole.stem}-{short_hash(str(whole))[:6]}-{image_size}px-"
    cached = Path(cache, f"{place}{short_hash((5, files))}.npy")  # another 5 where decode changes
    found = read_cache(cached, files, open_image, image_size)
    try:
        images, notes = found or fill_cache(cached, [*files], open_image, image_size)
        for stale in () if found else cached.parent.iterdir():  # made when the files were others
            if stale.name.startswith(place) and stale.stem != cached.stem:
                stale.unlink(missing_ok=True)
    except (OSError, UserError) as error:
        raise UserError(f"cannot keep decoded images ({error}): pass another --cache") from None
    failed = notes["failed"]
    errors = f"{len(failed):,} of {len(files):,} files cannot be decoded, see {cached.stem}.json"
    if not len(images):
        raise UserError(f"no image in {path}: {errors} in {cache}")
    size = f"{images.shape[1:]} each, {images.nbytes / 1e6:,.0f} MB"
    said = f"{len(images):,} images of {path}, {size}; {notes['duplicates']:,} exact duplicates"
    say(f"{said} (kept); {errors + '; ' if failed else ''}in {cached}")
    if channels not in ("auto", str(images.shape[3])):
        images = resized(images, image_size, channels).view(np.memmap)  # may have attributes
    images.fingerprint = notes["fingerprint"]
    images.names = [name for name in files if name not in failed]
    return images


def short_hash(content):
    return hashlib.sha256(repr(content).encode()).hexdigest()[:12]


def read_cache(cached, files, open_image, image_size):
    """The array and notes of fill_cache, if they fit, and what failed then still fails; or None."""
    with contextlib.suppress(OSError, ValueError, EOFError, LookupError, TypeError):  # not whole
        images = np.load(cached, mmap_mode="r")
        notes = json.loads(cached.with_suffix(".json").read_text())
        again = decoded([*notes["failed"]], open_image, image_size=image_size)
        shape = len(files) - len(notes["failed"]), image_size, image_size
        fits = images.shape in ((*shape, 1), (*shape, 3)) and images.dtype == np.uint8
        if fits and all(error for _, error in again):
            return images, notes
    return None


def fill_cache(cached, names, open_image, image_size):
    """Decode files into the .npy `cached`, with notes in a .json beside it; returns both."""
    kind = lambda file: Image.getmodebase(Image.open(file).mode)
    grey = {kind for kind, _ in decoded(names, open_image, kind)} <= {"L", None}
    hashes, failed, shape = [], {}, (image_size, image_size, 1 if grey else 3)
    header = lambda: {"descr": "|u1", "fortran_order": False, "shape": (len(hashes), *shape)}
    cached.parent.mkdir(parents=True, exist_ok=True)
    with replacing(cached) as part, part.open("wb") as file:  # no map: the disk may be full
        np.lib.format.write_array_header_1_0(file, header())
        images = decoded(names, open_image, image_size=image_size, channels=shape[2])
        for (pixels, error), name in zip(images, names):  # to the end of images: it tells
            if error:
                failed[name] = error
            else:
                file.write(pixels)
                hashes.append(hashlib.sha256(pixels).hexdigest())
        file.seek(0)  # numpy leaves room in a header for any first axis
        np.lib.format.write_array_header_1_0(file, header())
    notes = {"fingerprint": short_hash(hashes), "duplicates": len(hashes) - len({*hashes})}
    write_file(cached.with_suffix(".json"), json.dumps(notes | {"failed": failed}).encode())
    return np.load(cached, mmap_mode="r"), notes | {"failed": failed}


def classes_of(names):
    """The subfolders that files "cats/1.jpg" lie in, sorted, and the number of each file's, int64
    (N,); [], None where all lie in one, or some beside them."""
    paths = [name.split("/")[:-1] for name in names]
    depth = len(os.path.commonprefix(paths))
    if any(len(path) == depth for path in paths):
        return [], None
    kinds, numbers = np.unique([path[depth] for path in paths], return_inverse=True)
    return kinds.tolist(), numbers


def load_data(args):
    """The images that the flags name, uint8 (N, H, W, C), and their classes, int64 (N,) or None:
    the data set's, or the subfolders of --path. `args` gets their names, `classes`, and a
    `fingerprint` of the images, so that a run is not resumed with others."""
    if RANK > 0:
        dist.barrier()  # rank 0 comes first: what it decodes or downloads is there for the others
    if args.path:
        images = load_images(args.path, args.image_size, args.channels, args.cache)
        args.fingerprint, (args.classes, labels) = images.fingerprint, classes_of(images.names)
        if args.classes:
            say("classes: " + ", ".join(f"{i} {name}" for i, name in enumerate(args.classes)))
    else:
        data = args.dataset, args.data_dir, args.image_size, args.channels
        (images, labels), args.fingerprint = read_dataset(*data), args.dataset
        args.classes = [str(number) for number in range(labels.max() + 1)]
    if RANK == 0 and WORLD_SIZE > 1:
        dist.barrier()
    if args.label:
        chosen = np.isin(labels, class_numbers(args.label, args.classes))
        images, labels = images[chosen], labels[chosen]
    return images, labels


def class_numbers(words, names):
    """The numbers of classes that --label asks for, by number or name."""
    for word in words:
        if word not in names and not (word.isdecimal() and int(word) < len(names)):
            known = ", ".join(f"{i} {name}" for i, name in enumerate(names)) or "none"
            raise UserError(f"--label {word}: the classes of these images are {known}")
    return [names.index(word) if word in names else int(word) for word in words]


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
    What is not in `data_dir` is downloaded; files are checked for their layout or hash."""
    if name == "glyphs":
        return draw_glyphs(image_size or 32, 1 if channels == "1" else 3)
    if name == "mnist":
        shape = 60_000, 28, 28
        images = find_or_download("train-images-idx3-ubyte.gz", data_dir, shape, 0x803)[..., None]
        labels = find_or_download("train-labels-idx1-ubyte.gz", data_dir, shape[:1], 0x801)
    else:
        records = find_or_download("cifar-10-binary.tar.gz", data_dir, (50_000, 3073))
        labels, images = records[:, 0], records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return resized(images, image_size or images.shape[1], channels), labels.astype(np.int64)


def find_or_download(name, folder, shape, magic=None):
    """The array (with `magic`: of an IDX file) in a file below `folder`, under any usual name."""
    plain, path = name.removesuffix(".gz"), Path(folder, name)
    usual = lambda path: path.name.replace(".idx", "-idx").removesuffix(".gz")
    names = {plain, "data_batch_1.bin"} if name.startswith("cifar") else {plain}
    there = sorted(path for path in Path(folder).rglob("*") if usual(path) in names)
    files = [path for path in there if path.is_file()]
    if there and not files:
        raise UserError(f"{there[0]} is a folder without {plain}: put that file into it")
    if not files:
        download(FILES[name][0] + name, path, FILES[name][1])
    path = files[0] if files else path
    header = np.array([magic, *shape] if magic else [], ">i4").tobytes()
    try:
        content = unpacked(path)
        if len(content) != len(header) + math.prod(shape) or not content.startswith(header):
            raise ValueError("wrong size or header")
    except Exception as error:  # a damaged archive raises whatever its reader stumbles on
        raise UserError(f"{path} is no {plain} ({error}): remove it") from None
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)


def unpacked(path):
    """The bytes of a file, gzipped or not; of CIFAR-10 those of its training batches in a row."""
    batches = [f"data_batch_{i}.bin" for i in range(1, 6)]
    if path.suffix == ".bin":
        return b"".join(path.with_name(name).read_bytes() for name in batches)
    if ".tar" in path.suffixes:
        with tarfile.open(path) as archive:  # read, never unpacked
            files = [archive.extractfile(f"cifar-10-batches-bin/{name}") for name in batches]
            return b"".join(file.read() for file in files)
    content = path.read_bytes()
    return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content


def download(url, path, sha256):
    """Fetch a file, which takes its name once its hash is right; UserError says where to put it."""
    say(f"downloading {url} to {path}")
    socket.setdefaulttimeout(60)  # seconds of silence
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), sha256)
    except Exception as error:  # no network, a cut line, another hash
        raise UserError(f"no download of {url} ({error}): put it into {path.parent}") from None


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
        mask, place = Image.new("L", (side, side)), tuple(side * rng.uniform(0.45, 0.55, 2))
        font, label = fonts[rng.integers(3)], rng.integers(len(GLYPHS))
        ImageDraw.Draw(mask).text(place, GLYPHS[label], 255, font, "mm", stroke_width=side // 40)
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
    Parameters stay float32, and so does all outside the forward pass, the losses too."""
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
    """Move the averaged generator towards G; `step` counts from 0. Its memory is a fortieth of the
    run so far (docs/experiments.md, "Longer runs"), and at most the 1 / (1 - decay) last steps.

    Buffers are copied, but for BatchNorm's: Run makes those when it draws or saves G_ema.
    """
    average = get_ema_multi_avg_fn(min(decay, (1 + step) / (40 + step)))
    average(list(G_ema.parameters()), list(G.parameters()), step)
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
def refresh_batchnorm(G_ema, latent, seed=0):
    """Estimate the BatchNorm statistics of averaged weights anew: no copy of G's would fit them."""
    source = torch.Generator().manual_seed(mixed(seed, "batchnorm"))
    layers = [m for m in G_ema.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for layer in layers:  # they alone learn: spectral normalisation, dropout stay as they are
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all batches
        layer.train()
    for _ in range(8 if layers else 0):
        G_ema(draw_latents(latent, CHUNK, source).to(next(G_ema.parameters()).device))
    G_ema.eval()


def draw_latents(latent, n, generator=None, label=None):
    """n inputs of G, (n, dim): {"dim": 100, "distribution": "normal" or "uniform"} says how. With
    {"classes": 10} besides, a class follows in one-hot form, (n, dim + 10): `label`, or any."""
    if latent["distribution"] == "uniform":
        z = torch.rand(n, latent["dim"], generator=generator) * 2 - 1
    elif latent["distribution"] == "normal":
        z = torch.randn(n, latent["dim"], generator=generator)
    else:
        raise UserError(f"a latent is normal or uniform, not {latent['distribution']!r}")
    if "classes" not in latent:
        return z
    label = torch.randint(latent["classes"], (n,), generator=generator) if label is None else label
    return torch.cat([z, torch.eye(latent["classes"])[label].expand(n, -1)], 1)


def latents(latent, seed, numbers, label=None):
    """G's inputs for the images with these numbers, each from (seed, number) alone, on the CPU.
    Where there are classes, they take turns, or all are of class `label`."""
    source, rows = torch.Generator(), []
    for number in numbers:
        source.manual_seed(mixed(seed, "image", number))
        its_class = number % latent.get("classes", 1) if label is None else label
        rows.append(draw_latents(latent, 1, source, its_class))
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


PLAIN = int, float, str, np.generic  # what a graph would hold for good


class OnDevice(TorchDispatchMode):
    """Refuses what reads or makes a tensor on the CPU: a graph would hold its numbers for good."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        if any(tensor.is_cpu for tensor in tensors):
            raise RuntimeError(f"{function} has to do with a tensor on the CPU")
        return result


class Recorded:
    """A training step as a CUDA graph: recorded once, then replayed, with the same results.

    A step is hundreds of small kernels, which take longer to launch than to compute; a graph is
    launched as a whole. Python does not run in it: tensors among the arguments are read anew, True
    and False choose between graphs, any other number holds for good. Where that cannot be, or on
    other devices and in several processes, the step is called as it is. Returns a dict of tensors.
    """

    def __init__(self, step, device, args):
        self.step, self.device, self.signature = step, device, inspect.signature(step)
        self.on = args.graph and device.type == "cuda" and WORLD_SIZE == 1
        if self.on and not inspect.isfunction(step):
            self.stay_plain("it is no plain function")
        self.stream = torch.cuda.Stream(device) if self.on else None
        self.calls, self.graphs, self.given, self.held = collections.Counter(), {}, {}, []
        self.rates = collections.defaultdict(lambda: torch.zeros((), device=device))

    def __call__(self, *args, **kwargs):
        if self.on:
            call = self.signature.bind(*args, **kwargs)
            of = lambda kind: {n: v for n, v in call.arguments.items() if isinstance(v, kind)}
            tensors, opts = of(torch.Tensor), of(torch.optim.Optimizer).values()
            key = *of(bool).values(), *((t.shape, t.dtype) for t in tensors.values())
            self.calls[key] += 1
            if name := self.changed(call.arguments):
                self.stay_plain(f"{name} changes between calls: make it a 0-d tensor, or a bool")
            else:
                with self.rates_on_device(opts):
                    if self.calls[key] <= 3:  # in which libraries choose their kernels
                        return self.warm_up(call, opts)
                    if key in self.graphs or self.record(key, call, tensors):
                        return self.replay(key, tensors)
        return self.step(*args, **kwargs)

    def changed(self, given):
        """The name of what is not as in the first call: an argument other than tensors and bools,
        a number in its attributes, modules or rates, or in what the step reads around it."""
        self.given |= {n: v for n, v in given.items() if not isinstance(v, bool | torch.Tensor)}
        self.held = self.held or self.watched()
        for place, name, before in self.held:
            value = place.get(name)
            if value is not before and not (isinstance(value, PLAIN) and value == before):
                return name
            if isinstance(value, torch.Tensor) and value.is_cpu and value._version:  # filled anew
                return name
        return None

    def watched(self):
        """What must not change, as (a dict, a name in it, the value)."""
        around = self.step.__globals__
        near = [around.get(name) for name in self.step.__code__.co_names]  # its helpers
        near = [f for f in near if inspect.isfunction(f) and f.__globals__ is around]
        found = [(around, name) for f in (self.step, *near) for name in f.__code__.co_names]
        places = [inspect.getclosurevars(self.step).nonlocals]
        for value in [*self.given.values(), *places[0].values()]:
            places += getattr(value, "param_groups", [])
            parts = value.modules() if isinstance(value, nn.Module) else [value]
            places += [p if isinstance(p, dict) else getattr(p, "__dict__", {}) for p in parts]
        found += [
            (place, name) for place in places for name in place if not reads_rate(place, name)
        ]
        kinds = (*PLAIN, tuple, torch.Tensor)
        found = [(place, name) for place, name in found if isinstance(place.get(name), kinds)]
        found += [(self.given, name) for name in self.given]
        return [(place, name, place[name]) for place, name in found]

    @contextlib.contextmanager
    def rates_on_device(self, opts):
        """In the block optimizers read their rates from the device; outside they look as ever."""
        groups = [g for opt in opts for g in opt.param_groups if reads_rate(g)]
        before = [{n: g[n] for n in ("lr", "capturable") if n in g} for g in groups]
        for i, (group, numbers) in enumerate(zip(groups, before)):
            group |= dict.fromkeys(numbers, True) | {"lr": self.rates[i].fill_(numbers["lr"])}
        try:
            yield
        finally:
            for group, numbers in zip(groups, before):
                group |= numbers

    def warm_up(self, call, opts):
        """The step as it is, on the stream of the recording."""
        for state in [state for opt in opts for state in opt.state.values()]:
            if isinstance(state.get("step"), torch.Tensor):  # of a resumed run, on the CPU
                state["step"] = state["step"].to(self.device)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            stats = self.step(*call.args, **call.kwargs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return stats

    def record(self, key, call, tensors):
        """Record a graph of this call, which computes nothing yet; False where that fails."""
        inputs = {name: value.to(self.device, copy=True) for name, value in tensors.items()}
        nets = [value for value in call.arguments.values() if isinstance(value, nn.Module)]
        before = [(p, p.grad, p.requires_grad) for net in nets for p in net.parameters()]
        call.arguments |= inputs
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        options = {"stream": self.stream, "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.stream(here), torch.cuda.graph(graph, **options), OnDevice():
                stats = self.step(*call.args, **call.kwargs)
                packed = torch.cat([value.flatten() for value in stats.values()])
        except Exception as error:  # the first one says why, the last one only that it failed
            for p, grad, learns in before:
                p.requires_grad_(learns).grad = grad
            with contextlib.suppress(RuntimeError), torch.cuda.stream(here):
                with torch.cuda.graph(torch.cuda.CUDAGraph(), **options):
                    torch.rand(1, device=self.device)  # else the generator thinks it goes on
            self.stay_plain(reason(error.__context__ or error))
            return False
        shapes = {name: value.shape for name, value in stats.items()}
        self.graphs[key] = graph, inputs, shapes, packed
        return True

    def replay(self, key, tensors):
        graph, inputs, shapes, packed = self.graphs[key]
        for name, held in inputs.items():
            held.copy_(tensors[name])
        graph.replay()
        parts = packed.clone().split([shape.numel() for shape in shapes.values()])
        return {name: part.view(shapes[name]) for name, part in zip(shapes, parts)}

    def stay_plain(self, why):
        self.on, name = False, getattr(self.step, "__name__", "the step")
        say(f"\nWARNING: no CUDA graph of {name}, it takes several times as long: {why}")


def reads_rate(group, name="lr"):
    """Is this the rate of an optimizer that can read it from the device? Others need a number."""
    able = name == "lr" and ("capturable" in group or group.get("fused"))
    return able and not isinstance(group["lr"], torch.Tensor)


def summary(net):
    """The layers of `net` as PyTorch prints them, and its number of parameters."""
    return f"{net}\n{sum(p.numel() for p in net.parameters()):,} parameters\n"


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


COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")


def ticks(low, high):
    """About five round numbers from below `low` to above `high`."""
    step = 10 ** math.floor(math.log10(high - low))
    step *= next(part for part in (0.1, 0.2, 0.5, 1, 2, 5) if (high - low) / (step * part) <= 6)
    return np.arange(math.floor(low / step), math.ceil(high / step) + 1) * step


def save_curves(panels, path, xlabel, width=900, height=300):
    """Draw line charts one below the other: panels is [(title, x, {label: y, ...}), ...]."""
    canvas = Image.new("RGB", (width, height * len(panels)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for i, (title, x, curves) in enumerate(panels):
        left, top, right, bottom = 70, i * height + 40, width - 20, (i + 1) * height - 45
        ys = np.array(list(curves.values()))
        spans = [(v.min(), v.max() + (v.min() == v.max())) for v in (np.array(x), ys)]
        x_ticks, y_ticks = (ticks(*span) for span in spans)
        columns = np.linspace(left, right, len(x_ticks))
        rows = np.linspace(bottom, top, len(y_ticks))
        for row, tick in zip(rows, y_ticks):
            draw.line((left, row, right, row), "#dddddd")
            draw.text((left - 6, row), f"{tick:.4g}", "black", font, anchor="rm")
        for column, tick in zip(columns, x_ticks):
            draw.text((column, bottom + 6), f"{tick:.4g}", "black", font, anchor="mt")
        draw.text(((left + right) / 2, bottom + 24), xlabel, "black", font, anchor="mt")
        draw.text((left, top - 8), title, "black", font, anchor="lb")
        for j, ((label, y), colour) in enumerate(zip(curves.items(), itertools.cycle(COLOURS))):
            xy = np.interp(x, x_ticks, columns), np.interp(y, y_ticks, rows)
            draw.line(list(zip(*xy)), colour, 2, joint="curve")
            draw.text((right - 120 * j, top - 8), label, colour, font, anchor="rb")
    write_file(path, encoded(canvas))


# ------------------------------------------------------------------------------------------------
# What follows carries a run along. To adapt a script you need not read it: what a copy may rely on
# stands in the README, "Your own variant".
# ----------------------------------------------------------------------------------------- flags


class HelpLayout(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        told = action.default in (None, argparse.SUPPRESS) or "default" in action.help
        return action.help + ("" if told else " (default: %(default)s)")


class Parser(argparse.ArgumentParser):
    def __init__(self, manual, prog=None):
        super().__init__(prog, description=manual, formatter_class=HelpLayout, allow_abbrev=False)
        self.register("type", None, os.path.expanduser)  # ~/imgs, in --path=~/imgs too
        self.register("type", Path, lambda text: Path(text).expanduser())

    def parse_args(self, words):
        for before, word in itertools.pairwise(["a word", *words]):
            if word == "" or re.fullmatch("--[^=]+=", word):
                self.error(f"{word or before}: the value is empty")
        return super().parse_args(words)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def bounded(kind, low, high=None):
    """An argparse type: an int or float in [low, high]; without `high` up to 1e9, or inf."""
    high = high or (10**9 if kind is int else math.inf)

    def convert(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__} from {low} to {high}")

    return convert


def run_parser(script, manual, epochs, batch_size, ema=0.999):
    """A parser with the flags that all training scripts share; `script` is the caller's file."""
    parser = Parser(manual, Path(script).name)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--path", help="images to train on: a folder (with its subfolders) or a .zip")
    add("--dataset", choices=DATASETS, help="instead of --path; glyphs: drawn, needs no files")
    add("--data_dir", default="data", help="where MNIST and CIFAR-10 are or come to be")
    add("--label", nargs="+", help="train on these classes only: numbers, or names of subfolders")
    add("--image_size", type=bounded(int, 1, 1024), help="default: 64; data sets 28 or 32")
    add("--channels", choices=["auto", "1", "3"], default="auto", help="auto: 1 if all are grey")
    add("--flip", action=switch, default=False, help="mirror at random: faces yes, letters no")
    add("--epochs", type=bounded(int, 1), default=epochs, help="total passes over the images")
    add("--batch_size", type=bounded(int, 2), default=batch_size, help="real images for D")
    add(
        "--ema",
        type=bounded(float, 0, 1),
        default=ema,
        help="largest decay of the averaged generator",
    )
    add("--seed", type=bounded(int, 0, 2**63), default=0, help="everything random follows from it")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 if fast")
    add("--graph", action=switch, default=True, help="on a GPU record the step as a CUDA graph")
    add("--compile", action=switch, default=False, help="torch.compile: an H200 gained nothing")
    add("--checkpoint", type=bounded(int, 1), help="epochs between snapshots; default: 10 in all")
    add("--sample_every", type=bounded(int, 1), help="epochs between grids; default: 100 in all")
    add("--out", help="the run's folder; default: runs/<variant>-<data>")
    add("--resume", nargs="?", const="newest", help="a run; alone: that of --out, or the newest")
    add("--config", help="a run's config.ini to repeat; flags typed beside it win")
    add("--cache", default=".cache", help="folder for the decoded images")
    add("--tensorboard", action=switch, default=False, help="log for TensorBoard too")
    add("--summary", action=switch, default=False, help="show the networks and stop")
    return parser


OF_A_START = ("out", "resume", "config", "summary")  # and what parse_flags and load_data add:
OF_A_START += ("parser", "typed", "others", "fingerprint", "classes")
MAY_CHANGE = ("epochs", "device", "precision", "graph", "compile", "checkpoint", "sample_every")
MAY_CHANGE += ("tensorboard", "path", "data_dir", "cache")


def settings_of(args):
    """The settings of an experiment, in plain types: every flag but those of one start of it."""
    settings = {name: value for name, value in vars(args).items() if name not in OF_A_START}
    return json.loads(json.dumps(settings, default=str))


def words_of(settings, parser):
    """Settings as they would be typed: {"flip": True, "label": [3, 5]} -> --flip --label 3 5."""
    actions, words = {action.dest: action for action in parser._actions}, []
    for name, value in settings.items():
        if name not in actions:
            raise UserError(f"unknown setting {name!r} (known: {', '.join(actions)})")
        (*_, flag), nargs = flags, _ = actions[name].option_strings, actions[name].nargs
        if nargs == 0:  # a switch; in a file written by hand, a word
            if (on := str(value).lower()) not in ("true", "false"):
                raise UserError(f"argument {'/'.join(flags)}: write true or false")
            first = (on == "true") == (actions[name].const is not False)
            words += flags[:1] if first else flags[1:2]
        elif value is True:  # --resume alone
            words.append(flag)
        elif isinstance(value, list | tuple):  # one word after another, or an action="append"
            words += [flag, *map(str, value)] if nargs else [f"{flag}={each}" for each in value]
        elif value is not None:
            words.append(f"{flag}={value}")
    return words


def parse_flags(parser, argv, flags):
    """Parse words of a command line and `flags` of train(); before them those of --config, or of
    the run that --resume goes on with. `args.typed`: the settings before a script settles any."""
    words = words_of(flags, parser) + [*argv]
    args = parser.parse_args(words)
    if args.config:
        words = [*ini_words(args, parser), *words]
        args = parser.parse_args(words)
    args.typed, args.others = settings_of(args), bool(args.path)
    if args.out and args.resume == "newest":  # for jobs that are started again by themselves
        args.resume = args.out if Path(args.out, "checkpoint.pt").exists() else None
    elif args.resume and (args.out or args.config):
        raise UserError("--resume keeps the run's folder and settings: omit --out and --config")
    if args.resume:
        args = resumed(parser, words, args)
    elif (
        args.out
        and args.path
        and Path(args.out).resolve().is_relative_to(Path(args.path).resolve())
    ):
        raise UserError(f"--out {args.out} lies in --path: its pictures would be trained on")
    if args.path and args.dataset:
        raise UserError("--path and --dataset both name the data: omit one of them")
    args.parser = parser
    return args


def resumed(parser, words, args):
    """`args` anew, with the settings of the run that --resume names before the `words`."""
    script = Path(parser.prog).stem
    folder = newest_run(script) if args.resume == "newest" else Path(args.resume)
    if folder.suffix == ".pt" and folder.name != "checkpoint.pt":
        raise UserError(f"{folder} is a snapshot: --resume {folder.parent} goes on from its run")
    run, folder = load_file(folder), folder.parent if folder.suffix == ".pt" else folder
    if run["script"] != script:
        raise UserError(f"{folder} was trained by {run['script']}.py: resume it with that")
    if not isinstance(run.get("typed"), dict) or "origin" not in run:
        raise UserError(f"{folder} is of an older version: it can be drawn from, but not resumed")
    then = {name: value for name, value in run["config"].items() if name in args.typed}
    then["precision"] = run["typed"].get("precision", "auto")
    then["channels"] = str(run["generator_args"].get("channels", then["channels"]))
    own = words_of(then, parser)
    before, now = settings_of(parser.parse_args(own)), parser.parse_args([*own, *words])
    changed = {name: value for name, value in settings_of(now).items() if value != before[name]}
    for name in sorted(changed.keys() - set(MAY_CHANGE)):
        raise UserError(f"--{name} is {before[name]} in {folder} and cannot change on --resume")
    if now.path and not args.others and not Path(now.path).exists():
        raise UserError(f"{folder} is of --path {now.path}, not there seen from here: type --path")
    now.resume, now.typed, now.others = folder, run["typed"] | changed, args.others
    return now


def ini_words(args, parser):
    """The settings of --config's file as words: values in JSON, as Run writes them, or text."""
    ini, settings = configparser.ConfigParser(interpolation=None), {}
    ini.optionxform = str  # keeps capitals
    try:
        ini.read_string("[before any section]\n" + Path(args.config).read_text(encoding="utf-8"))
        for name, text in [pair for section in ini.values() for pair in section.items()]:
            settings[name] = text
            with contextlib.suppress(ValueError, RecursionError):  # written by hand
                settings[name] = json.loads(text, parse_float=str)
        if args.path or args.dataset:  # other data than in the file
            settings = {k: v for k, v in settings.items() if k not in ("path", "dataset", "label")}
        parser.parse_args(words := words_of(settings, parser))
    except (OSError, ValueError, configparser.Error) as error:
        raise UserError(f"--config {args.config}: {reason(error)}") from None
    return words


# --------------------------------------------------------------------------------------- devices


def ranks():
    """This process's number and their count among those of torchrun; else 0 and 1."""
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    several = rank.isdecimal() and size.isdecimal() and int(rank) < int(size)
    return (int(rank), int(size)) if several else (0, 1)


RANK, WORLD_SIZE = ranks()


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
    cpu = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    fast = gpu or (cpu and device.type == "cpu")
    if device.type == "cuda" and args.precision == "bf16" and not fast:
        say("this GPU does not multiply in bf16: going on in fp32")
    if args.precision == "auto" or device.type == "cuda" and not fast:
        args.precision = "bf16" if fast else "fp32"
    torch.manual_seed(mixed(args.seed, "init"))
    return device


def choose_device(name):
    """The torch.device of --device, index included; under torchrun a GPU for each process."""
    try:
        found = name == "auto" and torch.accelerator.current_accelerator(check_available=True)
        device = found or torch.device("cpu" if name == "auto" else name)
        if name == "auto" and not found and RANK == 0:
            why = "this torch is built for CPUs: https://pytorch.org/get-started has others"
            if built_for := torch.version.cuda:
                why = f"no driver that fits CUDA {built_for}, see nvidia-smi"
            if built_for or shutil.which("nvidia-smi"):
                say(f"WARNING: no GPU is used ({why})")
        if device.type == "cuda":
            index = os.environ.get("LOCAL_RANK", "") if WORLD_SIZE > 1 else ""
            index = int(index) if index.isdecimal() else device.index
            device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
            with contextlib.suppress(AttributeError):  # of a torch without CUDA, which says so next
                torch.cuda.set_device(device)  # before anything touches the first one
        torch.zeros(1, device=device).item()
        return device
    except Exception as error:  # each backend that is missing raises something else
        raise UserError(f"--device {name}: {reason(error)}; try cpu, or fewer processes") from None


def join_ranks(device):
    """Under torchrun: meet the other processes; rank 0 speaks for all."""
    if WORLD_SIZE == 1:
        return
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"several processes work with cuda or --device cpu, not {device.type}")
    if not dist.is_initialized():
        place = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        if not re.fullmatch(r".+:\d+", place):
            where = "MASTER_ADDR and MASTER_PORT name no place to meet"
            raise UserError(f"WORLD_SIZE is {WORLD_SIZE}, but {where}: use torchrun, or unset it")
        if RANK == 0:
            say(f"waiting for {WORLD_SIZE - 1} more processes at {place}")
        patience = {"timeout": datetime.timedelta(hours=6)}  # rank 0 may decode many images
        store, rank, world_size = next(dist.rendezvous("env://", **patience))
        # processes that torchrun starts again must not meet the traces of those before
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, None, patience["timeout"], world_size, rank, store)
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
        mean = rank_mean(torch.cat([grad.flatten() for grad in grads]))
        for grad, part in zip(grads, mean.split([grad.numel() for grad in grads])):
            grad.copy_(part.view(grad.shape))


# ----------------------------------------------------------------------------------------- files


class UserError(ValueError):
    """Something the user can mend; the message says how. Command lines print it and exit with 2."""


def reason(error):
    """What an error says, in one line of the sentences that help."""
    text = str(error).partition("WeightsUnpickler error: ")[2] or str(error) or type(error).__name__
    return " ".join(text.split())[:300]


def say(text, end="\n"):
    """print, which ends no run: neither a terminal that is gone nor what it cannot show."""
    code = getattr(sys.stdout, "encoding", None) or "ascii"
    try:
        print(text.encode(code, "backslashreplace").decode(code), end=end, flush=True)
    except (OSError, ValueError):  # a dead pipe, a closed file
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115


@contextlib.contextmanager
def exit_codes():
    """Turn what the user can mend into one line and exit code 2, and a stop into exit code 130."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid text
    try:
        yield
        leave_ranks(0)
    except KeyboardInterrupt:
        leave_ranks(130)
        sys.exit(130)
    except Exception as error:
        message, known = str(error), isinstance(error, UserError)
        no_memory = r"out of memory|not enough memory|allocate memory|alloc(ation)?_failed"
        if isinstance(error, MemoryError) or not known and re.search(no_memory, message, re.I):
            message = "out of memory: lower --batch_size, --width or --image_size"
        elif dist.is_initialized() and "by peer" in message:  # connection closed, reset
            message = "another process has ended: its error is the reason"
        elif not known and not isinstance(error, OSError):
            raise
        line = message.replace("\n", " ").encode("ascii", "backslashreplace").decode()
        with contextlib.suppress(OSError, ValueError):
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary name beside `path`, which takes its place once it is safely on disk:
    whatever interrupts the block, `path` holds its old content or the new one, never a part."""
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


def save_file(content, path):
    """Write a dict of tensors and plain types."""
    buffer = io.BytesIO()  # torch.save into a file hides that a disk is full
    torch.save(content, buffer)
    write_file(path, buffer.getbuffer())


PARTS = {"script": str, "generator_args": dict, "z": dict, "config": dict, "G_ema": dict}


def load_file(path):
    """Read a snapshot or a run's checkpoint onto the CPU: tensors and plain types, no objects."""
    path = Path(path, "checkpoint.pt") if os.path.isdir(path) else path
    try:
        with zipfile.ZipFile(path) as archive:  # torch.save compresses nothing: no member is larger
            if sum(member.file_size for member in archive.infolist()) > os.path.getsize(path):
                raise ValueError("it claims to hold more than it does")
            if broken := archive.testzip():
                raise ValueError(f"the checksum of its part {broken} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except Exception as error:  # a damaged archive raises whatever its reader stumbles on
        why = f"is damaged or no file of these scripts ({reason(error)})"
        raise UserError(f"{path} {why}") from None
    fits = lambda name: isinstance(content.get(name), PARTS[name])
    if not isinstance(content, dict) or not all(map(fits, PARTS)):
        raise UserError(f"{path} is neither a checkpoint nor a snapshot")
    return content


def newest_run(script=""):
    """The folder in runs/ whose checkpoint was written last, of this script where one is named."""
    head = lambda run: (run / "config.ini").read_text(errors="replace")
    runs = [path.parent for path in Path("runs").glob("*/checkpoint.pt") if is_run(path.parent)]
    runs = [run for run in runs if not script or f"[{script}]" in head(run)]
    kind = f"of {script}.py " if script else ""
    if not runs:
        raise UserError(f"there is no run {kind}in runs/: train one first, or name its folder")
    newest = max(runs, key=lambda run: (run / "checkpoint.pt").stat().st_mtime)
    say(f"{newest} is the newest run {kind}in runs/")
    return newest


def by_epoch(paths):
    """Files such as epoch_0050.png in order; from epoch 10,000 on their names are longer."""
    return sorted(paths, key=lambda path: (len(path.name), path.name))


def progress(text, last=False):
    """A line rewritten in place on a terminal; elsewhere a plain line every 15 seconds."""
    terminal = False
    with contextlib.suppress(AttributeError, ValueError):  # a notebook's, or a closed one
        terminal = sys.stdout.isatty()
    if terminal:
        width = shutil.get_terminal_size().columns - 1
        say(f"\r\x1b[K{text[:width]}", end="\n" if last else "")
    elif last or time.monotonic() > progress.shown + 15:
        progress.shown = time.monotonic()
        say(text)


progress.shown = -math.inf


# ------------------------------------------------------------------------------------------- run

COLUMNS = ["step", "epoch", "kimg", "seconds", "images_per_s"]  # before a script's own
ROW_STEPS, ROWS_PER_EPOCH = 50, 20  # a row of metrics.csv every 50 steps, or 20 times an epoch
MINUTE = 60  # seconds after which a row brings samples/latest.png and checkpoint.pt with it
GRIDS, SNAPSHOTS = 100, 10  # in a run, about, where --sample_every and --checkpoint are unset
PATIENCE = 1000  # steps before it is said that D has won


class Run:
    """A training run, from start to end:

    start    config.ini, samples/real.png, samples/epoch_0000.png, checkpoint.pt
    step     batches() seeds torch and yields the real images; end_step(stats) counts it
    row      every 50 steps, or 20 times an epoch: a row of metrics.csv, the line of progress; a
             loss or weight that is not finite stops the run. When a minute has passed, write():
             samples/latest.png, checkpoint.pt
    epoch    write() with samples/epoch_*.png (--sample_every), generator_*.pt (--checkpoint)
    Ctrl-C   or SIGTERM, SIGHUP, SIGUSR1: the step ends; a row, write(), training.gif, losses.png;
             batches() raises KeyboardInterrupt, exit code 130. A second one does what it ever did
    end      all of these

    Only rank 0 writes. `latent` says how G's inputs are drawn, see draw_latents. `state` holds G,
    D, G_ema, the optimizers and whatever else has a state_dict; --resume loads it here.
    """

    def __init__(self, args, script, images, device, generator_args, latent, k=1, **state):
        self.args, self.script, self.images, self.device = args, Path(script).stem, images, device
        self.generator_args, self.latent, self.k, self.state = generator_args, latent, k, state
        draw_latents(latent, 1)  # refuses what it does not know
        batch_size = min(args.batch_size, len(images) // k // WORLD_SIZE * WORLD_SIZE)
        if batch_size < 2 * WORLD_SIZE:
            need = f"{2 * k * WORLD_SIZE}: 2, times k, times processes"
            raise UserError(f"{len(images)} images are too few: a step needs {need}")
        if batch_size < args.batch_size:
            say(f"batches of {batch_size}: there are only {len(images)} images")
        self.images_per_step = k * batch_size
        self.steps_per_epoch = len(images) // self.images_per_step
        self.step, self.images_seen, self.seconds, self.pending = 0, 0, 0.0, []
        self.origin = [0, 0]  # step and epoch from which epochs of this length count
        self.stop_asked = self.stopping = False  # by a signal to this rank; agreed among all
        self.handlers, self.warned, self.won, self.rows = {}, set(), 0, []
        self.ordered = self.columns = self.writer = None
        folder = [args.resume or (new_folder(args, self.script) if RANK == 0 else None)]
        if WORLD_SIZE > 1:
            dist.broadcast_object_list(folder)
        self.folder = folder[0]
        self.lock = lock_folder(self.folder) if RANK == 0 else contextlib.nullcontext()
        if args.resume:
            self.restore()
        self.steps = self.origin[0] + (args.epochs - self.origin[1]) * self.steps_per_epoch

    @property
    def epoch(self):
        return self.origin[1] + (self.step - self.origin[0]) // self.steps_per_epoch

    def batches(self):
        """Yield each step's real images, (k * batch_size, C, H, W) in [-1, 1], until the end.

        Of several ranks each gets its share. self.indices, on the device, are the images' numbers
        in load_data's order. Everything random in a step follows from (seed, step).
        """
        again = f"python {self.script}.py --resume {shlex.quote(str(self.folder))}"
        with contextlib.suppress(ValueError):  # only the main thread may handle signals
            for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
                number = getattr(signal, name, None)  # Windows has two of them; nohup ignores one
                if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
                    self.handlers[number] = signal.signal(number, self.stop) or signal.SIG_DFL
        try:
            with self.lock:
                if self.step >= self.steps:
                    state = f"{self.folder} has reached epoch {self.epoch} of {self.args.epochs}"
                    more = self.epoch + self.args.epochs
                    return say(f"{state}: nothing to do. To go on: {again} --epochs {more}")
                images = self.start()
                while self.step < self.steps and not self.stopping:
                    yield self.next_batch(images)
                if RANK == 0:
                    self.draw()
        finally:
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
        if self.stopping:
            say(f"stopped; to go on: {again}")
            raise KeyboardInterrupt
        source, run = (
            shlex.quote(str(x)) for x in (self.args.path or self.args.dataset, self.folder)
        )
        say(f"done: look at {self.folder}/samples/latest.png; then generate.py draws more, and "
            f"fid.py {source} {run} measures them")  # fmt: skip

    def stop(self, number, frame):
        self.stop_asked = True
        if not dist.is_initialized():  # torchrun repeats the signal
            signal.signal(number, self.handlers[number])

    def start(self):
        """Say what is about to happen, write what comes first; returns the images, on a GPU if
        they fill no more than a quarter of its free memory."""
        args, path = self.args, self.folder / "checkpoint.pt"
        counts = [sum(p.numel() for p in self.state[name].parameters()) for name in ("G", "D")]
        where = f"{self.device}" + f", {WORLD_SIZE} processes" * (WORLD_SIZE > 1)
        own = {name: value for name, value in settings_of(args).items() if name in args.typed}
        say(f"settings: {self.script}.py {shlex.join(words_of(own, args.parser))}\n"
            f"{self.folder}: step {self.step} to {self.steps}, {self.steps_per_epoch} an epoch\n"
            f"G has {counts[0]:,} parameters, D {counts[1]:,}, on {where}")  # fmt: skip
        self.marked = self.saved = time.monotonic()
        self.started = self.marked - self.seconds
        if RANK == 0:
            lines = [f"{name} = {json.dumps(value)}\n" for name, value in args.typed.items()]
            ini = f"[{self.script}]\n{''.join(lines)}"  # JSON's quotes let any path survive
            write_file(self.folder / "config.ini", ini.encode())
            if args.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(self.folder, purge_step=self.step + 1)
        if RANK == 0 and self.step == 0:
            self.write(grid=True, keep=False, save=True)
            try:
                load_file(path)  # refused now, not when it is needed
            except UserError as error:
                path.unlink()
                why = "generator_args, latent and state may hold tensors and plain types"
                raise UserError(f"cannot save {path}: {why} ({error})") from None
            shown = np.random.default_rng(args.seed).permutation(len(self.images))[:CHUNK]
            save_grid(self.images[np.sort(shown)], self.folder / "samples/real.png")
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0
        fits = self.images.nbytes < free / 4
        return torch.from_numpy(np.array(self.images)).to(self.device) if fits else self.images

    def next_batch(self, images):
        """This rank's real images of a step, in an epoch each at most once; seeds torch for it."""
        i = (self.step - self.origin[0]) % self.steps_per_epoch
        if self.epoch != self.ordered:
            self.ordered = self.epoch
            rng = np.random.default_rng((self.args.seed, self.epoch))
            self.order = torch.from_numpy(rng.permutation(len(images)))
            self.mirrored = torch.from_numpy(rng.random(len(images)) < 0.5)
        batch = slice(i * self.images_per_step, (i + 1) * self.images_per_step)
        share = lambda whole: whole[batch].view(self.k, WORLD_SIZE, -1)[:, RANK].flatten()
        put = lambda values: values.to(self.device, non_blocking=True)
        self.indices = put(share(self.order))
        if isinstance(images, torch.Tensor):
            real = images[self.indices]
        else:
            real = torch.from_numpy(images[share(self.order).numpy()])
            real = put(real.pin_memory() if self.device.type == "cuda" else real)
        real = real.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)  # channels_last
        if self.args.flip:
            mirrored = put(share(self.mirrored))
            real = torch.where(mirrored[:, None, None, None], real.flip(3), real)
        # rank 0 draws what a process alone does
        seed = mixed(self.args.seed, "step", self.step, *([RANK] if RANK else []))
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 0.2 ms
        for generator in torch.cuda.default_generators:
            generator.manual_seed(seed)
        if self.device.type == "mps":
            torch.mps.manual_seed(seed)
        return real

    def end_step(self, stats):
        """Count a step, with its 0-d tensors `stats`; write what is due."""
        self.step, self.images_seen = self.step + 1, self.images_seen + self.images_per_step
        self.pending.append(stats)
        self.stopping = rank_mean(torch.tensor(float(self.stop_asked))).item() > 0
        within, last = (self.step - self.origin[0]) % self.steps_per_epoch, self.step == self.steps
        every = min(ROW_STEPS, math.ceil(self.steps_per_epoch / ROWS_PER_EPOCH))
        if within % every and not self.stopping:
            return
        self.write_row()
        due = lambda every, n: last or self.epoch % (every or math.ceil(self.args.epochs / n)) == 0
        grid = within == 0 and due(self.args.sample_every, GRIDS)
        keep = within == 0 and due(self.args.checkpoint, SNAPSHOTS)
        save = last or self.stopping or time.monotonic() > self.saved + MINUTE
        if RANK == 0 and (grid or keep or save):
            self.write(grid, keep, save)
        self.marked = time.monotonic()  # the next row's speed is that of steps alone

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
        now, stats = time.monotonic(), dict(zip(names, means, strict=True))
        epoch = math.ceil((self.step - self.origin[0]) / self.steps_per_epoch) + self.origin[1]
        speed = steps * self.images_per_step / (now - self.marked)
        place = self.step, epoch, self.images_seen / 1000, now - self.started, speed
        with self.harmless("metrics.csv"):
            self.append(dict(zip(COLUMNS, place)) | stats, steps)
        won = 0 <= stats.get("loss_d", 1) < 0.1 and stats.get("d_real", 0) > 0.7
        self.won = self.won + steps if won and stats.get("d_fake", 1) < 0.3 else 0
        if self.won - steps < PATIENCE <= self.won:
            why = f"its loss has been below 0.1 for {self.won} steps"
            say(f'\nWARNING: D has won: {why}. See README, "When it does not work"')
        times = [now - self.started, (now - self.started) * self.steps / self.step]
        minutes = "/".join(f"{time / 60:.{int(time < 600)}f}" for time in times)
        line = f"epoch {epoch}/{self.args.epochs}, {minutes}min {speed:.0f}/s"
        for name, mean in stats.items():
            part = f" {name} {mean:.2f}"
            line += part * (len(line + part) < 80)  # a terminal's columns
        progress(line, last=self.step == self.steps or self.stopping)

    def append(self, row, steps):
        """Add a row to metrics.csv; one with other names than before it begins a new file."""
        path = self.folder / "metrics.csv"
        if self.columns not in (None, [*row]):
            self.rows = []
            if path.exists():
                path.rename(path.with_name(f"metrics_to_{self.step - steps}.csv"))
        self.columns = [*row]
        self.rows.append([*row.values()])
        header = "" if path.exists() else ",".join(row) + "\n"
        with path.open("a") as file:
            file.write(header + ",".join(f"{value:.12g}" for value in row.values()) + "\n")
        for name in row if self.writer else ():
            self.writer.add_scalar(name, row[name], self.step)

    @contextlib.contextmanager
    def harmless(self, what):
        """What only shows or records may fail: it is said once, and training goes on."""
        try:
            yield
        except (OSError, ValueError) as error:
            if what not in self.warned:
                self.warned.add(what)
                say(f"\nWARNING: training goes on without {what}: {reason(error)}")

    def write(self, grid, keep, save):
        """Draw samples/latest.png, with `grid` epoch_*.png; a snapshot; checkpoint.pt, all that
        --resume needs."""
        G_ema, seed = self.state["G_ema"], self.args.seed
        refresh_batchnorm(G_ema, self.latent, seed)
        images = generate(G_ema, latents(self.latent, seed, range(CHUNK)))
        snapshot = {"script": self.script, "generator_args": self.generator_args, "z": self.latent}
        snapshot |= {"config": settings_of(self.args), "step": self.step}
        snapshot |= {"G_ema": G_ema.state_dict()}
        if save:
            self.saved = time.monotonic()
            parts = {name: part.state_dict() for name, part in self.state.items()}
            parts |= {"seconds": self.saved - self.started, "typed": self.args.typed}
            parts |= {"n_images": len(self.images), "fingerprint": self.args.fingerprint}
            parts |= {"origin": self.origin, "epoch": self.epoch, "images_seen": self.images_seen}
            parts |= {"pace": [self.steps_per_epoch, self.images_per_step]}
            save_file(snapshot | parts, self.folder / "checkpoint.pt")
        if self.stopping:
            say(f"saved: {self.folder}/checkpoint.pt at step {self.step}; now the pictures")
        if keep:
            save_file(snapshot, self.folder / f"generator_{self.epoch:04d}.pt")
        with self.harmless("samples"):
            (self.folder / "samples").mkdir(exist_ok=True)  # moved away, perhaps
            for name in ["latest"] + [f"epoch_{self.epoch:04d}"] * grid:
                save_grid(images, self.folder / f"samples/{name}.png")
        if grid and self.writer:
            self.writer.add_images("samples", images, self.step, dataformats="NHWC")

    def restore(self):
        """Take over the state of checkpoint.pt, and cut metrics.csv back to its step."""
        path, args, n = self.folder / "checkpoint.pt", self.args, len(self.images)
        run = load_file(path)
        try:
            for name, part in self.state.items():
                part.load_state_dict(run.get(name, {}))
                for p, held in getattr(part, "state", {}).items():  # moments laid out as p: else
                    for key, value in held.items():  # the next fused step would crash
                        if isinstance(value, torch.Tensor) and value.dim():
                            held[key] = torch.empty_like(p).copy_(value)
            self.step, self.seconds = int(run["step"]), float(run["seconds"])
            self.origin = [int(run["origin"][0]), int(run["origin"][1])]
            self.images_seen, learned = int(run["images_seen"]), int(run["n_images"])
            if [*run["pace"]] != [self.steps_per_epoch, self.images_per_step]:
                self.origin = [self.step, int(run["epoch"])]
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"{path} does not fit {self.script}.py ({reason(error)})") from None
        if run["fingerprint"] != args.fingerprint:
            before = f"{self.folder} has learned from {learned:,} images"
            if not args.others:
                cure = "to go on with these, name them with --path beside --resume"
                raise UserError(f"{before}, and these {n:,} are others: {cure}")
            say(f"{before}, and goes on with these {n:,}")
        if args.precision != (before := run["config"].get("precision")):
            say(f"going on in {args.precision}, the run was in {before} until now")
        if RANK == 0:
            for leftover in self.folder.glob("**/.*.part"):  # of a killed process
                leftover.unlink()
            self.cut_metrics()

    def cut_metrics(self):
        """Leave the rows until the checkpoint's step in metrics.csv, and nothing that is none."""
        path = self.folder / "metrics.csv"
        text = path.read_text(encoding="utf-8-sig", errors="replace") if path.exists() else ""
        header, *lines = text.splitlines() or [""]
        kept = [header]
        for line in lines:
            with contextlib.suppress(ValueError):
                row = [*map(float, line.split(","))]
                if len(row) == header.count(",") + 1 and row[0] <= self.step:
                    self.rows.append(row)
                    kept.append(line)
        if self.rows:
            write_file(path, "\n".join([*kept, ""]).encode())
            self.columns = header.split(",")
        else:
            path.unlink(missing_ok=True)

    def draw(self):
        """Draw training.gif and losses.png."""
        if self.writer:
            self.writer.close()
        frames, grids = [], by_epoch(self.folder.glob("samples/epoch_*.png"))
        for i in sorted({*np.linspace(0, len(grids) - 1, 60).astype(int)}) if grids else ():
            with self.harmless(grids[i]):  # one that was cut short
                frames.append(Image.open(grids[i]).convert("RGB"))
        if frames:
            with self.harmless("training.gif"):
                save_gif(frames, self.folder / "training.gif")
        of, panels = dict(zip(self.columns, map(list, zip(*self.rows)))), {}
        for name, values in of.items():  # a panel for those that begin alike: loss_d, loss_g
            if name not in COLUMNS and min(values) < max(values):
                panels.setdefault(name.partition("_")[0], {})[name] = values
        panels = [(title, of["kimg"], curves) for title, curves in panels.items()]
        if panels:
            with self.harmless("losses.png"):
                save_curves(panels, self.folder / "losses.png", "thousand images seen")


def new_folder(args, script):
    """Make a run's folder; one that holds a run is left alone."""
    out, data = args.out, Path(args.path or args.dataset).resolve().stem
    if out and Path(out, "checkpoint.pt").exists():
        again = f"--resume {shlex.quote(str(out))}"
        raise UserError(f"{out} holds a run: {again} goes on, or pass another --out")
    base = Path(out or f"runs/{script.removeprefix('train_')}-{data}")
    for number in itertools.count(1):
        path = base.with_name(f"{base.name}-{number}") if number > 1 else base
        with contextlib.nullcontext() if out else contextlib.suppress(FileExistsError):
            path.mkdir(parents=True, exist_ok=bool(out))
            return path


def lock_folder(folder):
    """A file that keeps other processes out of a run until it is closed, or its process ends."""
    file = (folder / ".lock").open("w")
    with contextlib.suppress(ImportError, OSError):  # Windows, or a file system without locks
        import fcntl

        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            why = "wait for its end, or begin another run"
            raise UserError(f"another process trains in {folder}: {why}") from None
    return file
