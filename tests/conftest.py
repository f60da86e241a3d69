"""Shared set-up of the tests: one thread, fixed seeds, clean MMEngine singletons."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device; run on a machine with one: pytest -m gpu")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def _clean_state() -> Iterator[None]:
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    from mmengine.registry import DefaultScope

    from patchreg.utils.random import batch_random

    batch_random.end()
    DefaultScope._instance_dict.clear()


@pytest.fixture
def project_root() -> Path:
    return ROOT
