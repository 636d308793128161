"""Properties under made-up input: flags and INI files, file names, damaged images.

The suite tries a few hundred inputs; the long form, and how many it tried:

    FUZZ=20000 python -m pytest tests/test_fuzz.py -s -n 0
"""

import io
import json
import os
import string
import warnings

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import common
import train_dcgan

COUNT = int(os.environ.get("FUZZ", 200))
quietly = settings(
    max_examples=COUNT,
    deadline=20_000,  # milliseconds: a decoder that takes longer hangs
    derandomize=COUNT <= 200,
    database=None,
    suppress_health_check=list(HealthCheck),
)
texts = st.text(min_size=1).filter(lambda text: "\0" not in text)
odd_texts = st.sampled_from(
    ["~", "%(x)s", " a", "a ", '"', "'", "#", ";", "=", "[x]", "-", "--out", "é\n"]
)


def write_ini(path, chosen):
    """As Run writes config.ini."""
    lines = [f"{name} = {json.dumps(value)}\n" for name, value in chosen.items()]
    path.write_text(f"[train_dcgan]\n{''.join(lines)}", encoding="utf-8")


@settings(quietly, max_examples=min(COUNT, 2000))
@given(
    path=st.one_of(texts, odd_texts),
    epochs=st.integers(1, 10**9),
    lrd=st.floats(0, 1e3),
    flip=st.booleans(),
    label=st.lists(st.integers(0, 9), min_size=1),
)
def test_settings_survive_flags_and_ini(path, epochs, lrd, flip, label, tmp_path):
    chosen = {"path": path, "epochs": epochs, "lrd": lrd, "flip": flip}
    words = [f"--{name}={value}" for name, value in chosen.items() if name != "flip"]
    typed = train_dcgan.get_args([*words, "--flip" if flip else "--no-flip"])
    given = train_dcgan.get_args([], **chosen)  # as from Python
    assert common.settings_of(typed) == common.settings_of(given)
    chosen["path"] = os.path.expanduser(path)
    assert {name: getattr(typed, name) for name in chosen} == chosen
    ini = tmp_path / "config.ini"
    write_ini(ini, common.settings_of(typed))
    again = train_dcgan.get_args([f"--config={ini}"])
    assert common.settings_of(again) == common.settings_of(typed)
    write_ini(ini, {"dataset": "mnist", "label": label})
    assert train_dcgan.get_args([f"--config={ini}"]).label == [*map(str, label)]


@settings(quietly, max_examples=min(COUNT, 2000))
@given(content=st.one_of(st.text(), st.text(string.printable), st.binary()))
def test_any_ini_is_settings_or_one_line(content, tmp_path):
    ini = tmp_path / "any.ini"
    ini.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))
    try:
        train_dcgan.get_args([f"--config={ini}"])
    except common.UserError as error:
        assert str(error).count("\n") == 0


@settings(quietly, max_examples=min(COUNT, 2000))
@given(name=st.binary(min_size=1, max_size=200).filter(lambda name: not {0, 47} & set(name)))
def test_any_file_name_is_read(name, tmp_path):
    folder = tmp_path / "names"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    (folder / "a.png").write_bytes(ORIGINALS[0])
    (folder / os.fsdecode(name + b".png")).write_bytes(ORIGINALS[0])
    visible = not name.startswith(b".")
    assert len(common.load_images(folder, 8, cache=tmp_path / "cache")) == 1 + visible


def originals():
    """Small valid files of each format, in several modes."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(256, size=(12, 10, 3), dtype=np.uint8))
    kinds = [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("GIF", {}), ("WEBP", {})]
    kinds += [("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("BMP", {})]
    kinds += [("TIFF", {"compression": "tiff_deflate"}), ("WEBP", {"lossless": True})]
    files = []
    for kind, options in kinds:
        for mode in ("RGB", "L", "P", "RGBA", "CMYK", "1", "I;16"):
            buffer = io.BytesIO()
            try:
                deep = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
                (deep if mode == "I;16" else picture.convert(mode)).save(buffer, kind, **options)
            except (OSError, ValueError):  # a mode that this format does not have
                continue
            files.append(buffer.getvalue())
    return files


ORIGINALS = originals()


@quietly
@given(
    original=st.sampled_from(ORIGINALS),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    keep=st.one_of(st.just(1.0), st.floats(0, 1)),
    image_size=st.sampled_from([None, 8, 64]),
    channels=st.sampled_from([1, 3]),
)
def test_damaged_images_are_decoded_or_refused(original, changes, keep, image_size, channels):
    content = bytearray(original)
    for place, value in changes:
        content[int(place * len(content))] = value
    file = io.BytesIO(content[: int(keep * len(content))])
    TRIED.append(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = common.decode(file, image_size, channels)
    except Exception as error:  # what load_images lists
        assert not isinstance(error, AssertionError)
        return
    TRIED[-1] = 1
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == channels
    assert image_size is None or pixels.shape[:2] == (image_size, image_size)


TRIED = []


def test_how_many_images_were_tried():
    print(f"{len(TRIED):,} damaged images: {sum(TRIED):,} decoded, the others refused")
    assert not TRIED or len(TRIED) >= COUNT * 0.9 and 0 < sum(TRIED) < len(TRIED)
