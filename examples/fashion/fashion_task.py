"""Fashion-MNIST and a small network for it, shared by recipe.py and plain.py."""

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import stoker

PACKAGE_DIR = "/usr/share/datasets/fashion-mnist"


def load(split: str, data: str = "") -> tuple[Tensor, Tensor]:
    """Images [N, 1, 28, 28], standardised as the training set is, and labels [N]; split is "train" or "t10k"."""
    folder = Path(data or PACKAGE_DIR)
    images_file = folder / f"{split}-images-idx3-ubyte.gz"
    labels_file = folder / f"{split}-labels-idx1-ubyte.gz"
    for file in (images_file, labels_file):
        if not file.is_file():
            raise stoker.UserError(
                f"Fashion-MNIST is not here: {file} does not exist",
                why="examples download nothing",
                remedy="on Debian or Ubuntu: apt-get install dataset-fashion-mnist; "
                "elsewhere put its four .gz files in a folder and pass data=FOLDER",
            )
    pixels = np.frombuffer(gzip.decompress(images_file.read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress(labels_file.read_bytes()), np.uint8, offset=8)
    images = torch.from_numpy(pixels.astype(np.float32)).view(-1, 1, 28, 28)  # 188 MB for train
    return images.div_(255).sub_(0.2860).div_(0.3530), torch.from_numpy(labels.astype(np.int64))


def block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def build(width: int) -> nn.Module:
    model = nn.Sequential(
        *block(1, width),
        nn.MaxPool2d(2),  # [B, width, 14, 14]
        *block(width, 2 * width),
        nn.MaxPool2d(2),  # [B, 2 * width, 7, 7]
        *block(2 * width, 2 * width),
        nn.Flatten(),
        nn.Linear(2 * width * 49, 10),
    )
    return model.to(memory_format=torch.channels_last)  # a quarter less time on a CPU
