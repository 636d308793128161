"""Everything around the networks, shared by the training scripts.

In order: errors and files, flags, devices and ranks, images, networks, pictures, and the run that
ties them together. No network, loss or update rule is here: those are in the train_*.py.
"""

import argparse
import collections
import configparser
import contextlib
import csv
import datetime
import errno
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import signal
import sys
import tarfile
import threading
import time
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun
from torch.optim.swa_utils import get_ema_multi_avg_fn, update_bn

# ------------------------------------------------------------------------------ errors and files


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
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in message:
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
    own = f".{Path(path).name}.{os.getpid()}-{threading.get_ident()}.part"
    temporary = Path(path).with_name(own)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"no space left for {path}: what was there is unchanged") from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def save_file(content, path):
    """Write a dict of tensors and plain types; through a file object, whose errors are OSErrors."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


PARTS = {"script": str, "generator_args": dict, "z": dict, "config": dict, "G_ema": dict}


def load_file(path):
    """Read a checkpoint or snapshot onto the CPU: tensors and plain types, never objects."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.save compresses nothing: no member is larger
            if sum(member.file_size for member in archive.infolist()) > os.path.getsize(path):
                raise ValueError("it claims to hold more than it does")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except Exception as error:  # a damaged archive raises whatever its reader stumbles on
        reason = str(error).partition("\n")[0][:100]
        raise UserError(f"{path} is damaged or no file of these scripts ({reason})") from None
    if not isinstance(content, dict) or not all(
        isinstance(content.get(name), kind) for name, kind in PARTS.items()
    ):
        raise UserError(f"{path} is neither a checkpoint nor a snapshot")
    return content


def newest_run(script=None):
    """The folder in runs/ whose checkpoint was written last, of this script where one is named."""
    runs = [path.parent for path in Path("runs").glob("*/checkpoint.pt")]
    if script:
        inis = [run / "config.ini" for run in runs]
        runs = [ini.parent for ini in inis if ini.exists() and f"[{script}]" in ini.read_text()]
    if not runs:
        kind = f"of {script}.py " if script else ""
        raise UserError(f"there is no run {kind}in runs/: train one first, or name its folder")
    return max(runs, key=lambda run: (run / "checkpoint.pt").stat().st_mtime)


def by_epoch(paths):
    """Files such as epoch_0050.png in order; from epoch 10,000 on their names are longer."""
    return sorted(paths, key=lambda path: (len(path.name), path.name))


class ProgressLine:
    """A line rewritten in place on a terminal; elsewhere a plain line every 15 seconds."""

    shown = -math.inf

    def show(self, text, last=False):
        if sys.stdout.isatty():
            width = os.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text[:width]}", end="\n" if last else "", flush=True)
        elif last or time.monotonic() > self.shown + 15:
            self.shown = time.monotonic()
            print(text, flush=True)


# ----------------------------------------------------------------------------------------- flags


