"""Conversion of checkpoints: layout, order, round trips, what is refused."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_reader import load
from patchgame_helpers import build, filled, metadata, official_name
from test_method_patchgame_model import optimiser
from torch import Tensor, nn

from patchreg.methods.patchgame import convert as converter
from patchreg.methods.patchgame.convert import our_name
from patchreg.models.features import FeatureExtractor, backbone_state
from patchreg.runner.convert import convert_file, converters
from patchreg.utils.errors import CheckpointError, ConfigError
from patchreg.utils.weights import load_file

SMALL = dict(
    image_size=64, sender_hidden_size=24, receiver_dim=16, receiver_hidden_size=12, num_layers=2
)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def official_file(model: nn.Module, path: Path) -> Path:
    """Write a checkpoint as the official train.py does, after one step of its optimizer."""
    optimizer = optimiser(model, "adamw")
    for value in model.parameters():
        value.grad = torch.ones_like(value)
    optimizer.step()
    state = {f"module.{official_name(key)}": value for key, value in model.state_dict().items()}
    checkpoint = dict(
        model=state,
        optimizer=optimizer.state_dict(),
        epoch=100,
        args=Namespace(patch_size=32, topk=None),
    )
    torch.save(checkpoint, path)
    return path


def test_layout_golden(monkeypatch: pytest.MonkeyPatch) -> None:
    golden, facts = load("patchgame", "checkpoint_layout"), metadata("checkpoint_layout")
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, **kwargs: tensor)
    model = build(**json.loads(facts["config"]))
    names, shapes = json.loads(facts["names"]), json.loads(facts["shapes"])
    state = model.state_dict()
    assert [official_name(key) for key in state] == names
    assert [our_name(name) for name in names] == list(state)
    assert [list(value.shape) for value in state.values()] == shapes
    assert [value.numel() for value in state.values()] == golden["numel"].tolist()
    groups = optimiser(model, "adamw").param_groups
    place = {}
    for number, group in enumerate(groups):
        for value in group["params"]:
            place[id(value)] = (len(place), number)
    parameters = dict(model.named_parameters())
    index = [place.get(id(parameters.get(key)), (-1, 0))[0] for key in state]
    assert index == golden["optimizer_index"].tolist()
    kinds = [
        -2 if key not in parameters else place.get(id(parameters[key]), (0, -1))[1] for key in state
    ]
    assert kinds == golden["weight_decay_group"].tolist()


@pytest.mark.parametrize(
    "case", [SMALL, dict(SMALL, sender_arch="vit_tiny"), dict(SMALL, use_context=False, max_len=2)]
)
def test_weights_go_round_bit_by_bit(case: dict[str, Any], tmp_path: Path) -> None:
    assert converters()["patchgame"] is converter
    model = filled(build(**case))
    source = official_file(model, tmp_path / "official.pth")
    report = convert_file(converter, str(source), str(tmp_path / "ours.pth"), "ours")
    ours = load_file(tmp_path / "ours.pth")
    same(ours["state_dict"], model.state_dict())
    assert (report["from"], report["unexpected"], report["missing"]) == ("official", [], [])
    assert report["model"]["model"]["img_size"] == 64
    assert report["model"]["model"]["max_len"] == case.get("max_len", 1)
    build(**case).load_state_dict(ours["state_dict"])
    convert_file(converter, str(tmp_path / "ours.pth"), str(tmp_path / "back.pth"), "official")
    first = load_file(source, allowed=[Namespace])
    back = load_file(tmp_path / "back.pth")
    same(back["model"], first["model"])
    assert back["epoch"] == 100
    assert back["args"] == dict(patch_size=32, topk=None)
    assert list(back["optimizer"]["state"]) == list(first["optimizer"]["state"])
    for key, value in first["optimizer"]["state"].items():
        assert torch.equal(back["optimizer"]["state"][key]["exp_avg"], value["exp_avg"])


def test_listener_is_torchvisions_network(tmp_path: Path) -> None:
    from torchvision.models import resnet18

    model = filled(build(**SMALL)).eval()
    source = official_file(model, tmp_path / "official.pth")
    report = convert_file(converter, str(source), str(tmp_path / "tower.pth"), "listener")
    tower = resnet18()
    tower.fc = nn.Identity()
    missing = tower.load_state_dict(load_file(tmp_path / "tower.pth")["model"])
    assert (missing.missing_keys, missing.unexpected_keys) == ([], [])
    assert all("receiver.vision." in key for key in report["used"])
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(tower.eval()(images), model(images))


def test_features_are_read_from_every_layout(tmp_path: Path) -> None:
    model = filled(build(**SMALL)).eval()
    source = official_file(model, tmp_path / "official.pth")
    for name in ("ours", "listener"):
        convert_file(converter, str(source), str(tmp_path / f"{name}.pth"), name)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / "trained.pth")
    images = torch.randn(2, 3, 64, 64)
    for name in ("official", "ours", "listener", "trained"):
        extractor = FeatureExtractor(
            dict(type="TorchvisionBackbone", model_name="resnet18", output="features"),
            checkpoint_key="receiver.vision",
        )
        extractor.eval().load_state_dict(
            extractor.read_checkpoint(tmp_path / f"{name}.pth")["state_dict"]
        )
        assert torch.equal(extractor(images), model(images)), name
    # A larger network of the same kind would fit tensor by tensor.
    deeper = {f"listener.{key}": value for key, value in extractor.backbone.state_dict().items()}
    deeper["listener.model.layer1.2.conv1.weight"] = torch.zeros(64, 64, 3, 3)
    torch.save(dict(state_dict=deeper), tmp_path / "deeper.pth")
    with pytest.raises(CheckpointError, match=r"layer1\.2\.conv1\.weight, \.\.\. have no place"):
        backbone_state(extractor.backbone, tmp_path / "deeper.pth", "listener")


def test_other_files_are_refused(tmp_path: Path) -> None:
    torch.save(dict(model={"conv1.weight": torch.ones(2)}), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="holds no PatchGame"):
        convert_file(converter, str(tmp_path / "other.pth"), str(tmp_path / "out.pth"), "ours")
    source = official_file(build(**SMALL), tmp_path / "official.pth")
    loaded = load_file(source, allowed=[Namespace])
    for lost in (
        "gumbel.logits.weight",
        "sender.pe_symbol",
        "sender.lin_symbol.0.weight",
        "receiver.text_fc.last_layer.weight_v",
        "receiver.encoder.layers.0.linear1.weight",
    ):
        partial = {key: value for key, value in loaded["model"].items() if not key.endswith(lost)}
        assert len(partial) == len(loaded["model"]) - 1
        with pytest.raises(CheckpointError, match=f"no whole PatchGame: it lacks {lost}"):
            converter.convert(dict(model=partial), "x.pth", "ours")
    for name in ("stem.0.weight", "trunk_output.block1.weight", "conv5.0.weight", "fc.weight"):
        assert our_name(f"receiver.vision.{name}") == f"receiver.vision.model.{name}"
    assert (
        our_name("sender.patch_rank.blocks.0.norm1.bias") == "sender.patch_rank.blocks.0.norm1.bias"
    )
    with pytest.raises(ConfigError, match="--from ours"):
        convert_file(converter, str(source), str(tmp_path / "out.pth"), "listener", "ours")
