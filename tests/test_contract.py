"""What every config, registered class and public function has to keep."""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import default_collate
from mmengine.registry import init_default_scope
from mmpretrain.structures import DataSample
from torch import nn

from patchreg import registry
from patchreg.models.features import FeatureExtractor
from patchreg.models.multi_view import MultiViewPreprocessor
from patchreg.registry import MODELS
from patchreg.runner.build import load_config
from patchreg.runner.checkpoint import load_state
from patchreg.structures import PatchSelection
from patchreg.transforms.multi_view import MultiView
from patchreg.utils.random import batch_random, seed_all
from patchreg.utils.weights import load_file

ROOT = Path(__file__).resolve().parent.parent
LEAVES = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "configs").glob("*/*.py")
    if not path.name.startswith("_") and path.parent.name != "_base_"
)
SOURCES = sorted((*(ROOT / "patchreg").rglob("*.py"), *(ROOT / "ops").glob("*.py")))
MAX_PARAMETERS = 30_000_000
"""Larger models are built and counted, but not run: their smaller siblings are."""


@pytest.fixture(autouse=True)
def _in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    init_default_scope("patchreg")


@pytest.mark.parametrize("leaf", LEAVES, ids=str)
def test_config_has_a_header_and_is_short(leaf: Path) -> None:
    text = leaf.read_text()
    header = ast.get_docstring(ast.parse(text)) or ""
    assert str(leaf) in header, "the header shows no command with the config's own path"
    assert "Expected:" in header
    assert "Hardware and hours:" in header
    assert len(text.splitlines()) <= 50
    if (leaf.parent / "metafile.yml").is_file():
        return
    raise AssertionError(f"{leaf.parent} has no metafile.yml")