class HelpLayout(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class Parser(argparse.ArgumentParser):
    def __init__(self, manual, prog=None):
        layout = {"formatter_class": HelpLayout, "allow_abbrev": False}
        super().__init__(prog, description=manual, **layout)

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


AUGMENT = ("colour", "translation", "cutout")


def augment_policy(text):
    """An argparse type: a list out of AUGMENT, or "none", or "auto"."""
    if text in ("auto", "none") or set(text.split(",")) <= set(AUGMENT):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not auto, none or some of {','.join(AUGMENT)}")


def run_parser(script, manual, epochs, batch_size, ema=0.999):
    """A parser with the flags that all training scripts share; `script` is the caller's file."""
    parser = Parser(manual, Path(script).name)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--path", help="images to train on: a folder (with its subfolders) or a .zip")
    add("--dataset", choices=["glyphs", *ADDRESSES], help="instead of --path; glyphs: built in")
    add("--data_dir", default="data", help="where MNIST and CIFAR-10 are, or are downloaded to")
    add("--label", type=bounded(int, 0, 9), nargs="+", help="train on these classes of them only")
    add("--image_size", type=bounded(int, 1, 1024), help="pixels of a side, after a centre crop")
    add("--channels", choices=["auto", "1", "3"], default="auto", help="auto: 1 if all are grey")
    add("--flip", action=switch, default=False, help="mirror at random: faces yes, letters no")
    add("--epochs", type=bounded(int, 1), default=epochs, help="total passes over the images")
    add("--batch_size", type=bounded(int, 2), default=batch_size, help="real images for D")
    add("--ema", type=bounded(float, 0, 1), default=ema, help="decay of the averaged generator")
    add("--augment", type=augment_policy, default="auto", help="DiffAugment, see AUGMENT in common")
    add("--seed", type=bounded(int, 0), default=0, help="everything random follows from it")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 if fast")
    add("--ngpu", type=bounded(int, 1), default=1, help="processes, one a GPU; or use torchrun")
    add("--compile", action=switch, default=False, help="torch.compile: slow start, faster steps")
    add("--checkpoint", type=bounded(int, 1), default=10, help="epochs between snapshots of G")
    add("--sample_every", type=bounded(int, 1), default=1, help="epochs between sample grids")
    add("--out", help="the run's folder; default runs/<variant>-<data>")
    add("--resume", nargs="?", const="newest", help="run to continue; alone: the newest")
    add("--config", help="a run's config.ini to repeat; flags typed beside it win")
    add("--cache", default=".cache", help="folder for the decoded images")
    add("--tensorboard", action=switch, default=False, help="log for TensorBoard too")
    add("--summary", action=switch, default=False, help="show the networks' layers and stop")
    return parser


def settings_of(args):
    """The settings of an experiment: every flag but those of one start of it."""
    start = ("out", "resume", "config", "summary", "ngpu")
    return {name: value for name, value in vars(args).items() if name not in start}


MAY_CHANGE = ["epochs", "device", "compile", "checkpoint", "sample_every", "tensorboard"]
MAY_CHANGE += ["path", "data_dir", "cache"]


def parse_flags(parser, argv):
    """Parse; the settings of --config or of the run to --resume go before what was typed."""
    args = parser.parse_args(argv)
    if args.config:
        settings = read_ini(args.config, parser)
        if args.path or args.dataset:  # other data than in the file
            settings = {k: v for k, v in settings.items() if k not in ("path", "dataset", "label")}
        args = parser.parse_args([*as_argv(settings), *argv])
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # torchrun --max_restarts
    if restarted and args.out and Path(args.out, "checkpoint.pt").exists():
        args.resume, args.out, args.config = args.out, None, None
    if args.resume:
        if args.out or args.config:
            raise UserError("--resume keeps the run's folder and settings: omit --out and --config")
        script = Path(parser.prog).stem
        folder = newest_run(script) if args.resume == "newest" else Path(args.resume)
        run = load_file(folder / "checkpoint.pt")
        if run["script"] != script:
            raise UserError(f"{folder} was trained by {run['script']}.py: resume it with that")
        args = parser.parse_args([*as_argv(run["config"]), *argv])
        args.resume = folder
        for name, value in run["config"].items():
            if getattr(args, name, None) == "auto":  # as was settled then
                setattr(args, name, value)
            elif name not in MAY_CHANGE and getattr(args, name, None) != value:
                raise UserError(f"--{name} is {value} in {folder} and cannot change on --resume")
    if args.path and args.dataset:
        raise UserError("--path and --dataset both name the data: omit one of them")
    if args.label and args.dataset not in ADDRESSES:
        raise UserError(
            f"--label needs --dataset {' or '.join(ADDRESSES)}: other data has no classes"
        )
    return args


def settle_data_and_size(args):
    """For networks of doubling stages: the glyphs where no data is named; a power of two pixels."""
    if not args.path and not args.dataset:
        args.dataset = "glyphs"
        print("no --path: training on the built-in glyphs, 32 pixels")
    args.image_size = args.image_size or (32 if args.dataset else 64)
    if args.image_size not in (16, 32, 64, 128, 256):
        raise UserError(f"--image_size {args.image_size} is not 16, 32, 64, 128 or 256")


def as_argv(settings):
    """Settings as typed flags: {"flip": True, "lrd": 0.1} -> ["--flip", "--lrd=0.1"]."""
    argv = []
    for name, value in settings.items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        elif value is not None:
            argv.append(f"--{name}={value}")
    return argv


def write_ini(path, section, settings):
    """One setting a line, in JSON, whose quotes let any path survive."""
    lines = [f"{name} = {json.dumps(value)}\n" for name, value in settings.items()]
    with replacing(path) as temporary:
        temporary.write_text(f"[{section}]\n{''.join(lines)}", encoding="utf-8")


def read_ini(path, parser):
    """The settings of an INI file; an unknown name or a wrong value is a UserError."""
    ini = configparser.ConfigParser(interpolation=None, delimiters="=")
    settings, known = {}, settings_of(parser.parse_args([]))
    try:
        ini.read_string(Path(path).read_text(encoding="utf-8"))
        for name, text in itertools.chain(*(ini[section].items() for section in ini.sections())):
            if name not in known:
                raise UserError(f"unknown setting {name!r} (known: {', '.join(known)})")
            settings[name] = text
            with contextlib.suppress(json.JSONDecodeError):  # written by hand, without quotes
                settings[name] = json.loads(text)
        parser.parse_args(as_argv(settings))
    except (OSError, ValueError, configparser.Error) as error:
        raise UserError(f"--config {path}: {error}".partition("\n")[0]) from None
    return settings


# ----------------------------------------------------------------------------- devices and ranks


def choose_device(name):
    """The torch.device of --device; "auto" prefers an accelerator."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception:  # each backend that is missing raises something else
        raise UserError(f"--device {name} is not available here: try cpu") from None
    return device


def rank():
    """The number of this process among those that torchrun started; alone, 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes torchrun started; alone, 1."""
    return dist.get_world_size() if dist.is_initialized() else 1


def start_ranks(script, get_args):
    """With --ngpu N on the command line, torchrun runs this script N times and the process ends."""
    if "RANK" in os.environ or not any(word.startswith("--ngpu") for word in sys.argv):
        return
    args = get_args(sys.argv[1:])  # what is wrong with the flags is said once, here
    check_shares(args, args.ngpu)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // args.ngpu)))
    try:
        torchrun(["--standalone", f"--nproc_per_node={args.ngpu}", str(script), *sys.argv[1:]])
    except ChildFailedError as error:
        sys.exit(error.get_first_failure()[1].exitcode)
    except SignalException:
        sys.exit(130)
    sys.exit()


def check_shares(args, ranks):
    if args.batch_size % ranks:
        raise UserError(f"--batch_size {args.batch_size} does not divide by {ranks} processes")


def join_ranks(name):
    """The torch.device of --device; under torchrun one for each process, and they meet here."""
    device = choose_device(name)
    if "RANK" not in os.environ:
        return device
    if device.type == "cuda":
        number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= count:
            raise UserError(f"more processes than GPUs: this machine has {count}")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"several processes work with cuda or --device cpu, not {device.type}")
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        patience = {"timeout": datetime.timedelta(hours=6)}  # rank 0 may decode many images
        store, number, size = next(dist.rendezvous("env://", **patience))
        # processes that torchrun starts again must not meet the traces of those before
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=number, world_size=size, **patience)
    if rank() > 0:  # rank 0 speaks for all
        sys.stdout = Path(os.devnull).open("w", errors="backslashreplace")  # noqa: SIM115
    return device


def leave_ranks(code):
    """End a process that join_ranks brought in at once: threads of gloo can abort a slow exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextlib.contextmanager
def rank_0_first():
    """What is in the block happens on rank 0 before it does on the others."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and world_size() > 1:
        dist.barrier()


def gather(tensor):
    """The tensors of all ranks, in their order; alone, just this one."""
    if world_size() == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return parts


def rank_mean(tensor):
    """Its mean over all ranks, the same bits on each."""
    return tensor if world_size() == 1 else torch.stack(gather(tensor)).mean(0)


def from_rank_0(make):
    """What make() returns on rank 0, where alone it is called, for all."""
    box = [make() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def on_any_rank(*flags):
    """Whether each flag is set on any rank; a CPU matter, that waits for no GPU."""
    if world_size() == 1:
        return flags
    flags = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags.bool().tolist()


def sync_grads(net):
    """Average the gradients of a network over all ranks; alone, nothing happens."""
    if world_size() == 1:
        return
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    parts = flat.div_(world_size()).split([grad.numel() for grad in grads])
    for grad, part in zip(grads, parts):
        grad.copy_(part.view(grad.shape))


def drawn(draw, n, *shape, device=None):
    """n rows of torch.rand or torch.randn: this rank's, out of those drawn for the whole batch.

    So a batch gets the same numbers whatever the number of ranks.
    """
    whole = draw(n * world_size(), *shape, device=device)
    return whole[rank() * n : (rank() + 1) * n]


def setup(args):
    """Choose device and precision (which goes back into `args`), seed; returns the device."""
    device = join_ranks(args.device)
    check_shares(args, world_size())
    if args.ngpu > 1 and world_size() == 1:
        raise UserError("ngpu is for the command line: start your own script with torchrun")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    if args.precision == "auto":  # bf16 where the hardware multiplies in it
        cpu = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        fast = cpu.get("amx_bf16") or cpu.get("avx512_bf16")
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bf16" if fast else "fp32"
    torch.manual_seed(mixed(args.seed, "init"))
    return device


def mixed(*key):
    """One 63-bit seed out of several numbers and words, so that their streams are independent."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


# ---------------------------------------------------------------------------------------- images

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def load_data(args):
    """The images that the flags name, uint8 (N, H, W, C); settles --augment auto."""
    if args.path:
        with rank_0_first():
            images = load_images(args.path, args.image_size, args.channels, args.cache)
    elif args.dataset in ADDRESSES:
        with rank_0_first():
            images, labels = read_dataset(args.dataset, args.data_dir)
        images = images[np.isin(labels, args.label)] if args.label else images
        images = resized(images, args.image_size, args.channels)
    else:
        images = draw_glyphs(args.image_size, channels=1 if args.channels == "1" else 3)
    if args.augment == "auto":
        args.augment = ",".join(AUGMENT) if len(images) < 5000 else "none"
    advise(len(images), args)
    return images


def advise(n, args):
    """Say what n images call for. The numbers are those seen on cats at 64 pixels."""
    if n * args.epochs < 60_000:
        print(
            f"advice: this shows D {n * args.epochs:,} images; cats at 64 pixels had faces after "
            f"60,000 and whiskers after 300,000, which is --epochs {math.ceil(300_000 / n)} here"
        )
    if n < 1000:
        mirror = "" if args.flip else "--flip if their mirror images look natural; "
        augment = "" if args.augment != "none" else "--augment " + ",".join(AUGMENT) + "; "
        print(
            f"advice: {n} images are few: {mirror}{augment}generate.py --nearest tells afterwards "
            "whether the samples are copies"
        )


def load_images(path, image_size, channels="auto", cache=".cache"):
    """Decode a folder or .zip once; returns a memory-mapped uint8 (N, H, W, C) array.

    Images are cropped to their central square and resized to `image_size`. `channels` is "1", "3"
    or "auto": 1 if all files are grey. The result stays in `cache` while files and settings stay
    the same. Undecodable files are skipped and listed; UserError if nothing is left.
    """
    path = Path(path)
    files, open_image = image_files(path)
    key = hashlib.sha256(repr((2, files, image_size, channels)).encode()).hexdigest()[:12]
    cached = Path(cache, f"{path.resolve().stem}-{image_size}px-{key}.npy")
    images = open_cached(cached)
    if images is None:
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            decode_all([name for name, *_ in files], open_image, image_size, channels, cached)
        except (OSError, UserError) as error:
            raise UserError(f"cannot keep decoded images ({error}): pass another --cache") from None
        images = open_cached(cached)
    listed = f"listed with the reasons in {cached.with_suffix('.txt')}"
    if not len(images):
        raise UserError(f"none of the {len(files)} images in {path} can be decoded, {listed}")
    if skipped := len(files) - len(images):
        print(f"{skipped:,} of {len(files):,} files cannot be decoded and are skipped, {listed}")
    with contextlib.suppress(OSError), cached.with_suffix(".txt").open(encoding="utf-8") as notes:
        print(next(notes), end="")
    megabytes = f"{images.nbytes / 1e6:,.0f} MB in {cached}"
    print(f"{len(images):,} images of {path}, {images.shape[1:]} each, {megabytes}", flush=True)
    return images


def image_files(path):
    """The images of a folder or .zip, sorted, as (name, size, time or checksum), and an opener."""
    if path.is_dir():
        files = []
        for folder, subfolders, names in os.walk(path):
            if "checkpoint.pt" in names:  # a run: its sample grids are no data
                names = subfolders[:] = []
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            for file in (os.path.join(folder, name) for name in names if name[0] != "."):
                if file.lower().endswith(ENDINGS):
                    try:
                        stat = os.stat(file)
                    except OSError:  # a broken link
                        stat = os.lstat(file)
                    files.append((file, stat.st_size, stat.st_mtime_ns))
        open_image = functools.partial(open, mode="rb")
    elif zipfile.is_zipfile(path):
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise UserError(f"{path} is a damaged .zip ({error})") from None
        files = [(member.filename, member.file_size, member.CRC) for member in archive.infolist()]
        files = [file for file in files if file[0].lower().endswith(ENDINGS)]
        open_image = lambda name: io.BytesIO(archive.read(name))
    else:
        state = "is neither a folder nor a .zip" if path.exists() else "does not exist"
        raise UserError(f"{path} {state}: pass a folder or .zip of images")
    if not files:
        searched = f"{' '.join(ENDINGS)}, also in subfolders that are no run"
        raise UserError(f"no images in {path} (looked for {searched}): pass another folder or .zip")
    return sorted(files), open_image


def open_cached(path):
    """The array in a cache file; None if there is none or it is not as it was written."""
    try:
        images = np.load(path, mmap_mode="r")
        with open(path, "rb") as file:
            file.seek(-4, os.SEEK_END)
            return images if int.from_bytes(file.read(), "big") == checksum(images) else None
    except (OSError, ValueError, EOFError):
        return None


CRC_BLOCK = 512  # images


def checksum(images):
    """One CRC over those of blocks of images, so that all cores can work on it."""
    parts = (images[i : i + CRC_BLOCK] for i in range(0, len(images), CRC_BLOCK))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return zlib.crc32(np.array([*pool.map(zlib.crc32, parts)], ">u4"))


def decode_all(names, open_image, image_size, channels, cached):
    """Decode files in threads, in order, into the .npy `cached`; a report goes into a .txt.

    Its first line tells what the files are like, the others which failed and why. Four bytes of
    checksum follow the array: numpy does not mind, open_cached checks them.
    """

    def attempt(work, name):
        try:
            with open_image(name) as file:
                return work(file), None
        except Exception as error:  # decoders raise anything at all on damaged files
            return None, f"{name}: {str(error) or type(error).__name__}\n"

    def write_header():  # padded by numpy for any first axis, so that it can be written again
        shape = (count, image_size, image_size, channels)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)

    if channels == "auto":
        modes = (attempt(lambda file: Image.open(file).mode, name)[0] for name in names)
        channels = 3 if any(mode not in (None, *GREY_MODES) for mode in modes) else 1
    channels = int(channels)
    count, transparent, checksums, errors, line = 0, 0, [], [], ProgressLine()
    kinds, sides, contents = collections.Counter(), [], set()

    def work(file):
        image = Image.open(file)
        mode, side = image.mode, min(image.size)
        pixels, has_alpha = decode(image, image_size, channels)
        return pixels, has_alpha, mode, side, hashlib.sha256(pixels).digest()

    with ThreadPoolExecutor(os.cpu_count()) as pool, replacing(cached) as temporary:
        with temporary.open("wb") as file:
            write_header()
            for part in (names[i : i + 512] for i in range(0, len(names), 512)):
                for result, error in pool.map(functools.partial(attempt, work), part):
                    if error:
                        errors.append(error)
                        continue
                    pixels, has_alpha, mode, side, content = result
                    kinds[mode] += 1
                    sides.append(side)
                    contents.add(content)
                    file.write(pixels)
                    checksums += [0] * (count % CRC_BLOCK == 0)  # as checksum() has them
                    checksums[-1] = zlib.crc32(pixels, checksums[-1])
                    count, transparent = count + 1, transparent + has_alpha
                done = count + len(errors)
                line.show(f"decoding: {done:,} of {len(names):,}", last=done == len(names))
            file.write(zlib.crc32(np.array(checksums, ">u4")).to_bytes(4, "big"))
            file.seek(0)
            write_header()
        about = describe(image_size, kinds, sides, transparent, count - len(contents))
        notes = "".join([about, *errors]).encode("utf-8", "backslashreplace")  # odd file names
        cached.with_suffix(".txt").write_bytes(notes)


