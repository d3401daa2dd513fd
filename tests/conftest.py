"""Fixtures for real data, which stays outside the repository."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qtemper.data import ImageData, load_cifar


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = Path(os.environ.get("QTEMPER_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set QTEMPER_DATA")
    return folder


@pytest.fixture(scope="session")
def cifar10(shared_data: Path) -> ImageData:
    return load_cifar(shared_data, "cifar10")


@pytest.fixture(scope="session")
def cifar100(shared_data: Path) -> ImageData:
    return load_cifar(shared_data, "cifar100")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors are slower on several threads, above all when other processes run.

    For a module, because a module's own fixtures must see the same number: another order of sums has other last bits.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
