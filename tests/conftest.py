"""What every test may ask for: real data, or a skip that says which data is absent."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

# No deadline: on a shared machine it would measure the neighbours. Derandomized: a red run is red again.
hypothesis.settings.register_profile("stoker", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("stoker")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of test data that is not in the repository: STOKER_TEST_DATA, else ../shared/data."""
    folder = Path(os.environ.get("STOKER_TEST_DATA") or ROOT.parent / "shared" / "data").resolve()
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}: set STOKER_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def fashion_mnist() -> Path:
    """The folder with Fashion-MNIST's four gzipped files, as the Debian package lays them down."""
    if not (FASHION_MNIST / "train-images-idx3-ubyte.gz").is_file():
        pytest.skip("no Fashion-MNIST: as root, scripts/debian dataset-fashion-mnist")
    return FASHION_MNIST


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread in torch: more would fight over the cores, and hang in children that tests fork."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is none."""
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
