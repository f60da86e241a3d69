"""Who may import whom, read from the source without running it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("datasets", "transforms", "models", "losses", "hooks", "metrics")
ALLOWED_AT_IMPORT = {"patchreg", "patchreg_ops", "torch", "mmengine", "numpy"}


def modules() -> Iterator[tuple[str, Path]]:
    """Dotted names and files of everything that is installed."""
    for top, name in (("patchreg", "patchreg"), ("ops", "patchreg_ops")):
        for path in sorted((ROOT / top).rglob("*.py")):
            inner = path.relative_to(ROOT / top).with_suffix("").parts
            inner = inner[:-1] if inner[-1] == "__init__" else inner
            yield ".".join((name, *inner)), path


def imports(path: Path, at_import_only: bool = False) -> set[str]:
    """Dotted names that a file imports; type-checking blocks do not count."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and at_import_only:
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module and child.level == 0:
                found.add(child.module)
                found.update(f"{child.module}.{alias.name}" for alias in child.names)
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def below(name: str, package: str) -> bool:
    """Whether a dotted name lies in a package."""
    return name == package or name.startswith(package + ".")


def forbidden(module: str) -> list[str]:
    """Packages that a module may not import."""
    rules = ["tests", "tools", "configs"]
    parts = module.split(".")
    if parts[0] == "patchreg_ops":
        return [*rules, "patchreg", "mmengine", "mmpretrain", "mmcv", "timm"]
    room = parts[1] if len(parts) > 1 else ""
    if room in ("", "utils", "structures"):
        rules += ["patchreg.registry", "patchreg.methods", "patchreg.runner", "patchreg_ops"]
        rules += [f"patchreg.{stage}" for stage in STAGES]
    elif room == "registry":
        rules += ["patchreg.methods", "patchreg.runner", "patchreg_ops"]
        rules += [f"patchreg.{stage}" for stage in STAGES]
    elif room in (*STAGES, "runner"):
        rules += ["patchreg.methods", "patchreg_ops", "patchreg.benchmarks", "patchreg.pictures"]
    if room in ("losses", "hooks", "metrics", "datasets", "transforms"):
        rules += ["patchreg.models"]
    if room in STAGES:
        rules += ["patchreg.runner"]
    if room == "methods":
        rules += ["patchreg.benchmarks"]
        if parts[-1] != "picture":
            rules += ["patchreg.pictures"]
        if len(parts) > 2 and parts[2] != "dge":
            rules += ["patchreg_ops"]
        rules += [
            f"patchreg.methods.{item.name}"
            for item in (ROOT / "patchreg/methods").iterdir()
            if item.is_dir() and len(parts) > 2 and item.name not in (parts[2], "__pycache__")
        ]
    return rules


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=[name for name, _ in modules()])
def test_imports_point_downwards(module: str, path: Path) -> None:
    # The face of the package hands on what lies behind it, when asked.
    found = imports(path, at_import_only=module == "patchreg")
    wrong = [name for name in found for package in forbidden(module) if below(name, package)]
    assert not wrong, f"{module} may not import {sorted(set(wrong))}"


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=[name for name, _ in modules()])
def test_third_parties_come_in_lazily(module: str, path: Path) -> None:
    tops = {name.split(".")[0] for name in imports(path, at_import_only=True)}
    extra = tops - ALLOWED_AT_IMPORT - set(sys.stdlib_module_names)
    assert not extra, f"{module} imports {sorted(extra)} at import time; import it where it is used"


def test_configs_import_nothing_and_lie_at_most_two_deep() -> None:
    for path in sorted((ROOT / "configs").rglob("*.py")):
        assert not imports(path), f"{path.relative_to(ROOT)} imports something"


def test_only_the_registry_names_the_methods_package() -> None:
    for module, path in modules():
        if module.startswith(("patchreg.methods", "patchreg.benchmarks.")):
            continue
        if module == "patchreg.registry":
            continue
        text = path.read_text(encoding="utf-8")
        assert "patchreg.methods." not in text, f"{module} names a method"


def test_discovery_leaves_compilers_and_the_rest_alone() -> None:
    """All methods are found without what takes seconds to import and most commands never use."""
    code = (
        "import sys, mmengine.runner; before = set(sys.modules); import patchreg.registry as r; r.discover();"
        "print(*{m for m in set(sys.modules) - before if m.split('.')[0] != 'patchreg'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = set(done.stdout.split())
    heavy = {"torch._dynamo", "torch._inductor", "triton", "torchvision", "timm", "mmpretrain"}
    heavy |= {"mmcv", "matplotlib", "scipy", "sklearn", "faiss", "onnxruntime"}
    assert not loaded & heavy