def depth(path: Path) -> int:
    """Levels of bases below a config."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_base_":
            bases = ast.literal_eval(node.value)
            return 1 + max(depth(path.parent / base) for base in bases)
    return 0


@pytest.mark.parametrize("leaf", LEAVES, ids=str)
def test_bases_are_at_most_two_deep(leaf: Path) -> None:
    assert depth(leaf) <= 2


def model_of(leaf: Path) -> tuple[nn.Module, int]:
    """The model of a config with its preprocessor, and the side of its images."""
    # Weights of earlier stages need not be there: the model is built, not initialised.
    config = load_config(leaf, moved={"work_dirs": "work_dirs"})
    parts = config.model
    preprocessor = config.get("data_preprocessor") or {}
    if preprocessor:
        parts.setdefault("data_preprocessor", preprocessor)
    views = [
        part.get("size", 0) for part in (preprocessor.get("view"), parts.get("overview")) if part
    ]
    backbone = parts.get("backbone", {})
    # BatchNorm of a deep network cannot train on one value per channel and image.
    usual = 64 if backbone.get("type") == "TorchvisionBackbone" else 32
    side = max([backbone.get("img_size", usual), *views])
    seed_all(0)
    model = MODELS.build(parts)
    return model, max(side, getattr(model, "min_image_size", 0))


def batch(model: nn.Module, side: int, training: bool) -> dict[str, Any]:
    """Two random images through the model's preprocessor; in training views of them, if it takes views."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=generator)
    if training and isinstance(model.data_preprocessor, MultiViewPreprocessor):
        views = [dict(num=2, size=side, scale=(0.4, 1.0)), dict(size=side // 2, scale=(0.1, 0.4))]
        cut = MultiView(views[: getattr(model, "num_views", 3) - 1], source_size=side)
        samples = [cut(dict(img=image.permute(1, 2, 0).numpy())) for image in images]
        return model.data_preprocessor(default_collate(samples), training)
    samples = [DataSample().set_gt_label(label) for label in (1, 3)]
    return model.data_preprocessor(dict(inputs=images, data_samples=samples), training)


def restart(model: nn.Module) -> nn.Module:
    """Let parts that draw without a key, as random selectors do, begin again."""
    for part in model.modules():
        if hasattr(part, "restart"):
            part.restart()
    return model


def step(model: nn.Module, side: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and losses of one keyed training step."""
    batch_random.begin(seed=5, step=2)
    seed_all(5)
    losses = restart(model)(**batch(model, side, True), mode="loss")
    loss, _ = model.parse_losses(losses)
    return loss, losses


@pytest.mark.parametrize("leaf", LEAVES, ids=str)
def test_config_builds_steps_evaluates_saves_and_reloads(leaf: Path, tmp_path: Path) -> None:
    if "stages" in Config.fromfile(leaf):
        return
    model, side = model_of(leaf)
    if sum(value.numel() for value in model.parameters()) > MAX_PARAMETERS:
        return
    if isinstance(model, FeatureExtractor):
        check_features(model, side)
        return
    model.train()
    before = copy.deepcopy(model.state_dict())
    first, _ = step(model, side)
    assert torch.isfinite(first)
    # A loss may keep statistics.
    model.load_state_dict(before)
    loss, losses = step(model, side)
    assert torch.equal(loss, first), "the same seed and step gave another loss"
    for name in losses:
        assert name.startswith("loss_") or "loss" not in name
    loss.backward()
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    without = [name for name in trained if model.get_parameter(name).grad is None]
    assert not without, f"no gradient reaches {without[:4]}"
    torch.optim.SGD(model.parameters(), lr=1e-3).step()

    model.eval()
    data = batch(model, side, False)
    with torch.inference_mode():
        logits = restart(model)(data["inputs"])
        samples = restart(model)(**data, mode="predict")
        selection = restart(model).select(data["inputs"])
    assert logits.shape[0] == 2
    assert torch.isfinite(logits).all()
    for row, sample in zip(logits, samples, strict=True):
        if "feature" in sample:
            assert torch.equal(sample.feature, row)
            continue
        assert sample.pred_label.item() == row.argmax().item()
        assert torch.allclose(sample.pred_score, row.softmax(0), atol=1e-5)
        assert sample.dense_macs >= 0
    check_selection(selection, data["inputs"].shape[-1])

    path = tmp_path / "weights.pth"
    torch.save(dict(state_dict=model.state_dict()), path)
    other, _ = model_of(leaf)
    load_state(other, load_file(path)["state_dict"], str(path), strict=True)
    with torch.inference_mode():
        assert torch.equal(other.eval()(data["inputs"]), logits)


def check_features(model: FeatureExtractor, side: int) -> None:
    """The contract of a config that evaluates a frozen backbone."""
    data = batch(model, side, False)
    features = model(data["inputs"])
    assert features.shape[0] == 2
    assert torch.isfinite(features).all()
    assert not any(value.requires_grad for value in model.parameters())
    assert not model.train().training
    assert torch.allclose(model.features(data["inputs"][1:]), features[1:], atol=1e-4)


def check_selection(selection: PatchSelection, side: int) -> None:
    """The contract of every method's `select`."""
    assert isinstance(selection, PatchSelection)
    selection.validate()
    assert len(selection) == 2
    assert selection.image_size[0] >= side
    assert selection.macs is not None
    assert selection.dense_macs is not None
    one = selection[1]
    one.validate()
    joined = PatchSelection.cat([selection[0], one])
    joined.validate()
    assert torch.equal(joined.resolution, selection.resolution)


def public_nodes(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Public classes, functions and methods of a file."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                        yield f"{node.name}.{inner.name}", inner


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_public_name_is_documented(path: Path) -> None:
    text = path.read_text()
    assert text.isascii()
    bare = [name for name, node in public_nodes(path) if not ast.get_docstring(node)]
    assert not bare, f"without docstring: {bare}"
    assert ast.get_docstring(ast.parse(text)), "the file has no first line of purpose"


def registered() -> Iterator[tuple[str, type]]:
    """Every class of this project in a registry."""
    registry.discover()
    for name in dir(registry):
        child = getattr(registry, name)
        if isinstance(child, registry.StageRegistry):
            for key, built in child.module_dict.items():
                if built.__module__.startswith("patchreg.") and inspect.isclass(built):
                    yield key, built


ROLES = (
    "Backbone",
    "Head",
    "Neck",
    "Selector",
    "Loss",
    "Hook",
    "Metric",
    "Dataset",
    "Sampler",
    "Classifier",
    "Preprocessor",
    "Loop",
    "LR",
    "LARS",
    "ParamScheduler",
    "Wrapper",
    "Constructor",
    "Runner",
    "EMA",
    "Extractor",
    "Pretrainer",
)
TRANSFORMS = (
    "LoadImage",
    "BatchMixup",
    "RGBRandAugment",
    "MultiView",
    "ThumbnailResize",
    "TimmEvalCrop",
)


def test_registered_classes_are_named_by_their_role() -> None:
    for key, built in registered():
        assert key == built.__name__
        assert key.endswith(ROLES) or key in TRANSFORMS, f"{key} does not end with its role"


def test_nothing_of_a_third_party_is_registered_by_the_import() -> None:
    registry.discover()
    for name in dir(registry):
        child = getattr(registry, name)
        if isinstance(child, registry.StageRegistry):
            foreign = [
                key
                for key, built in child.module_dict.items()
                if built.__module__.split(".")[0] in ("timm", "mmpretrain", "mmcv", "torchvision")
            ]
            assert not foreign
