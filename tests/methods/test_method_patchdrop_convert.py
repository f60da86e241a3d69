"""Official PatchDrop checkpoints of all kinds, both ways, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.registry import init_default_scope
from patchdrop_helpers import patchdrop, policy, wide
from torch import Tensor

from patchreg.methods.patchdrop.convert import convert, to_official
from patchreg.registry import MODELS
from patchreg.runner.convert import convert_file, converters
from patchreg.utils.errors import CheckpointError, ConfigError
from patchreg.utils.weights import load_file


@pytest.fixture(autouse=True)
def _scope() -> None:
    init_default_scope("patchreg")


def official(config: dict) -> dict[str, Tensor]:
    """State dict of a network under official names, with lively buffers."""
    torch.manual_seed(0)
    state = to_official(MODELS.build(config).state_dict())
    return {
        key: torch.randn(value.shape) if value.is_floating_point() else value + 7
        for key, value in state.items()
    }


def thin(depth: int, **kwargs: Any) -> dict:
    return dict(
        type="PatchDropSelector",
        backbone=dict(type="ThinCIFARResNetBackbone", depth=depth),
        in_channels=64,
        **kwargs,
    )


NUMBERS = dict(epoch=15, acc=torch.tensor(0.75), reward=torch.tensor(0.5))
KINDS = {
    "stage 0": lambda: dict(state_dict=official(wide(4)), epoch=15, acc=torch.tensor(0.75)),
    "stage 1": lambda: dict(agent=official(policy(4)), **NUMBERS),
    "stage 2": lambda: dict(agent=official(policy(4)), resnet_hr=official(wide(4)), **NUMBERS),
    "stage 3": lambda: dict(agent=official(policy(4)), resnet=official(wide(4)), **NUMBERS),
    "first version": lambda: dict(agent=official(thin(8, value_outputs=16)), **NUMBERS),
    "first version, 224 px": lambda: dict(
        agent=official(
            dict(
                type="PatchDropSelector",
                backbone=dict(type="PatchDropResNet10Backbone"),
                in_channels=512,
                value_outputs=1,
            )
        ),
        **NUMBERS,
    ),
    "224 px": lambda: dict(
        agent=official(
            dict(
                type="PatchDropSelector",
                backbone=dict(type="TorchvisionBackbone", model_name="resnet18", output="tokens"),
                in_channels=512,
            )
        ),
        **NUMBERS,
    ),
}


def equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            equal(found[key], expected[key]) for key in expected
        )
    if isinstance(expected, Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    return found == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_round_trip(kind: str, prefix: str) -> None:
    loaded = KINDS[kind]()
    given = {
        key: {prefix + name: tensor for name, tensor in value.items()}
        if isinstance(value, dict)
        else value
        for key, value in loaded.items()
    }
    ours, report = convert(given, "x", "ours")
    assert report["from"] == "official"
    options = dict(stage3_key=True) if kind == "stage 3" else {}
    back, _ = convert(ours, "x", "official", **options)
    if kind == "stage 3":
        assert equal(back.pop("resnet_hr"), loaded["resnet"])
    assert equal(back, loaded)
    # An agent's keys in the first version begin with `features.`.
    if kind.startswith("first version"):
        assert any(key.startswith("features.blocks.") for key in loaded["agent"])


def test_file_of_a_whole_training(tmp_path: Path) -> None:
    model = patchdrop("twostream")
    source = tmp_path / "ours.pth"
    torch.save(dict(state_dict=model.state_dict(), meta=dict(epoch=3)), source)
    converter = converters()["patchdrop"]
    for stage, names in ((1, {"agent", "epoch"}), (2, {"agent", "resnet_hr", "epoch"})):
        out = tmp_path / f"stage{stage}.pth"
        report = convert_file(
            converter, str(source), str(out), "official", options=dict(stage=stage)
        )
        assert set(load_file(out)) == names
        assert any(key.startswith("lr_classifier.") for key in report["not_carried"])
    again = tmp_path / "again.pth"
    convert_file(converter, str(tmp_path / "stage2.pth"), str(again), "ours")
    fresh = patchdrop("finetune")
    missing = fresh.load_state_dict(load_file(again)["state_dict"], strict=False)
    assert missing.missing_keys == ["policy_loss.surcharge", "policy_loss.gap"]
    assert not missing.unexpected_keys
    assert torch.equal(fresh.selector.logit.weight, model.selector.logit.weight)


def test_report_names_the_network() -> None:
    _, report = convert(KINDS["stage 2"](), "x", "ours")
    assert report["model"]["classifier"] == dict(
        outputs=10,
        in_channels=32,
        type="CIFARResNetBackbone",
        num_blocks=(1, 1, 1, 1),
        base_channels=4,
    )
    _, report = convert(KINDS["first version"](), "x", "ours")
    assert report["model"]["selector"]["depth"] == 8
    _, report = convert(KINDS["224 px"](), "x", "ours")
    assert report["model"]["selector"]["model_name"] == "resnet18"


def test_files_that_cannot_be_converted() -> None:
    broken = official(wide(4))
    broken["conv1.weight"] = torch.zeros(4, 3, 7, 7)
    with pytest.raises(CheckpointError, match="7x7 stride-1 stem"):
        convert(dict(state_dict=broken), "x", "ours")
    with pytest.raises(CheckpointError, match="no network of the PatchDrop repository"):
        convert(dict(agent=dict(weight=torch.zeros(1))), "x", "ours")
    lacking = official(wide(4))
    del lacking["layer3.0.conv1.weight"]
    report = convert(dict(state_dict=lacking | {"extra.weight": torch.zeros(1)}), "x", "ours")[1]
    assert report["missing"] == ["classifier.backbone.layer3.0.conv1.weight"]
    assert report["unexpected"] == ["classifier.backbone.extra.weight"]
    vit = {"backbone.cls_token": torch.zeros(1, 1, 4), "head.head.weight": torch.zeros(2, 4)}
    with pytest.raises(CheckpointError, match="ResNets only, and this network is none"):
        convert(dict(state_dict=vit), "x", "official")
    with pytest.raises(CheckpointError, match="no classification layer"):
        convert(dict(state_dict={"other.weight": torch.zeros(1)}), "x", "official")
    with pytest.raises(ConfigError, match="classifier alone"):
        convert(dict(state_dict=MODELS.build(wide(4)).state_dict()), "x", "official", stage=2)
    ours, _ = convert(KINDS["stage 1"](), "x", "ours")
    with pytest.raises(ConfigError, match="has no classifier, which stage 2 needs"):
        convert(ours, "x", "official", stage=2)
    with pytest.raises(ConfigError, match="for --to official"):
        convert(KINDS["stage 1"](), "x", "ours", stage=1)
    with pytest.raises(ConfigError, match="has the layout 'official'"):
        convert(KINDS["stage 1"](), "x", "ours", "ours")
