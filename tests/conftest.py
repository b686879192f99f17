"""What all tests share: one thread (tests must not fight over cores), no network, and the shipped checkpoints."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart"


def pytest_collection_finish() -> None:
    """Garbage collections need not look at all that was imported, again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def quickstart() -> Path:
    """The folder of the tiny checkpoints that ship with the project."""
    return QUICKSTART
