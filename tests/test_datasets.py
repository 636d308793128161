"""MNIST and CIFAR-10: found in their usual places, downloaded, checked."""

import gzip
import hashlib
import http.server
import io
import shutil
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import common
import train_dcgan
import train_fcgan

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
HEADERS = {IMAGES: "000008030000ea600000001c0000001c", LABELS: "000008010000ea60"}
ARCHIVE = "cifar-10-binary.tar.gz"


def mnist_files():
    """A made-up MNIST of the right size: {name: content}."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=60_000 * 784, dtype=np.uint8).tobytes()
    labels = (np.arange(60_000) % 10).astype(np.uint8).tobytes()
    bodies = (pixels, labels)
    return {name: bytes.fromhex(HEADERS[name]) + body for name, body in zip(HEADERS, bodies)}


def cifar10_archive(members=None):
    """A made-up CIFAR-10 archive; `members` replaces its files."""
    if members is None:
        records = np.zeros((10_000, 3073), np.uint8)
        records[:, 0] = np.arange(10_000) % 10
        records[:, 1 : 1 + 1024] = 7  # red
        members = {
            f"cifar-10-batches-bin/data_batch_{i}.bin": records.tobytes() for i in range(1, 6)
        }
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture(scope="module")
def mnist():
    return mnist_files()


@pytest.mark.parametrize(
    "place",
    [
        "data/{}",
        "data/{}.gz",
        "data/MNIST/raw/{}",  # torchvision's
        "data/MNIST/raw/{}.gz",
        "data/mnist/{}.gz",
        "data/{}/{}",  # unpacked into a folder of its name
    ],
)
@pytest.mark.parametrize("dot", [False, True])
def test_mnist_is_found_in_its_usual_places(mnist, place, dot):
    for name, content in mnist.items():
        name = name.replace("-idx", ".idx") if dot else name
        path = Path(place.format(name, name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content, 0) if path.suffix == ".gz" else content)
    images, labels = common.read_dataset("mnist", "data")
    assert images.shape == (60_000, 28, 28, 1) and labels.tolist() == [*range(10)] * 6000
    assert images.tobytes() == mnist[IMAGES][16:]


@pytest.mark.parametrize("name", [IMAGES, f"{IMAGES}.gz", ARCHIVE])
def test_a_folder_in_the_place_of_a_file_is_said_and_not_downloaded_over(name, monkeypatch):
    Path("data", name).mkdir(parents=True)
    monkeypatch.setattr(common, "download", lambda *_: pytest.fail("downloaded"))
    plain = name.removesuffix(".gz")
    with pytest.raises(common.UserError, match=f"data/{name} is a folder without {plain}"):
        common.read_dataset("cifar10" if name == ARCHIVE else "mnist", "data")


def test_a_local_file_of_another_size_or_layout_is_refused(mnist):
    Path("data").mkdir()
    Path("data", LABELS).write_bytes(mnist[LABELS])
    wrong = (
        mnist[IMAGES][:-1],
        mnist[IMAGES] + b"0",
        b"\1" + mnist[IMAGES][1:],
        b"\x1f\x8bno gzip",
    )
    for content in wrong:
        Path("data", IMAGES).write_bytes(content)
        with pytest.raises(common.UserError, match=f"data/{IMAGES} is no {IMAGES}"):
            common.read_dataset("mnist", "data")


@pytest.mark.parametrize("packed", [True, False])
def test_cifar10_from_the_archive_or_its_files(packed):
    Path("data").mkdir()
    Path("data/cifar-10-binary.tar.gz").write_bytes(cifar10_archive())
    if not packed:
        with tarfile.open("data/cifar-10-binary.tar.gz") as archive:
            archive.extractall("data", filter="data")
        Path("data/cifar-10-binary.tar.gz").unlink()
    images, labels = common.read_dataset("cifar10", "data")
    assert images.shape == (50_000, 32, 32, 3) and labels.tolist() == [*range(10)] * 5000
    assert (images == (7, 0, 0)).all()


def test_nothing_of_an_archive_is_written_outside_or_inside():
    evil = cifar10_archive({"../x": b"evil", "cifar-10-batches-bin/data_batch_1.bin": b"short"})
    Path("data").mkdir()
    Path("data/cifar-10-binary.tar.gz").write_bytes(evil)
    with pytest.raises(common.UserError, match="is no cifar-10-binary.tar"):
        common.read_dataset("cifar10", "data")
    assert [str(path) for path in Path().rglob("*.*")] == ["data/cifar-10-binary.tar.gz"]


def test_labels_sizes_and_channels(mnist, monkeypatch):
    images = np.arange(20 * 28 * 28, dtype=np.uint8).reshape(20, 28, 28)
    contents = {IMAGES: images, LABELS: np.arange(20, dtype=np.uint8) % 10}
    find = lambda name, *_: contents[name.removesuffix(".gz")]
    monkeypatch.setattr(common, "find_or_download", find)
    load = lambda get_args, *argv: common.load_data(get_args(["--dataset=mnist", *argv]))
    ours, labels = load(train_fcgan.get_args)
    np.testing.assert_array_equal(ours, images[..., None])
    assert labels.tolist() == [*range(10)] * 2 and labels.dtype == np.int64
    ours, labels = load(train_fcgan.get_args, "--label", "3", "7")
    np.testing.assert_array_equal(ours, images[[3, 7, 13, 17], ..., None])
    assert labels.tolist() == [3, 7, 3, 7]
    assert len(common.load_data(train_fcgan.get_args(["--label", "7"]))[0]) == 2  # of its default
    assert load(train_dcgan.get_args, "--channels=3")[0].shape == (20, 32, 32, 3)
    assert not Path(".cache").exists()
    with pytest.raises(common.UserError, match="--label 10: the classes of these .* 0 0, 1 1, 2 2"):
        load(train_fcgan.get_args, "--label", "10")


def classes(folder, *kinds):
    for i, kind in enumerate(kinds):
        Path(folder, kind).mkdir(parents=True)
        for j in range(3):
            name = f"{folder}/{kind}/{j}.png"
            Image.new("RGB", (16, 16), (20 * i, 50 * j, 0)).save(name)


def data_of(*words):
    args = train_dcgan.get_args([*words, "--image_size=16"])
    images, labels = common.load_data(args)
    return images, labels, args.classes


def test_subfolders_are_classes(capsys):
    classes("animals", "cats/young", "bears", "cats/old", "10")
    images, labels, names = data_of("--path=animals")
    assert names == ["10", "bears", "cats"] and labels.dtype == np.int64
    assert labels.tolist() == [0] * 3 + [1] * 3 + [2] * 6
    assert "classes: 0 10, 1 bears, 2 cats\n" in capsys.readouterr().out
    with zipfile.ZipFile("animals.zip", "w") as archive:
        for path in Path("animals").rglob("*.png"):
            archive.write(path)  # all below animals/
    packed = data_of("--path=animals.zip")
    np.testing.assert_array_equal(packed[0], images)
    assert packed[1].tolist() == labels.tolist() and packed[2] == names
    for words in (["cats", "10"], ["2", "0"]):
        chosen, labels, _ = data_of("--path=animals", "--label", *words)
        np.testing.assert_array_equal(chosen, images[[0, 1, 2, *range(6, 12)]])
        assert labels.tolist() == [0] * 3 + [2] * 6
    assert data_of("--path=animals/cats")[2] == ["old", "young"]
    assert data_of("--path=animals/bears")[1:] == (None, [])
    with pytest.raises(common.UserError, match="--label dogs: .* are 0 10, 1 bears, 2 cats"):
        data_of("--path=animals", "--label", "dogs")


def test_images_beside_subfolders_have_no_classes(capsys):
    classes("animals", "cats", "bears")
    Image.new("RGB", (16, 16)).save("animals/beside.png")
    images, labels, names = data_of("--path=animals")
    assert (len(images), labels, names) == (7, None, [])
    assert "classes" not in capsys.readouterr().out


def test_a_folder_whose_images_all_fail_is_no_class():
    classes("animals", "cats", "bears", "dogs")
    for path in Path("animals/bears").iterdir():
        path.write_text("no image")
    images, labels, names = data_of("--path=animals")
    assert names == ["cats", "dogs"] and labels.tolist() == [0] * 3 + [1] * 3
    assert (images[3] == (40, 0, 0)).all()


def test_the_label_of_a_drawn_character_is_its_place_in_the_list():
    """Those of one label look alike, whatever their colours: outlines are compared."""
    images, labels = common.read_dataset("glyphs", image_size=16, channels="1")
    sharp = np.abs(images - np.median(images, (1, 2), keepdims=True)).reshape(len(images), -1)
    sharp = sharp / np.linalg.norm(sharp, axis=1, keepdims=True)
    means = np.stack([sharp[:2400][labels[:2400] == i].mean(0) for i in range(len(common.GLYPHS))])
    guesses = (sharp[2400:] @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T).argmax(1)
    assert (guesses == labels[2400:]).mean() > 0.8  # by chance 0.08


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; `trouble` says what goes wrong: slow, cut, wrong, missing or nothing."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.trouble, self.asked = files, "", []
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, name = self.server, self.path.rpartition("/")[2]
        server.asked.append(name)
        if server.trouble == "missing" or name not in server.files:
            return self.send_error(404)
        content = server.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if server.trouble == "wrong":
            content = bytes(len(content))
        if server.trouble == "cut":
            content = content[: len(content) // 2]
        half = len(content) // 2
        self.wfile.write(content[:half])
        if server.trouble == "slow":
            time.sleep(0.5)
        self.wfile.write(content[half:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(mnist, monkeypatch):
    files = {f"{name}.gz": gzip.compress(content, 0) for name, content in mnist.items()}
    files[ARCHIVE] = cifar10_archive()
    server = Server(files)
    sums = {n: (server.address, hashlib.sha256(file).hexdigest()) for n, file in files.items()}
    assert sums.keys() == common.FILES.keys()
    monkeypatch.setattr(common, "FILES", sums)
    yield server
    server.shutdown()


@pytest.mark.parametrize("dataset, files", [("mnist", 2), ("cifar10", 1)])
def test_a_download_happens_once(server, dataset, files, capsys):
    server.trouble = "slow"
    first, _ = common.read_dataset(dataset, "data")
    again, _ = common.read_dataset(dataset, "data")
    assert len(server.asked) == files and np.array_equal(first, again)
    assert server.address in capsys.readouterr().out


@pytest.mark.parametrize(
    "trouble, message", [("cut", "hash|IncompleteRead"), ("wrong", "hash"), ("missing", "404")]
)
@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_a_failed_download_leaves_nothing_and_the_next_start_works(
    server, dataset, trouble, message
):
    server.trouble = trouble
    with pytest.raises(common.UserError, match=message) as error:
        common.read_dataset(dataset, "data")
    assert server.address in str(error.value) and "put it into data" in str(error.value)
    assert "\n" not in str(error.value) and not list(Path("data").iterdir())
    server.trouble = ""
    assert len(common.read_dataset(dataset, "data")[0]) in (50_000, 60_000)


def test_real_mnist(real_data):
    shutil.copytree(real_data / "mnist", "data")
    images, labels = common.read_dataset("mnist", "data")
    assert np.bincount(labels).tolist() == [
        *(5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)  # as published
    ]
    assert images.mean() / 255 == pytest.approx(0.1307, abs=1e-4)
