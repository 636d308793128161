"""How good are samples of MNIST? A judge that knows digits tells.

    python tests/quality.py --data_dir data/ runs/fcgan-mnist/generator_*.pt

A small convolutional classifier is trained on MNIST's training images (a minute or two on two
cores; kept in .cache/) and must be right on over 98 % of the test images. Of each snapshot it then
sees 10,000 samples and tells

- sure: the share that it takes for some digit with more than 90 % confidence (real test images:
  see the first row), a measure of readable digits,
- 0 ... 9: how many it takes for each digit, in percent: a missing one is mode collapse,
- distance: the Frechet distance to the training images in its 128 features. Only comparable to
  other rows here; the first row, test images, shows what real ones get.
"""

import argparse
import gzip
import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import generate


class Classifier(nn.Module):
    """MNIST images (N, 1, 28, 28) in [-1, 1] -> features (N, 128) and logits (N, 10)."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(128, 10)

    def forward(self, images):
        features = self.features(images)
        return features, self.head(features)


def to_tensor(pixels):
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)


def train_classifier(images, labels, epochs=4, seed=0):
    torch.manual_seed(seed)
    net = Classifier()
    opt = torch.optim.Adam(net.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, epochs * (len(images) // 128))
    labels = torch.from_numpy(labels.astype(np.int64))
    for epoch in range(epochs):
        for index in torch.randperm(len(images)).split(128)[: len(images) // 128]:
            loss = F.cross_entropy(net(to_tensor(images[index.numpy()]))[1], labels[index])
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
        print(f"classifier: epoch {epoch + 1} of {epochs}, loss {loss.item():.3f}", flush=True)
    return net.eval()


def load_classifier(train, test, cache):
    """The classifier out of `cache`, trained if it is not there; its test accuracy is checked."""
    key = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    file = Path(cache, f"mnist-classifier-{key}.pt")
    net = Classifier().eval()
    if file.exists():
        net.load_state_dict(torch.load(file, weights_only=True))
    else:
        net = train_classifier(*train)
        file.parent.mkdir(parents=True, exist_ok=True)
        common.save_file(net.state_dict(), file)
    right = (judge(net, test[0])[1].argmax(1) == test[1]).mean()
    print(f"classifier: right on {right:.2%} of the test images")
    if right < 0.98:
        raise SystemExit("the classifier is no judge: it must be right on 98 %")
    return net


@torch.no_grad()
def judge(net, pixels):
    """Features (n, 128) and probabilities (n, 10) of uint8 (n, 28, 28, 1)."""
    parts = [net(to_tensor(pixels[i : i + 1000])) for i in range(0, len(pixels), 1000)]
    features, logits = (torch.cat(part).double() for part in zip(*parts))
    return features.numpy(), logits.softmax(1).numpy()


def frechet_distance(a, b):
    """Between Gaussians fitted to two sets of features (n, d); Dowson & Landau, 1982."""
    (mu_a, sigma_a), (mu_b, sigma_b) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(sigma_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    both = np.sqrt(np.linalg.eigvalsh(root @ sigma_b @ root).clip(0)).sum()
    return ((mu_a - mu_b) ** 2).sum() + np.trace(sigma_a) + np.trace(sigma_b) - 2 * both


def read_test_split(data_dir):
    """MNIST's 10,000 test images (10000, 28, 28, 1) and labels, plain or gzipped IDX files."""
    arrays = []
    for name, header in (("t10k-images-idx3-ubyte", 16), ("t10k-labels-idx1-ubyte", 8)):
        (path,) = list(Path(data_dir).glob(f"**/{name}*"))[:1]
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        arrays.append(np.frombuffer(content, np.uint8)[header:])
    return arrays[0].reshape(-1, 28, 28, 1), arrays[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("snapshots", nargs="+", help="snapshots or run folders, of 28 x 28 in grey")
    parser.add_argument("--data_dir", default="data", help="folder of MNIST, test files included")
    parser.add_argument("--cache", default=".cache")
    args = parser.parse_args()
    train, test = common.read_dataset("mnist", args.data_dir), read_test_split(args.data_dir)
    net = load_classifier(train, test, args.cache)
    reference, _ = judge(net, train[0])

    print(f"\n{'':<44} sure  distance " + "".join(f"{digit:>6}" for digit in range(10)))
    for name in ("MNIST test images", *args.snapshots):
        pixels = test[0]
        if name in args.snapshots:
            G, z = generate.load_generator(name)
            pixels = generate.sample(G, z, range(10_000))
        features, p = judge(net, pixels)
        shares = np.bincount(p.argmax(1), minlength=10) / len(p)
        row = f"{(p.max(1) > 0.9).mean():6.1%} {frechet_distance(reference, features):9.2f} "
        print(f"{name:<42} {row}" + "".join(f"{share:6.1%}" for share in shares), flush=True)


if __name__ == "__main__":
    main()
