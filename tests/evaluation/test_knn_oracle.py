"""The whole path on real pictures: a published CIFAR-10 network, real features, k-NN accuracies known beforehand."""

from __future__ import annotations

import csv
import io
import tarfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms.functional import normalize, to_tensor

from wlsup.evaluation.features import extract_features
from wlsup.evaluation.knn import knn_accuracy

DATA = Path(__file__).parents[3] / "shared" / "data"
WEIGHTS = DATA / "knn_oracle" / "resnet20-12fca82f.th"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (WEIGHTS.is_file() and (DATA / "cifar10" / "cifar10.tar").is_file()),
        reason=f"real data is not there: {DATA} (cifar10/ and knn_oracle/)",
    ),
]

# Made before, by another implementation: average-pooled features of 5,000 pictures and 1,000 queries, T = 0.07.
KNOWN = {1: 0.805, 5: 0.837, 20: 0.842, 200: 0.837}


class Block(nn.Module):
    """Two 3x3 convolutions; where the width grows the shortcut subsamples and pads with zeros ("option A")."""

    def __init__(self, inner: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.grow = stride, width - inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.grow // 2, self.grow // 2))
        return (y + shortcut).relu()


class ResNet20(nn.Module):
    """He et al. 2016, section 4.2, with n = 3; keys as in akamaster/pytorch_resnet_cifar10."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for number, (inner, width, stride) in enumerate([(16, 16, 1), (16, 32, 2), (32, 64, 2)], start=1):
            blocks = [Block(inner, width, stride), Block(width, width, 1), Block(width, width, 1)]
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        x = self.bn1(self.conv1(images)).relu()
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))


class Cifar(Dataset):
    def __init__(self, split: str) -> None:
        with open(DATA / "cifar10" / "labels.csv", newline="") as file:
            self.rows = [(row["file"], int(row["label"])) for row in csv.DictReader(file) if row["split"] == split]
        with tarfile.open(DATA / "cifar10" / "cifar10.tar") as archive:
            self.files = {name: archive.extractfile(name).read() for name, _ in self.rows}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        name, label = self.rows[index]
        picture = to_tensor(Image.open(io.BytesIO(self.files[name])).convert("RGB"))
        # That repository's own normalisation: ImageNet's mean and deviation.
        return normalize(picture, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), label


@pytest.fixture(scope="module")
def features():
    network = ResNet20().eval()
    saved = torch.load(WEIGHTS, map_location="cpu", weights_only=True)
    network.load_state_dict({name.removeprefix("module."): value for name, value in saved["state_dict"].items()})
    return [extract_features(network.features, Cifar(split), batch_size=250) for split in ("train", "test")]


@pytest.mark.parametrize("search", ["faiss", "torch"])
def test_a_published_networks_knn_accuracies_are_reproduced(features, search):
    bank, queries = features
    assert (len(bank), len(queries)) == (5000, 1000)
    result = knn_accuracy(bank, queries, k=20, ks=(1, 5, 200), num_classes=10, search=search)
    assert result.accuracy == {k: pytest.approx(accuracy, abs=0.002) for k, accuracy in KNOWN.items()}


def test_both_searches_agree_on_every_picture(features):
    first, second = (knn_accuracy(*features, search=search) for search in ("faiss", "torch"))
    assert torch.equal(first.predictions, second.predictions)
