"""Shared set-up of the tests: one thread, fixed seeds, clean MMEngine singletons."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import golden_reader

READS = "PATCHREG_GOLDEN_READS"
PENDING: dict[str, tuple[str, ...]] = {}
"""Reference numbers of parts that do not exist yet, by method: file and start of their names."""


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        os.environ[READS] = tempfile.mkdtemp(prefix="patchreg-reads-")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Every process notes which reference numbers it read; the first one fails the run if any was not."""
    place = Path(os.environ[READS])
    reads = {":".join(key): sorted(names) for key, names in golden_reader._read.items()}
    (place / f"{os.getpid()}.json").write_text(json.dumps(reads))
    config = session.config
    if hasattr(config, "workerinput"):
        return
    seen: dict[str, set[str]] = {}
    for file in place.glob("*.json"):
        for key, names in json.loads(file.read_text()).items():
            seen.setdefault(key, set()).update(names)
    shutil.rmtree(place)
    whole = not config.option.keyword and config.args == config.getini("testpaths")
    if not whole or config.option.collectonly or session.testscollected == 0:
        return
    unread = []
    for method in sorted(item.name for item in (ROOT / "tests/golden").iterdir() if item.is_dir()):
        for file in sorted(golden_reader.folder(method).glob("*.safetensors")):
            known = golden_reader.GoldenFile(method, file.stem)
            for name in set(known) - seen.get(f"{method}:{file.stem}", set()):
                if not f"{file.stem}:{name}".startswith(PENDING.get(method, ())):
                    unread.append(f"{method}/{file.stem}: {name}")
    if unread:
        print(
            f"\n{len(unread)} reference numbers that no test read:",
            *sorted(unread)[:20],
            sep="\n  ",
        )
        session.exitstatus = 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(
        reason="needs a CUDA device; run on a machine with one: pytest -m gpu"
    )
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def _clean_state() -> Iterator[None]:
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # Float32 tolerances: TF32 keeps 10 bits of an operand.
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