def describe(image_size, modes, sides, transparent, duplicates):
    """A line on decoded files: Pillow's modes, shorter sides in pixels, and what to look into."""
    if not sides:
        return "files: none\n"
    kinds = ", ".join(f"{n:,} {mode}" for mode, n in modes.most_common())
    line = f"files: {kinds}; shorter sides {min(sides)} to {max(sides)} pixels"
    small = sum(side < image_size for side in sides)
    for n, what in (
        (small, f"smaller than --image_size {image_size}"),
        (duplicates, "exact duplicates"),
        (transparent, "with transparency, laid on white"),
    ):
        line += f"; {n:,} {what}" if n else ""
    return line + "\n"


GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L")


def decode(file, image_size=None, channels=3):
    """Decode an image file; returns uint8 (H, W, channels) and whether it was transparent.

    The file may also be an image that Pillow has just opened. EXIF orientation is applied, 16-bit
    grey is scaled, transparency is laid on white, of an animation the first frame counts. With
    `image_size`: its central square, resized.
    """
    image = file if isinstance(file, Image.Image) else Image.open(file)
    if image_size:
        image.draft(None, (2 * image_size, 2 * image_size))  # JPEG: decode photographs small
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, or 32 that hold 16
        values = np.asarray(image).astype(np.float32) / 257  # 65535 -> 255
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    transparent = image.has_transparency_data
    if transparent:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if image_size:
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image).reshape(image.height, image.width, channels)
    return pixels, transparent


