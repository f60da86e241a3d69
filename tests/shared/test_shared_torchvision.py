"""Networks of torchvision by name: outputs, keys, weights from local files, cost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from patchreg.methods.anchornet.convert import convert
from patchreg.models.backbones.torchvision import TorchvisionBackbone
from patchreg.utils.errors import CheckpointError, ConfigError, MissingFileError


@pytest.mark.parametrize(
    ("name", "parameters", "macs95", "macs224"),
    [
        ("resnet18", 11_689_512, 333_615_104, 1_814_073_344),
        ("resnet50", 25_557_032, 752_746_496, 4_089_184_256),
        ("densenet201", 20_013_928, 789_777_408, 4_291_365_888),
    ],
)
def test_counts_of_known_networks(name: str, parameters: int, macs95: int, macs224: int) -> None:
    net = TorchvisionBackbone(name, 1000)
    assert sum(value.numel() for value in net.parameters()) == parameters
    assert net.macs((3, 95, 95)) == macs95
    assert net.macs((3, 224, 224)) == macs224


@pytest.mark.parametrize(
    "name", ["resnet18", "densenet121", "mobilenet_v2", "shufflenet_v2_x0_5", "regnet_y_400mf"]
)
def test_features_are_the_mean_of_the_map(name: str) -> None:
    features = TorchvisionBackbone(name).eval()
    tokens = TorchvisionBackbone(name, output="tokens").eval()
    tokens.load_state_dict(features.state_dict())
    images = torch.randn(2, 3, 95, 64)
    with torch.inference_mode():
        pooled, out = features(images), tokens(images)
    assert out.grid == (3, 2)
    assert out.maps[0].shape[2:] == (3, 2)
    assert torch.allclose(out.tokens.mean(1), pooled, atol=1e-5)
    assert out.dense_macs == tokens.macs((3, 95, 64)) > 1e6


def test_a_map_has_no_parameter_without_use() -> None:
    net = TorchvisionBackbone("vgg11", output="map")
    net(torch.randn(1, 3, 32, 32)).sum().backward()
    assert all(value.grad is not None for value in net.parameters())


def test_weights_come_from_files_with_old_keys_and_other_classifiers(tmp_path: Path) -> None:
    net = TorchvisionBackbone("densenet121", 5).eval()
    old = {
        key.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): value
        for key, value in net.model.state_dict().items()
    }
    assert old.keys() != net.model.state_dict().keys()
    path = tmp_path / "densenet.pth"
    torch.save(old, path)
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        again = TorchvisionBackbone("densenet121", 5, checkpoint=str(path), frozen=True)
        assert torch.equal(again.train()(images), net(images))
        trunk = TorchvisionBackbone("densenet121", checkpoint=str(path)).eval()
        assert torch.equal(net.model.classifier(trunk(images)), net(images))
    other = TorchvisionBackbone("densenet121", 7, checkpoint=str(path))
    assert torch.equal(other.model.features.conv0.weight, net.model.features.conv0.weight)
    assert not any(value.requires_grad for value in again.parameters())


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'resnet50'"):
        TorchvisionBackbone("resnet5", 10)
    with pytest.raises(ConfigError, match="num_classes > 0"):
        TorchvisionBackbone("resnet18", output="logits")
    with pytest.raises(ConfigError, match="feature map of 'swin_t'"):
        TorchvisionBackbone("swin_t", output="map")
    with pytest.raises(ConfigError, match="nothing is downloaded"):
        TorchvisionBackbone("resnet18", 10, model_kwargs=dict(weights="DEFAULT"))
    with pytest.raises(ConfigError, match="aux_logits=False"):
        TorchvisionBackbone("googlenet", 10, model_kwargs=dict(init_weights=False))
    with pytest.raises(MissingFileError, match="gone.pth"):
        TorchvisionBackbone("resnet18", 10, checkpoint=str(tmp_path / "gone.pth"))
    path = tmp_path / "net.pth"
    state = TorchvisionBackbone("resnet18", 10).model.state_dict()
    state.pop("layer1.0.conv1.weight")
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="missing .'layer1.0.conv1.weight'"):
        TorchvisionBackbone("resnet18", 10, checkpoint=str(path))
    torch.save({"model": {"other.weight": torch.zeros(1)}}, path)
    with pytest.raises(CheckpointError, match="other.weight"):
        TorchvisionBackbone("resnet18", 10, checkpoint=str(path))


def test_files_without_counts_of_batches_load(tmp_path: Path) -> None:
    from torchvision.models import densenet121, resnet18

    for build, name in ((resnet18, "resnet18"), (densenet121, "densenet121")):
        state = {k: v for k, v in build().state_dict().items() if "num_batches_tracked" not in k}
        torch.save(state, tmp_path / "old.pth")
        model = TorchvisionBackbone(name, 1000, checkpoint=str(tmp_path / "old.pth"))
        found = model.model.state_dict()
        assert all(torch.equal(found[key], value) for key, value in state.items())
        ours, report = convert(dict(state), "old.pth", "ours")
        assert report["model"]["backbone"]["model_name"] == name


@pytest.mark.parametrize(("name", "least"), [("vit_b_16", 16.8e9), ("swin_t", 4.2e9)])
def test_attention_inside_other_libraries_is_counted(name: str, least: float) -> None:
    # torchvision states 17.56 and 4.49 G with the products of queries, keys and values.
    found = TorchvisionBackbone(name, 1000).macs((3, 224, 224))
    assert least < found < 1.05 * least
