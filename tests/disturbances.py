"""Does a distance see what people see? Images are disturbed more and more (Heusel et al., 2017).

    python tests/disturbances.py imgs/ --features random --out docs/disturbances.png

draws how FID rises with Gaussian noise, Gaussian blur and black rectangles of growing strength, as
in appendix A1 of arXiv:1706.08500.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import ImageFilter

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import fid

KINDS = ("noise", "blur", "rectangles")
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
    disturbed = images.copy()
    for image in disturbed:  # five of them, each at level 1 of half the side
        for top, left in (rng.random((5, 2)) * side * (1 - level / 2)).astype(int):
            image[top : top + int(level * side / 2), left : left + int(level * side / 2)] = 0
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
        images = common.draw_glyphs(args.image_size, n=args.img_num)
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
