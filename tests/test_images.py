"""From files to batches: finding, decoding, caching images, and the order they come in."""

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import write_images
from PIL import Image

import common


def test_folder_and_zip_give_the_same_images(imgs):
    (imgs / "notes.txt").write_text("no image")
    with zipfile.ZipFile("imgs.zip", "w") as archive:
        for path in imgs.rglob("*"):
            archive.write(path)
    from_folder = common.load_images("imgs", 16)
    from_zip = common.load_images("imgs.zip", 16)
    assert from_folder.shape == (24, 16, 16, 3) and from_folder.dtype == np.uint8
    assert isinstance(from_folder, np.memmap) and not from_folder.flags.writeable
    np.testing.assert_array_equal(from_folder, from_zip)
    original = np.asarray(Image.open(imgs / "001.png"))  # 16 x 20: the crop takes 2 columns a side
    np.testing.assert_array_equal(from_folder[0], original[:, 2:18])


def test_a_run_below_the_folder_is_not_trained_on(imgs):
    run = imgs / "runs/dcgan-imgs"
    (run / "samples").mkdir(parents=True)
    (run / "checkpoint.pt").touch(), (run / "config.ini").touch()
    Image.new("RGB", (16, 16)).save(run / "samples/epoch_0001.png")
    Image.new("RGB", (16, 16)).save(imgs / ".hidden.png")
    assert len(common.load_images("imgs", 16)) == 24


def test_channels_follow_the_files():
    write_images(Path("grey"), 6, mode="L")
    grey, colour = common.load_images("grey", 16), common.load_images("grey", 16, "3")
    assert grey.shape == (6, 16, 16, 1) and colour.shape == (6, 16, 16, 3)
    np.testing.assert_array_equal(colour, np.repeat(grey, 3, 3))
    assert colour.names == grey.names and colour.fingerprint == grey.fingerprint
    Image.new("RGB", (16, 16), "red").save("grey/red.png")
    assert common.load_images("grey", 16).shape == (7, 16, 16, 3)
    assert common.load_images("grey", 16, "1").shape == (7, 16, 16, 1)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def test_decode_applies_the_orientation_of_the_camera():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    picture = Image.new("RGB", (40, 20), "red")
    picture.paste("blue", (0, 0, 20, 20))  # left half: on top when turned
    pixels = common.decode(encoded(picture, "JPEG", exif=exif, quality=95))
    assert pixels.shape == (40, 20, 3)
    assert pixels[5, 10, 2] > 200 and pixels[35, 10, 0] > 200


def test_decode_scales_16_bits_and_lays_transparency_on_white():
    ramp = np.array([[0, 257 * 100, 65535]], np.uint16)
    pixels = common.decode(encoded(Image.fromarray(ramp), "PNG"), channels=1)
    assert pixels.ravel().tolist() == [0, 100, 255]
    glass = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    glass.putpixel((1, 0), (255, 0, 0, 255))
    pixels = common.decode(encoded(glass, "PNG"))
    assert pixels[0].tolist() == [[255, 255, 255], [255, 0, 0]]


def failures():
    """What the notes beside the only cached array say: {name: reason}."""
    (notes,) = Path(".cache").glob("*.json")
    return json.loads(notes.read_text())["failed"]


def test_pixels_without_a_range_are_refused(imgs, capsys):
    """A float TIFF would become black: it is listed with the reason."""
    Image.fromarray(np.full((16, 16), 0.5, np.float32)).save(imgs / "float.tif")
    assert len(common.load_images("imgs", 16)) == 24
    assert "floating-point pixels have no fixed range" in failures()["float.tif"]


def test_decode_crops_the_centre():
    stripes = np.zeros((10, 30, 3), np.uint8)
    stripes[:, 10:20] = 200
    pixels = common.decode(encoded(Image.fromarray(stripes), "PNG"), image_size=10)
    assert pixels.shape == (10, 10, 3) and (pixels == 200).all()


def test_undecodable_files_are_skipped_and_listed(imgs, capsys):
    (imgs / "broken.png").write_bytes((imgs / "001.png").read_bytes()[:200])
    (imgs / "text.jpg").write_text("this is no photograph")
    assert len(common.load_images("imgs", 16)) == 24
    assert "2 of 26 files cannot be decoded" in capsys.readouterr().out
    assert failures().keys() == {"broken.png", "text.jpg"} and all(failures().values())


def test_the_cache_is_used_until_the_files_change(imgs, monkeypatch):
    first = np.array(common.load_images("imgs", 16))
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", None)  # would fail for every file
        np.testing.assert_array_equal(common.load_images("imgs", 16), first)
    Image.new("RGB", (16, 16), "red").save(imgs / "001.png")
    assert (common.load_images("imgs", 16)[0] == (255, 0, 0)).all()