ADDRESSES = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/",),
}
MNIST = {  # IDX files: header (type, then the sizes of the axes), sha256 of the whole
    "train-images-idx3-ubyte": (
        "000008030000ea600000001c0000001c",
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "train-labels-idx1-ubyte": (
        "000008010000ea60",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
}
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # of the .tar.gz
UNREADABLE = (OSError, EOFError, ValueError, KeyError, zlib.error, tarfile.TarError)


def read_dataset(name, data_dir):
    """The training split of "mnist" or "cifar10": uint8 images (N, H, W, C) and labels (N,).

    Read from `data_dir`, downloaded into it if nothing is there. Files that are there are checked
    for size and layout, downloads for their checksum; UserError if that fails.
    """
    folder = Path(data_dir)
    if name == "mnist":
        pixels, labels = (find_or_fetch(name, folder, f"{file}.gz", read_mnist) for file in MNIST)
        return pixels.reshape(-1, 28, 28, 1), labels
    records = find_or_fetch(name, folder, "cifar-10-binary.tar.gz", read_cifar10).reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]


def find_or_fetch(dataset, folder, name, read):
    """Content of the file `name` in one of its usual places below `folder`, or downloaded."""
    plain = name.removesuffix(".gz")
    places = [name, plain, f"MNIST/raw/{name}", f"MNIST/raw/{plain}"]
    if dataset == "cifar10":
        places = [name, "cifar-10-batches-bin"]
    for path in (folder / place for place in places):
        if path.exists():
            try:
                return read(path)
            except UNREADABLE as error:
                raise UserError(f"{path} is no {plain} ({error}): remove it") from None
    failures = []
    for address in ADDRESSES[dataset]:
        try:
            download(address + name, folder / name, functools.partial(read, verify=True))
            return read(folder / name)
        except (HTTPException, *UNREADABLE) as error:
            failures.append(f"{address}{name}: {error or type(error).__name__}")
    raise UserError(f"no {name} in {folder}, and no download ({'; '.join(failures)}): put it there")


def download(url, path, check):
    """Fetch a file, with progress; it takes its name only once it is complete and checked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line, done = ProgressLine(), 0
    with urllib.request.urlopen(url, timeout=30) as response, replacing(path) as part:
        total = int(response.headers.get("Content-Length", 0))
        with part.open("wb") as file:
            while block := response.read(1 << 16):
                done += file.write(block)
                line.show(f"{url}: {done / 1e6:.1f} of {total / 1e6:.1f} MB", last=done == total)
        if done < total:
            raise EOFError(f"only {done:,} of {total:,} bytes came")
        check(part)


def read_mnist(path, verify=False):
    """The values of an IDX file, plain or gzipped."""
    name = next(file for file in MNIST if file in path.name)
    header, sha256 = bytes.fromhex(MNIST[name][0]), MNIST[name][1]
    size = len(header) + math.prod(np.frombuffer(header, ">i4")[1:].tolist())
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    with (gzip.open if is_gzip else open)(path, "rb") as file:
        content = file.read(size + 1)  # a byte more would not be MNIST
    if len(content) != size or not content.startswith(header):
        raise ValueError("wrong size or header")
    if verify and hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError("wrong checksum")
    return np.frombuffer(content, np.uint8)[len(header) :]


def read_cifar10(path, verify=False):
    """The records of the five training batches, from the .tar.gz or the folder it unpacks to."""
    names = [f"data_batch_{i}.bin" for i in range(1, 6)]
    if verify and hashlib.md5(path.read_bytes()).hexdigest() != CIFAR10_MD5:
        raise ValueError("wrong checksum")
    if path.is_dir():
        batches = [(path / name).read_bytes() for name in names]
    else:
        with tarfile.open(path) as archive:  # read, never unpacked
            members = [archive.extractfile(f"cifar-10-batches-bin/{name}") for name in names]
            batches = [member.read(30_730_001) for member in members]
    records = np.frombuffer(b"".join(batches), np.uint8)
    if any(len(batch) != 10_000 * 3073 for batch in batches) or records[::3073].max() > 9:
        raise ValueError("wrong size or labels")
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
    """n coloured characters in Pillow's own font, uint8 (n, image_size, image_size, channels)."""
    rng = np.random.default_rng(seed)
    side = 3 * image_size  # drawn large, turned, then reduced: smooth edges
    fonts = [ImageFont.load_default(side * share) for share in (0.7, 0.8, 0.9)]
    images = []
    for _ in range(n):
        mask, place = Image.new("L", (side, side)), side * rng.uniform(0.45, 0.55, 2)
        font, glyph = fonts[rng.integers(3)], GLYPHS[rng.integers(len(GLYPHS))]
        style = {"font": font, "anchor": "mm", "stroke_width": side // 40}
        ImageDraw.Draw(mask).text(tuple(place), glyph, 255, **style)
        mask = mask.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
        mask = mask.resize((image_size, image_size), Image.Resampling.BOX)
        hue = rng.integers(360)
        image = Image.new("RGB", mask.size, f"hsl({hue}, 60%, 85%)")
        image.paste(f"hsl({hue + rng.integers(60, 300)}, 80%, 30%)", mask=mask)
        images.append(np.asarray(image.convert("L" if channels == 1 else "RGB")))
    return np.stack(images).reshape(n, image_size, image_size, channels)


# -------------------------------------------------------------------------------------- networks


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


def init_weights(net, init="normal"):
    """Weights from N(0, 0.02), BatchNorm's from N(1, 0.02) (Radford et al., 2015), or Xavier's."""
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            if init == "normal":
                nn.init.normal_(module.weight, 0.0, 0.02)
            else:
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and init == "normal":
            nn.init.normal_(module.weight, 1.0, 0.02)


def update_ema(G_ema, G, step, decay):
    """Move the averaged generator towards G, faster in the first steps; `step` counts from 0."""
    average = get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))
    average(list(G_ema.parameters()), list(G.parameters()), step)


