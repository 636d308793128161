"""Does a distance see what people see? Images are disturbed more and more (Heusel et al., 2017).

    python tests/disturbances.py imgs/ --features random --out docs/disturbances.png

draws how FID rises with Gaussian noise, Gaussian blur, black rectangles and a swirl of growing
strength, as in appendix A1 of arXiv:1706.08500.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageFilter

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import fid

KINDS = ("noise", "blur", "rectangles", "swirl")
LEVELS = (0, 0.25, 0.5, 0.75, 1)


def disturb(images, kind, level, seed=0):
    """uint8 (N, H, W, C) -> the same with a disturbance of this level, from 0 (none) to 1."""
    rng, side = np.random.default_rng(seed), images.shape[1]
    if kind == "noise":
        disturbed = images + rng.normal(scale=128 * level, size=images.shape)
        return disturbed.round().clip(0, 255).astype(np.uint8)
    if kind == "blur":
        blur = ImageFilter.GaussianBlur(level * side / 8)
        rows = [np.asarray(common.to_picture(image).filter(blur)) for image in images]
        return np.stack(rows).reshape(images.shape)
    if kind == "swirl":  # the centre turns by up to 180 degrees, less and less towards the edge
        y, x = np.mgrid[:side, :side] - (side - 1) / 2
        turn = np.pi * level * np.exp(-np.hypot(x, y) / (side / 4))
        cos, sin = np.cos(turn), np.sin(turn)
        sources = np.stack([x * cos - y * sin, x * sin + y * cos], axis=-1) / (side / 2)
        grid = torch.from_numpy(sources).expand(len(images), -1, -1, -1)
        pixels = torch.from_numpy(images.transpose(0, 3, 1, 2)).double()
        swirled = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
        return swirled.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    disturbed = images.copy()
    edge = int(level * side * 3 / 8)
    for image in disturbed:  # five rectangles; at level 1 more than half of the image is black
        for top, left in (rng.random((5, 2)) * (side - edge)).astype(int):
            image[top : top + edge, left : left + edge] = 0
    return disturbed


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("path", help="a folder or .zip of images, or glyphs")
    parser.add_argument("--img_num", type=int, default=300)
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--features", choices=["inception", "random"], default="inception")
    parser.add_argument("--out", type=Path, default=Path("disturbances.png"))
    args = parser.parse_args()
    net, name = fid.load_inception(args.features)
    if args.path == "glyphs":
        images, _ = common.draw_glyphs(args.image_size, n=args.img_num)
    else:
        images = common.load_images(args.path, args.image_size, "3")[: args.img_num]
    mu, sigma, n = fid.feature_stats(images, net)
    panels = []
    for kind in KINDS:
        stats = [fid.feature_stats(disturb(images, kind, level), net)[:2] for level in LEVELS]
        values = [fid.frechet_distance(mu, sigma, *both) for both in stats]
        panels.append((f"{kind}: FID of {n} images, {name}", LEVELS, {"": values}))
        print(kind, *(f"{value:.4g}" for value in values), flush=True)
    common.save_curves(panels, args.out, "level of the disturbance", height=200)


if __name__ == "__main__":
    main()
