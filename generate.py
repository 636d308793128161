"""Generate images with the generator of a run or snapshot.

    python generate.py --img_num 64                            # of the newest run
    python generate.py --load_path runs/dcgan-imgs --seed 1    # as it is now
    python generate.py --load_path runs/dcgan-imgs/generator_0050.pt --grid_size 10
    python generate.py --interpolate --nearest imgs/

Image number i of a seed is always the same, bit for bit on the same machine, whatever is made
beside it. Single images go into the folder --save_path, everything else beside it.
"""

import importlib.util
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import common

FRAMES = 10  # of each interpolation, both ends included


def get_args(argv):
    parser = common.Parser(__doc__)
    add, number = parser.add_argument, common.bounded(int, 1)
    add("--load_path", type=Path, help="run folder or snapshot .pt; default: the newest run")
    add("--img_num", type=number, default=16, help="single images")
    add("--grid_size", type=number, help="n for a grid of n * n; default: those of --img_num")
    add("--save_path", type=Path, help="folder for single images; default: generated/<run>")
    add("--seed", type=common.bounded(int, 0), default=0, help="image i follows from (seed, i)")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--label", help="of this class only, a number or name, where G knows classes")
    add("--interpolate", action="store_true", help="also ways from image to image, and as a GIF")
    add("--nearest", metavar="IMAGES",
        help="also each beside the nearest of this folder or .zip")  # fmt: skip
    add("--cache", default=".cache", help="for decoded images of --nearest")
    return parser.parse_args(argv)


