"""Runs every operator test on each implementation (reference, compiled) and device."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import warnings
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))
if importlib.util.find_spec("patchreg_ops") is None:  # A checkout that is not installed.
    _folder = TESTS.parent / "ops"
    _spec = importlib.util.spec_from_file_location(
        "patchreg_ops", _folder / "__init__.py", submodule_search_locations=[str(_folder)]
    )
    _module = importlib.util.module_from_spec(_spec)
    sys.modules["patchreg_ops"] = _module
    _spec.loader.exec_module(_module)

from patchreg_ops import _library, reference  # noqa: E402


@pytest.fixture(
    params=[
        "reference-cpu",
        "compiled-cpu",
        pytest.param("reference-cuda", marks=pytest.mark.gpu),
        pytest.param("compiled-cuda", marks=pytest.mark.gpu),
    ]
)
def device(request):
    """Device of the test; the named implementation answers on it while the test runs."""
    path, kind = request.param.split("-")
    if path == "compiled":
        if not _library.has_kernels(kind):
            pytest.skip("compiled library not built: run pip install --no-build-isolation .")
        yield torch.device(kind)
        return
    override = torch.library.Library(_library.NAMESPACE, "IMPL")
    if _library.has_kernels(kind):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about every kernel that is replaced.
            # torch 2.6 has no such argument and lets a kernel be replaced anyway.
            known = inspect.signature(override.impl).parameters
            allow = {"allow_override": True} if "allow_override" in known else {}
            for name in _library.SCHEMAS:
                override.impl(name, getattr(reference, name), kind.upper(), **allow)
    yield torch.device(kind)
    override._destroy()


@pytest.fixture(autouse=True)
def _no_slow_path_warning(monkeypatch):
    monkeypatch.setattr(_library, "_warned", {"cpu", "cuda"})