def refresh_batchnorm(G_ema, z, generator, device="cpu"):
    """Estimate the BatchNorm statistics of averaged weights anew: no copy of G's would fit them."""
    update_bn([draw_z(z, CHUNK, generator=generator) for _ in range(8)], G_ema, device)


def draw_z(z, n, device="cpu", generator=None):
    """n latents (n, dim); `z` says how: {"dim": 100, "distribution": "normal" or "uniform"}."""
    draw = torch.rand if z["distribution"] == "uniform" else torch.randn
    noise = draw(n, z["dim"], device=device, generator=generator)
    return noise * 2 - 1 if z["distribution"] == "uniform" else noise


def latents(z, seed, numbers):
    """The latents of the images with these numbers, each from (seed, number) alone; on the CPU."""
    source = torch.Generator()
    seeds = [mixed(seed, "image", number) for number in numbers]
    return torch.cat([draw_z(z, 1, generator=source.manual_seed(seed)) for seed in seeds])


CHUNK = 64  # images generated at once; always as many, since rounding may depend on it


@torch.no_grad()
def generate(G, latents):
    """Images uint8 (n, H, W, C) of latents (n, z_dim); each the same whatever is beside it."""
    device = next(G.parameters()).device
    images = []
    for z in latents.split(CHUNK):
        padded = F.pad(z, (0, 0, 0, CHUNK - len(z)))
        images.append(to_uint8(G(padded.to(device))[: len(z)]))
    return np.concatenate(images)


def augment(images, policy):
    """DiffAugment (Zhao et al., 2020, arXiv:2006.10738) of (N, C, H, W), see AUGMENT."""

    if policy == "none":
        return images

    def rand(*shape):
        return drawn(torch.rand, len(images), *shape, device=images.device)

    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device)[:, None]
    columns = torch.arange(width, device=images.device)
    if "colour" in policy:
        images = images + rand(1, 1, 1) - 0.5  # brightness
        grey = images.mean(1, keepdim=True)
        images = (images - grey) * (2 * rand(1, 1, 1)) + grey  # saturation
        mean = images.mean((1, 2, 3), keepdim=True)
        images = (images - mean) * (rand(1, 1, 1) + 0.5) + mean  # contrast
    if "translation" in policy:  # by up to 1/8; products with shifted identities bring in zeros
        down = ((rand(1, 1) * 2 - 1) * height / 8).round()
        right = ((rand(1, 1) * 2 - 1) * width / 8).round()
        move_rows = (rows - rows.T == down).to(images.dtype)  # (N, H, H)
        move_columns = (columns - columns[:, None] == right).to(images.dtype)  # (N, W, W)
        images = move_rows[:, None] @ images @ move_columns[:, None]
    if "cutout" in policy:  # a square hole of half the side, centred anywhere
        top, left = rand(1, 1) * height, rand(1, 1) * width
        hole = ((rows - top).abs() < height / 4) & ((columns - left).abs() < width / 4)
        images = images * ~hole[:, None]  # (N, 1, H, W)
    return images