def test_a_damaged_cache_is_made_again(imgs):
    first = np.array(common.load_images("imgs", 16))
    (cached,) = Path(".cache").glob("*.npy")
    whole = cached.read_bytes()
    (notes,) = Path(".cache").glob("*.json")
    for damaged in (b"", whole[:40], whole[:-1], b"x" * len(whole)):
        cached.write_bytes(damaged)
        np.testing.assert_array_equal(common.load_images("imgs", 16), first)
        assert cached.read_bytes() == whole
    notes.unlink()
    common.load_images("imgs", 16)
    assert json.loads(notes.read_text()).keys() >= {"fingerprint", "duplicates", "failed"}
    assert not list(Path(".cache").glob(".*"))


def test_errors_say_where_was_searched(imgs):
    os.mkdir("empty")
    with pytest.raises(common.UserError, match=r"no images in empty .*Pillow.*\.jpg"):
        common.load_images("empty", 16)
    with pytest.raises(common.UserError, match="nowhere does not exist"):
        common.load_images("nowhere", 16)
    with pytest.raises(common.UserError, match="001.png is neither a folder nor a .zip"):
        common.load_images("imgs/001.png", 16)
    Path("empty/a.png").touch()
    with pytest.raises(common.UserError, match="no image in empty: 1 of 1 files cannot"):
        common.load_images("empty", 16)


def test_glyphs_are_the_same_each_time_and_differ_among_themselves():
    glyphs, labels = common.draw_glyphs(16, n=20)
    np.testing.assert_array_equal(glyphs, common.draw_glyphs(16, n=20)[0])
    np.testing.assert_array_equal(labels, common.draw_glyphs(16, n=20)[1])
    assert glyphs.shape == (20, 16, 16, 3) and len(np.unique(glyphs, axis=0)) == 20
    assert labels.shape == (20,) and set(labels) <= set(range(len(common.GLYPHS)))
    assert common.draw_glyphs(16, channels=1, n=20)[0].shape == (20, 16, 16, 1)
    contrast = glyphs.astype(int).max((1, 2)) - glyphs.min((1, 2))
    assert (contrast.max(1) > 80).all()  # a character stands out from its paper


def test_real_photographs(real_data):
    cats = common.load_images(real_data / "cats.zip", 16)
    assert cats.shape == (12_000, 16, 16, 3)
    assert 80 < cats.mean() < 160 and cats.std() > 40


def test_the_line_after_decoding_tells_what_costs_samples(imgs, capsys):
    (imgs / "copy.png").write_bytes((imgs / "001.png").read_bytes())
    (imgs / "again.bmp").write_bytes(encoded(Image.open(imgs / "001.png"), "BMP").getvalue())
    (imgs / "phone.heic").write_bytes(b"of a kind that is not read")
    (imgs / "broken.png").write_bytes(b"no image")
    for start in ("decoded now", "out of the cache"):
        common.load_images("imgs", 16)
        out = capsys.readouterr().out
        (notes,) = Path(".cache").glob("*.json")
        assert f"1 of 27 files cannot be decoded, see {notes.name}; in .cache/" in out, start
        assert "2 exact duplicates (kept)" in out, start
        assert ("reading: 27 of 27 files" in out) == (start == "decoded now")  # the last line
        assert "1 images are left out" in out and "phone.heic" in out, start


def test_what_an_archiver_leaves_in_a_zip_is_no_image(imgs):
    Image.new("RGB", (16, 16)).save(imgs / "photo.jfif", "JPEG")
    with zipfile.ZipFile("imgs.zip", "w") as archive:
        for path in imgs.rglob("*.*"):
            archive.write(path)
            archive.writestr(f"__MACOSX/{path.parent}/._{path.name}", b"resource fork")
    assert len(common.load_images("imgs.zip", 16)) == 25
    assert not failures()


def test_one_decoded_copy_whoever_asks_and_none_of_former_files(imgs):
    """train asks for "auto", generate.py --nearest for the channels of its images."""
    for channels in ("auto", "3"):
        common.load_images("imgs", 16, channels)
    assert len(list(Path(".cache").glob("*.npy"))) == 1
    common.load_images("imgs", 8)  # another size is another copy
    (imgs / "001.png").touch()
    common.load_images("imgs", 16)
    assert len(list(Path(".cache").glob("*-16px-*.npy"))) == 1
    assert len(list(Path(".cache").glob("*-8px-*.npy"))) == 1