def load_generator(path=None, device="cpu"):
    """The averaged generator of a run folder or snapshot (default: the newest run), and its `z`.

    The snapshot names its script, train_*.py, which must lie beside this file; its Generator is
    built with the recorded arguments. Raises common.UserError where anything does not fit.
    """
    path = path or common.newest_run()
    snapshot = common.load_file(path)
    name = str(snapshot["script"])
    script = Path(__file__).parent / f"{name}.py"
    if not re.fullmatch(r"train_\w+", name) or not script.is_file():
        raise common.UserError(f"{path} needs {name}.py, which does not lie beside generate.py")
    module = sys.modules.get(name)
    if not module or Path(module.__file__).resolve() != script.resolve():
        spec = importlib.util.spec_from_file_location(name, script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module  # under its own name G can be pickled
    try:
        with torch.device("meta"):  # do the shapes fit? Before memory is taken for them
            shapes = module.Generator(**snapshot["generator_args"]).eval()
            shapes(common.draw_latents(snapshot["z"], 2))
        shapes.load_state_dict(snapshot["G_ema"], assign=True)
        G = module.Generator(**snapshot["generator_args"])
        G.load_state_dict(snapshot["G_ema"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        why = common.reason(error)
        raise common.UserError(f"{path} does not fit {script.name} ({why})") from None
    G = G.to(device, memory_format=torch.channels_last)  # as in training
    return G.requires_grad_(False).eval(), snapshot["z"]


def sample(G, z, numbers, seed=0, label=None):
    """The images with these numbers: uint8 (n, H, W, C). G and z as load_generator returns them."""
    return common.generate(G, common.latents(z, seed, numbers, label))


def interpolations(z, seed, n, label=None):
    """Latents ((n - 1) * FRAMES, z_dim) on the ways between n neighbouring images.

    Normal latents turn on an arc (slerp, White 2016, arXiv:1609.04468), so that their length stays
    typical; uniform ones, and classes, go straight.
    """
    ways = []
    ends = common.latents(z, seed, range(n), label)
    for a, b in zip(ends, ends[1:]):
        t = torch.linspace(0, 1, FRAMES)[:, None]
        way = (1 - t) * a + t * b
        if z["distribution"] == "normal":
            a, b = a[: z["dim"]], b[: z["dim"]]
            angle = torch.acos(torch.cosine_similarity(a, b, dim=0)).clamp(1e-4, math.pi - 1e-4)
            arc = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / angle.sin()
            way[:, : z["dim"]] = arc
        ways.append(way)
    return torch.cat(ways)


def nearest(images, others, flip=False):
    """For each uint8 image (n, H, W, C) the nearest of `others`, or with `flip` of their mirror
    images too, and its distance, the root mean square in grey levels: (n, H, W, C), (n,)."""
    ours = torch.from_numpy(images.reshape(len(images), -1)).float()
    best, found = torch.full((len(images),), math.inf), images.copy()
    for start in range(0, len(others), 1024):
        part = others[start : start + 1024]
        for theirs in (part, part[:, :, ::-1]) if flip else (part,):
            rows = torch.from_numpy(theirs.reshape(len(part), -1).astype(np.float32))
            distance, index = torch.cdist(ours, rows).min(1)
            closer = distance < best
            best = torch.minimum(best, distance)
            found[closer.numpy()] = theirs[index[closer].numpy()]
    return found, best.numpy() / math.sqrt(ours.shape[1])


def pairs(images, others, distances):
    """Each of images (n, H, W, C) beside its other, the distance below: (n, H + 14, 2 W, C)."""
    n, height, width, channels = images.shape
    canvas = np.full((n, height + 14, 2 * width, channels), 255, np.uint8)
    canvas[:, :height] = np.concatenate([images, others], 2)
    font = ImageFont.load_default(11)
    for pair, distance in zip(canvas, distances):
        line = Image.new("L", (2 * width, 14), 255)
        ImageDraw.Draw(line).text((width, 7), f"{distance:.1f}", 0, font, anchor="mm")
        pair[height:] = np.asarray(line)[..., None]
    return canvas


def claim(folder, run):
    """Make the folder for images of this run; UserError if it holds other images."""
    owner, own = folder / ".run", re.compile(r"seed\d+_\d+\.png|\..*")
    whose = os.fsdecode(owner.read_bytes()) if owner.exists() else ""
    if whose not in ("", str(run)):
        raise common.UserError(f"{folder} holds images of {whose}: pass another --save_path")
    if not whose and folder.exists() and not all(own.fullmatch(p.name) for p in folder.iterdir()):
        raise common.UserError(f"{folder} holds other files: pass another --save_path")
    folder.mkdir(parents=True, exist_ok=True)
    common.write_file(owner, os.fsencode(run))


def save_singles(G, z, folder, args):
    """Images 0 to img_num - 1 as PNGs."""
    for start in range(0, args.img_num, common.CHUNK):
        numbers = range(start, min(start + common.CHUNK, args.img_num))
        images = sample(G, z, numbers, args.seed, args.label)
        for i, image in zip(numbers, images):
            png = common.encoded(common.to_picture(image))
            common.write_file(folder / f"seed{args.seed}_{i:06d}.png", png)
        done = numbers[-1] + 1
        common.progress(f"{done:,} of {args.img_num:,} images", last=done == args.img_num)


def main():
    with common.exit_codes():
        args = get_args(sys.argv[1:])
        source = args.load_path or common.newest_run()
        G, z = load_generator(source, common.choose_device(args.device))
        names = z.get("names") or [str(i) for i in range(z.get("classes", 0))]
        args.label = args.label and common.class_numbers([args.label], names)[0]
        side = args.grid_size or min(10, math.isqrt(args.img_num))
        images = sample(G, z, range(side * side), args.seed, args.label)
        if args.nearest:  # looked at before anything is written
            size, channels = images.shape[1], str(images.shape[3])
            others = common.load_images(args.nearest, size, channels, args.cache)
        run = source.resolve()
        name = run.name if run.is_dir() else f"{run.parent.name}-{run.stem}"
        folder = args.save_path or Path("generated", name)
        claim(folder, run if run.is_dir() else run.parent)
        place = folder if folder.name else folder.resolve()  # --save_path .
        beside = lambda what: place.with_name(f"{place.name}-{what}")
        save_singles(G, z, folder, args)
        common.say(f"{args.img_num} images of {source} in {folder}")
        if (count := len(list(folder.glob("*.png")))) > args.img_num:
            common.say(f"{folder} holds {count} images now: others were there before")
        grid = beside(f"grid-{side}x{side}.png")
        common.save_grid(images, grid, side)
        common.say(f"{grid}: the first {side} x {side}")
        if args.interpolate:
            frames = common.generate(G, interpolations(z, args.seed, 9, args.label))
            common.save_grid(frames, beside("interpolation.png"), FRAMES)
            common.save_gif([*map(common.to_picture, frames)], beside("interpolation.gif"))
            common.say(f"{beside('interpolation.png')}, .gif: from image to image, a way a row")
        if args.nearest:
            flip = common.load_file(source)["config"].get("flip", False)
            found, distances = nearest(images, others, flip)
            common.save_grid(pairs(images, found, distances), beside("nearest.png"), side)
            what = f"the nearest of {args.nearest}" + " or its mirror image" * flip
            common.say(f"{beside('nearest.png')}: each, {what}, how far it is in grey levels")


if __name__ == "__main__":
    main()