def summary(net, *inputs):
    """A table of the layers of `net`: their types, output shapes and numbers of parameters."""
    lines = [type(net).__name__]

    def note(module, _, output, name):
        count = sum(p.numel() for p in module.parameters())
        layer = f"{name} {type(module).__name__}"
        lines.append(f"  {layer:<30}{tuple(output.shape)!s:<22}{count:>12,}")

    leaves = [(name, module) for name, module in net.named_modules() if not list(module.children())]
    hooks = [m.register_forward_hook(functools.partial(note, name=name)) for name, m in leaves]
    with torch.no_grad():
        net(*inputs)
    for hook in hooks:
        hook.remove()
    total = sum(p.numel() for p in net.parameters())
    return "\n".join([*lines, f"  {'parameters':<52}{total:>12,}"])


# -------------------------------------------------------------------------------------- pictures


def to_uint8(images):
    """(N, C, H, W) in [-1, 1] -> uint8 (N, H, W, C) array."""
    pixels = images.float().mul(127.5).add(127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def to_picture(pixels):
    """uint8 (H, W, C) -> Pillow image."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def diversity(images):
    """How much images (N, H, W, C) differ: the standard deviation of a pixel, in grey levels."""
    return images.astype(np.float32).std(0).mean()


def save_picture(image, path, kind="PNG", **options):
    """Save a Pillow image; encoded in memory first: Pillow's writing hides that a disk is full."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def save_grid(images, path, columns=None, gap=2):
    """Save uint8 (n, H, W, C) as one PNG, row by row; by default as wide as high."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    missing = -len(images) % columns
    images = np.pad(images, ((0, missing), (0, gap), (0, gap), (0, 0)), constant_values=255)
    n, height, width, channels = images.shape
    grid = images.reshape(n // columns, columns, height, width, channels).swapaxes(1, 2)
    grid = grid.reshape(n // columns * height, columns * width, channels)
    grid = np.pad(grid, ((gap, 0), (gap, 0), (0, 0)), constant_values=255)
    save_picture(to_picture(grid), path)


def save_gif(frames, path):
    """Save Pillow images as an animation of about 10 s."""
    frames = [frame.convert("P", palette=Image.Palette.ADAPTIVE) for frame in frames]
    times = [max(40, 10_000 // len(frames))] * (len(frames) - 1) + [2000]  # ms; rests on the last
    options = {"save_all": True, "append_images": frames[1:], "duration": times, "loop": 0}
    save_picture(frames[0], path, "GIF", **options)


COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


def save_curves(panels, path, xlabel, width=900, height=300):
    """Draw line charts one below the other: panels is [(title, x, {label: y, ...}), ...]."""
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
        for j, (label, y) in enumerate(curves.items()):
            xy = np.interp(x, x_ticks, columns), np.interp(y, y_ticks, rows)
            draw.line(list(zip(*xy, strict=True)), COLOURS[j], 2, joint="curve")
            draw.text((right - 130 * j, top - 8), label, COLOURS[j], font, anchor="rb")
    save_picture(canvas, path)


# ------------------------------------------------------------------------------------------- run

COLUMNS = ["step", "epoch", "kimg", "seconds"]
COLUMNS += ["loss_d", "loss_g", "d_real", "d_fake", "d_fake_after", "images_per_s"]
ROWS_PER_EPOCH = 20  # of metrics.csv, each the mean over the steps since the last
SAVE_AFTER = 600  # seconds between checkpoints within an epoch
REST = 30  # seconds: ends of epochs that follow the last checkpoint faster write none
WON = 0.1  # a loss of D below this for PATIENCE steps: G has nothing left to learn from
ALIKE = 0.4  # of the diversity of real images; healthy runs show 0.8 and more
PATIENCE = 1000  # steps before either is said


def tensorboard_writer():
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter


class Run:
    """A training run: its folder, its batches, and all that is written while it goes on.

    `z` says how latents are drawn (see draw_z); `state` holds G, D, G_ema, opt_d and opt_g. With
    --resume their content is loaded here.
    """

    def __init__(self, args, script, images, device, generator_args, z, **state):
        self.args, self.script, self.images, self.device = args, Path(script).stem, images, device
        self.generator_args, self.z, self.state = generator_args, z, state
        self.k, ranks = getattr(args, "k", 1), world_size()
        batch_size = min(args.batch_size, len(images) // self.k // ranks * ranks)
        if batch_size < 2 * ranks:
            need = f"{2 * self.k * ranks} (2 * k" + f" * {ranks} processes" * (ranks > 1)
            raise UserError(f"{len(images)} images are too few: a step needs {need})")
        if batch_size < args.batch_size:
            print(f"batches of {batch_size}: there are only {len(images)} images")
        self.images_per_step = self.k * batch_size
        self.steps_per_epoch = len(images) // self.images_per_step
        self.steps = args.epochs * self.steps_per_epoch
        self.step, self.seconds, self.pending = 0, 0.0, []
        self.stop_asked = self.stopping = False  # by a signal to this rank; agreed among all
        self.order, self.fresh_step, self.line = (None, None), None, ProgressLine()
        self.won_steps, self.warned = 0, set()
        writer = tensorboard_writer() if args.tensorboard and rank() == 0 else None
        self.folder = args.resume or from_rank_0(self.new_folder)
        if args.resume:
            self.restore()
        if rank() == 0:
            (self.folder / "samples").mkdir(exist_ok=True)
            write_ini(self.folder / "config.ini", self.script, settings_of(args))
        self.writer = writer and writer(self.folder, purge_step=self.step + 1)

    @functools.cached_property
    def real_diversity(self):
        return diversity(self.shown_real())

    @property
    def epoch(self):
        return self.step // self.steps_per_epoch

    def batches(self):
        """Yield each step's real images, (k * batch_size, C, H, W) in [-1, 1], until the end.

        Of several ranks each gets its share of every batch.
        Everything random in a step follows from (seed, step): torch is seeded anew before each.
        Ctrl-C and SIGTERM let the step end, save, and raise KeyboardInterrupt.
        """
        self.announce()
        handlers = {}
        with contextlib.suppress(ValueError):  # only the main thread may handle signals
            for number in (signal.SIGINT, signal.SIGTERM):
                handlers[number] = signal.signal(number, self.stop)
        try:
            if self.step == 0:
                if rank() == 0:
                    save_grid(self.shown_real(), self.folder / "samples/real.png")
                    self.sample()
                self.save()
            yield from self.remaining_steps()
            if rank() == 0:
                self.draw()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.stopping:
            ranks = f" --ngpu {world_size()}" * (world_size() > 1)
            print(f"\nstopped; to go on: python {self.script}.py --resume {self.folder}{ranks}")
            raise KeyboardInterrupt

    def remaining_steps(self):
        images, device, ahead, coming = self.images, self.device, None, None
        if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[1] / 4:
            images = torch.from_numpy(np.array(images)).to(device)
        elif device.type == "cuda":
            ahead = ThreadPoolExecutor(1)  # reads the next batch while the GPU works on this one
        self.started = self.marked = self.saved = time.monotonic()
        self.first_step = self.marked_step = self.step
        while self.step < self.steps and not self.stopping:
            real = coming.result() if coming else self.fetch(images, self.step)
            coming = ahead and ahead.submit(self.fetch, images, self.step + 1)
            torch.manual_seed(mixed(self.args.seed, "step", self.step))
            real = real.to(device, non_blocking=True).permute(0, 3, 1, 2)  # channels_last
            real = real.float().div_(127.5).sub_(1)
            if self.args.flip:
                one = (len(real) // self.k, 1, 1, 1)  # of the k batches
                draws = [drawn(torch.rand, *one, device=device) for _ in range(self.k)]
                real = torch.where(torch.cat(draws) < 0.5, real.flip(3), real)
            yield real

    def fetch(self, images, step):
        """This rank's images (N, H, W, C) of a step, uint8; in an epoch each at most once."""
        epoch, i = divmod(step, self.steps_per_epoch)
        if epoch != self.order[0]:
            order = np.random.default_rng((self.args.seed, epoch)).permutation(len(images))
            on_device = isinstance(images, torch.Tensor)
            self.order = epoch, torch.from_numpy(order).to(self.device) if on_device else order
        whole = self.order[1][i * self.images_per_step : (i + 1) * self.images_per_step]
        batch = images[whole.reshape(self.k, world_size(), -1)[:, rank()].flatten()]
        if isinstance(batch, np.ndarray):
            batch = torch.from_numpy(batch)
            return batch.pin_memory() if self.device.type == "cuda" else batch
        return batch

    def stop(self, number, frame):
        self.stop_asked = True
        if not dist.is_initialized():  # torchrun repeats the signal
            signal.signal(number, signal.SIG_DFL)  # a second Ctrl-C ends at once

    def log(self, stats):
        """End a step with its 0-d tensors `stats`; writes what is due."""
        self.step += 1
        self.pending.append(stats)
        within, last = self.step % self.steps_per_epoch, self.step == self.steps
        unsaved = time.monotonic() - self.saved if rank() == 0 else 0  # its clock counts
        save_due = unsaved > (SAVE_AFTER if within else REST)
        self.stopping, save_due = on_any_rank(self.stop_asked, save_due)
        if within % math.ceil(self.steps_per_epoch / ROWS_PER_EPOCH) == 0 or within == 0:
            self.write_row()
        if rank() == 0 and within == 0 and (last or self.epoch % self.args.sample_every == 0):
            self.sample()
        if rank() == 0 and within == 0 and (last or self.epoch % self.args.checkpoint == 0):
            save_file(self.snapshot(), self.folder / f"generator_{self.epoch:04d}.pt")
        if last or self.stopping or save_due:
            self.save()
        if within == 0:
            self.marked, self.marked_step = time.monotonic(), self.step

    def means(self):
        """Means of the statistics since the last row; UserError if one is not finite."""
        means = rank_mean(self.pending_table().double().mean(0)).tolist()
        if not all(map(math.isfinite, means)):
            raise self.not_finite("loss")
        return dict(zip(self.pending[0], means, strict=True))

    def pending_table(self):
        """(steps since the last row, statistics)"""
        rows = [torch.stack([*stats.values()]) for stats in self.pending]
        return torch.stack(rows).cpu() if rows else torch.empty(0, 0)

    def not_finite(self, what):
        return UserError(
            f"a {what} is not finite at step {self.step}; {self.folder}/checkpoint.pt keeps the "
            "last good state. Try lower rates, --precision fp32 or another --seed"
        )

    def write_row(self):
        """A row of metrics.csv, and the progress line."""
        means, now, steps = self.means(), time.monotonic(), len(self.pending)
        self.pending = []
        if rank() > 0:
            return
        speed = (self.step - self.marked_step) * self.images_per_step / (now - self.marked)
        seconds = self.seconds + now - self.started
        row = {"step": self.step, "seconds": seconds, "images_per_s": speed, **means}
        row["epoch"] = math.ceil(self.step / self.steps_per_epoch)
        row["kimg"] = self.step * self.images_per_step / 1000
        columns = [*COLUMNS, *(name for name in row if name not in COLUMNS)]
        with (self.folder / "metrics.csv").open("a") as file:
            header = "" if file.tell() else ",".join(columns) + "\n"
            file.write(header + ",".join(f"{row[name]:.12g}" for name in columns) + "\n")
        if self.writer:
            for name in columns:
                self.writer.add_scalar(name, row[name], self.step)
        self.won_steps = self.won_steps + steps if means["loss_d"] < WON else 0
        if self.won_steps >= PATIENCE:
            self.warn("D has won", f"its loss has been below {WON} for {self.won_steps} steps")
        self.marked, self.marked_step = now, self.step
        left = (now - self.started) / (self.step - self.first_step) * (self.steps - self.step)
        self.line.show(
            f"epoch {row['epoch']}/{self.args.epochs} step {self.step}/{self.steps}, "
            f"{seconds / 60:.1f} min, {left / 60:.1f} left, {speed:.0f} images/s, "
            f"loss D {means['loss_d']:.2f} G {means['loss_g']:.2f}, D(x) {means['d_real']:.2f}, "
            f"D(G(z)) {means['d_fake']:.2f}/{means['d_fake_after']:.2f}",
            last=self.step == self.steps,
        )

    def warn(self, what, why):
        """Say once what goes wrong in this run, and which flags may help."""
        if what in self.warned:
            return
        self.warned.add(what)
        flags = ["a lower --lrd"]
        if self.args.augment == "none":
            flags.append("--augment " + ",".join(AUGMENT))
        if getattr(self.args, "r1", None) == 0:
            flags.append("--r1 1")
        if hasattr(self.args, "dropout"):
            flags.append("a higher --dropout")
        if what == "G has collapsed":
            flags.append("a larger --batch_size")
        print(f"\nwarning: {what}: {why}. Try {' or '.join(flags)}", flush=True)

    def announce(self):
        """Print the table of the settings, and what is about to happen."""
        cells = [f"{name:<13}{value}" for name, value in settings_of(self.args).items()]
        rows = math.ceil(len(cells) / 3)
        for i in range(rows):
            print("  ".join(f"{cell:<30}" for cell in cells[i::rows]).rstrip())
        counts = [sum(p.numel() for p in self.state[name].parameters()) for name in ("G", "D")]
        where = f"on {self.device}" + f", {world_size()} processes" * (world_size() > 1)
        print("G has {:,} parameters, D {:,}".format(*counts), where, sep=", ")
        span = f"step {self.step} to {self.steps}, {self.steps_per_epoch} an epoch"
        print(f"{self.folder}: {span}", flush=True)

    def new_folder(self):
        """Make the run's folder; one that holds a run is left alone."""
        out, data = self.args.out, Path(self.args.path or self.args.dataset).resolve().stem
        if out and Path(out, "checkpoint.pt").exists():
            raise UserError(f"{out} holds a run: --resume {out} goes on, or pass another --out")
        folder, name = Path(out or "runs"), f"{self.script.removeprefix('train_')}-{data}"
        for number in itertools.count(1):
            path = folder if out else folder / (name if number == 1 else f"{name}-{number}")
            if out or not path.exists():
                path.mkdir(parents=True, exist_ok=bool(out))
                return path

    def restore(self):
        """Take over the state of checkpoint.pt, and cut metrics.csv back to its step."""
        path, metrics = self.folder / "checkpoint.pt", self.folder / "metrics.csv"
        run = load_file(path)
        try:
            for name, part in self.state.items():
                part.load_state_dict(run[name])
                for p, held in part.state.items() if name.startswith("opt") else ():
                    if held["exp_avg"].shape != p.shape or held["exp_avg_sq"].shape != p.shape:
                        raise ValueError(f"{name} has other shapes")
            self.step, self.seconds, n_images = run["step"], run["seconds"], run["n_images"]
            names, tables = run["pending"]["names"], run["pending"]["of_ranks"]
            table = tables[min(rank(), len(tables) - 1)].to(self.device)
            self.pending = [dict(zip(names, row.unbind(), strict=True)) for row in table]
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"{path} does not fit {self.script}.py ({reason})") from None
        if n_images != len(self.images):
            raise UserError(f"{path} knows {n_images} images, not {len(self.images)}: start anew")
        if rank() > 0:
            return
        for leftover in self.folder.glob("**/.*.part"):  # of a killed process
            leftover.unlink()
        if metrics.exists():
            lines = [line for line in metrics.open() if line.endswith("\n")]
            kept = [line for line in lines[1:] if int(line.partition(",")[0]) <= self.step]
            with replacing(metrics) as temporary:
                temporary.write_text("".join(lines[:1] + kept))

    def refresh_batchnorm(self):
        """Give G_ema statistics of its own, once a step."""
        if self.fresh_step != self.step:
            source = torch.Generator().manual_seed(mixed(self.args.seed, "batchnorm"))
            refresh_batchnorm(self.state["G_ema"], self.z, source, self.device)
            self.fresh_step = self.step

    def shown_real(self):
        shown = np.random.default_rng(self.args.seed).permutation(len(self.images))[:CHUNK]
        return self.images[np.sort(shown)]

    def sample(self):
        self.refresh_batchnorm()
        images = generate(self.state["G_ema"], latents(self.z, self.args.seed, range(CHUNK)))
        ours, theirs = diversity(images), self.real_diversity
        if self.step >= PATIENCE and ours < ALIKE * theirs:
            why = f"a pixel varies by {ours:.0f} levels over its samples, by {theirs:.0f} over real"
            self.warn("G has collapsed", f"{why} images")
        path = self.folder / f"samples/epoch_{self.epoch:04d}.png"
        save_grid(images, path)
        if self.writer:
            pixels = np.asarray(Image.open(path).convert("RGB"))
            self.writer.add_image("samples", pixels, self.step, dataformats="HWC")

    def snapshot(self):
        """All that generate.py needs, and where it comes from."""
        self.refresh_batchnorm()
        return {"script": self.script, "generator_args": self.generator_args, "z": self.z,
                "config": settings_of(self.args), "step": self.step,
                "G_ema": self.state["G_ema"].state_dict()}  # fmt: skip

    def save(self):
        """Write checkpoint.pt: all that --resume needs."""
        sums = [p.sum() for name in ("G", "D") for p in self.state[name].parameters()]
        if not torch.stack(sums).isfinite().all():
            raise self.not_finite("weight")
        self.saved = time.monotonic()
        seconds = self.seconds + (self.saved - self.started if self.step else 0)
        names = [*self.pending[0]] if self.pending else []
        pending = {"names": names, "of_ranks": gather(self.pending_table())}
        if world_size() > 1:
            for buffer in (b for name in ("G", "D") for b in self.state[name].buffers()):
                dist.broadcast(buffer, 0)  # BatchNorm's running statistics
        if rank() > 0:
            return
        progress = {"n_images": len(self.images), "seconds": seconds, "pending": pending}
        parts = {name: part.state_dict() for name, part in self.state.items()}
        save_file(self.snapshot() | parts | progress, self.folder / "checkpoint.pt")

    def draw(self):
        """Draw training.gif and losses.png."""
        if self.writer:
            self.writer.close()
        grids = by_epoch(self.folder.glob("samples/epoch_*.png"))
        shown = np.linspace(0, len(grids) - 1, min(len(grids), 200)).astype(int)
        save_gif([Image.open(grids[i]) for i in shown], self.folder / "training.gif")
        if not (self.folder / "metrics.csv").exists():  # stopped before its first row
            return
        with (self.folder / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        if rows:
            of = {name: [float(row[name]) for row in rows] for name in rows[0]}
            kimg, own = of["kimg"], {name: y for name, y in of.items() if name not in COLUMNS}
            panels = [("loss", kimg, {"D": of["loss_d"], "G": of["loss_g"]})]
            panels += [("D's answer", kimg, {"D(x)": of["d_real"], "D(G(z))": of["d_fake"]})]
            panels += [("per step", kimg, own)] if own else []
            save_curves(panels, self.folder / "losses.png", "thousand images seen")
