"""Converters, schedules and image transforms of AnchorNet."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anchornet_helpers import (
    close,
    golden,
    localiser,
    normalised,
    official_shapes,
    recipe,
    recipe_localiser,
)
from mmengine.config import Config
from mmengine.registry import init_default_scope

from patchreg.converters import resnet50_keras
from patchreg.methods.anchornet import convert as converter
from patchreg.methods.anchornet.convert import UNUSED
from patchreg.models.backbones.torchvision import TorchvisionBackbone
from patchreg.registry import MODELS, PARAM_SCHEDULERS, TRANSFORMS
from patchreg.runner.convert import convert_file, converters
from patchreg.utils.errors import CheckpointError, ConfigError, MissingFileError
from patchreg.utils.weights import load_weights

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_localiser_survives_both_ways(tmp_path: Path) -> None:
    official = recipe(official_shapes(localiser().state_dict()), 54)
    source, ours, back = (tmp_path / name for name in ("anchornet.pth", "ours.pth", "back.pth"))
    torch.save(official, source)
    report = convert_file(converter, str(source), str(ours), "ours")
    assert (len(report["used"]), len(report["dropped"])) == (158, 6)
    model = localiser()
    model.load_state_dict(load_weights(ours))
    images = torch.randn(2, 3, 127, 103)
    with torch.inference_mode():
        assert torch.equal(model.eval()(images), recipe_localiser(54)(images))
    report = convert_file(converter, str(ours), str(back), "official")
    assert len(report["made"]) == 6
    again = torch.load(back, weights_only=True)
    assert list(again) == list(official)
    for key, value in official.items():
        assert again[key].shape == value.shape
        assert UNUSED.match(key) or torch.equal(again[key], value)


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_downstream_files_of_the_authors_survive_both_ways(tmp_path: Path, name: str) -> None:
    net = TorchvisionBackbone(name, 7).model
    momentum = {0: {"momentum_buffer": torch.ones(2)}}
    loaded = {
        "net": dict(net.state_dict()),
        "acc": 0.7038,
        "epoch": 29,
        "optimizer": {"state": momentum, "param_groups": [{"lr": 0.01, "params": [0]}]},
    }
    source, ours, back = (tmp_path / item for item in ("a_best.pth.tar", "ours.pth", "b.pth.tar"))
    torch.save(loaded, source)
    report = convert_file(converter, str(source), str(ours), "ours")
    assert report["model"]["backbone"]["model_name"] == name
    model = MODELS.build(
        dict(type="AnchorNetResizedClassifier", backbone=report["model"]["backbone"])
    )
    model.load_state_dict(load_weights(ours))
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model.eval().view_logits(images), net.eval()(images))
    convert_file(converter, str(ours), str(back), "official")
    again = torch.load(back, weights_only=True)
    assert (again["acc"], again["epoch"]) == (0.7038, 29)
    assert torch.equal(again["optimizer"]["state"][0]["momentum_buffer"], torch.ones(2))
    assert list(again["net"]) == list(net.state_dict())
    assert all(torch.equal(again["net"][key], value) for key, value in net.state_dict().items())


def test_old_densenet_names_are_understood(tmp_path: Path) -> None:
    net = TorchvisionBackbone("densenet121", 5).model
    old = {
        key.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): value
        for key, value in net.state_dict().items()
    }
    source, ours = tmp_path / "densenet121.pth", tmp_path / "ours.safetensors"
    torch.save(old, source)
    report = convert_file(converter, str(source), str(ours), "ours")
    assert len(report["changed"]) > 100
    assert set(load_weights(ours)) == {f"backbone.model.{key}" for key in net.state_dict()}


def test_what_is_no_such_checkpoint_is_refused(tmp_path: Path) -> None:
    path, out = str(tmp_path / "in.pth"), str(tmp_path / "out.pth")
    weights = recipe(official_shapes(localiser(9).state_dict()), 1)

    def attempt(state: Any, text: str, **options: Any) -> None:
        torch.save(state, path)
        with pytest.raises(CheckpointError, match=text):
            convert_file(converter, path, out, "ours", options=options)
        assert not Path(out).exists()

    attempt({**weights, "bneck.7.conv1.weight": torch.zeros(1)}, "unexpected: backbone.bneck.7")
    attempt({k: v for k, v in weights.items() if k != "bneck.3.bn2.bias"}, "missing: .*3.bn2.bias")
    attempt({k: v for k, v in weights.items() if k != "fc.weight"}, "no AnchorNet")
    attempt({"stem.weight": torch.zeros(2, 2)}, "neither an AnchorNet nor")
    net = dict(TorchvisionBackbone("resnet18", 5).model.state_dict())
    attempt({k: v for k, v in net.items() if "layer4.1.bn2" not in k}, "nearest is resnet18")
    attempt(net, "resnet50: missing", arch="resnet50")
    torch.save(weights, path)
    with pytest.raises(ConfigError, match="has the layout 'official'"):
        convert_file(converter, path, out, "official", "ours")


def test_schedules_are_the_published_ones() -> None:
    file = golden("schedules")
    init_default_scope("patchreg")
    for name, config in (
        ("anchornet_multistep", "anchornet"),
        ("downnet_cosine", "_base_/downstream"),
    ):
        settings = Config.fromfile(ROOT / f"configs/anchornet/{config}.py")
        parameter = torch.nn.Parameter(torch.zeros(1))
        given = dict(settings.optim_wrapper.optimizer)
        assert given.pop("type") == "SGD"
        assert given == dict(momentum=0.9, weight_decay=1e-4, lr=given["lr"]) | (
            dict(nesterov=True) if name.startswith("anchor") else {}
        )
        optimiser = torch.optim.SGD([parameter], **given)
        schedule = PARAM_SCHEDULERS.build(
            dict(settings.param_scheduler), default_args=dict(optimizer=optimiser)
        )
        rates = []
        for _ in range(settings.train_cfg.max_epochs):
            rates.append(optimiser.param_groups[0]["lr"])
            optimiser.step()
            schedule.step()
        assert torch.allclose(
            torch.tensor(rates, dtype=torch.float64), file[name], rtol=1e-12, atol=1e-12
        )


def test_images_are_prepared_as_published() -> None:
    file = golden("transforms")
    init_default_scope("patchreg")
    config = Config.fromfile(ROOT / "configs/anchornet/anchornet.py")
    steps = [TRANSFORMS.build(dict(step)) for step in config.val_dataloader.dataset.pipeline[1:3]]
    crop = next(
        step
        for step in config.train_dataloader.dataset.pipeline
        if step.type.endswith("RandomResizedCrop")
    )
    assert (crop.scale, crop.interpolation, crop.backend) == (224, "bilinear", "pillow")
    assert crop.crop_ratio_range == (0.08, 1.0)
    for k in (0, 1):
        raw = file[f"img{k}_u8"].permute(1, 2, 0).numpy()
        sample: dict[str, Any] = dict(img=raw)
        for step in steps:
            sample = step(sample)
        evaluated = torch.from_numpy(sample["img"].copy()).permute(2, 0, 1).int()
        # One grey level: other versions of Pillow round otherwise.
        assert (evaluated - file[f"img{k}_eval224_u8"].int()).abs().max() <= 1
        moments = []
        for number, (top, left, height, width, flip) in enumerate(
            file[f"img{k}_rrc_params"].tolist()
        ):
            cut = raw[top : top + height, left : left + width]
            resized = TRANSFORMS.build(
                dict(
                    type="mmpretrain.Resize",
                    scale=(224, 224),
                    interpolation="bilinear",
                    backend="pillow",
                )
            )(dict(img=np.ascontiguousarray(cut)))["img"]
            out = torch.from_numpy(resized.copy()).permute(2, 0, 1)
            out = out.flip(2) if flip else out
            if number == 0:
                difference = (out.int() - file[f"img{k}_rrc_out0_u8"].int()).abs().max()
                assert difference <= 1
            moments.append(
                torch.stack(
                    (out.double().mean((1, 2)), out.double().std((1, 2), unbiased=False)), 1
                )
            )
        expected = file[f"img{k}_rrc_mean_std"].double()
        assert (torch.stack(moments) - expected).abs().max() <= 0.05


def test_raw_images_become_the_published_crops() -> None:
    file = golden("end_to_end", "raw0_u8")
    init_default_scope("patchreg")
    config = Config.fromfile(ROOT / "configs/anchornet/anchornet.py")
    steps = [TRANSFORMS.build(dict(step)) for step in config.val_dataloader.dataset.pipeline[1:3]]
    for k in range(3):
        sample: dict[str, Any] = dict(img=file[f"raw{k}_u8"].permute(1, 2, 0).numpy())
        for step in steps:
            sample = step(sample)
        found = torch.from_numpy(sample["img"].copy()).permute(2, 0, 1).int()
        assert (found - file["eval_crop_u8"][k].int()).abs().max() <= 1
    mean = (0.485 * 255, 0.456 * 255, 0.406 * 255)
    assert np.allclose(config.data_preprocessor.mean, mean)
    batch = dict(inputs=file["eval_crop_u8"], data_samples=None)
    ready = MODELS.build(dict(config.data_preprocessor))(batch)["inputs"]
    assert close(ready, normalised(file["eval_crop_u8"]), 1e-5)


def keras_package(path: Path) -> dict[str, torch.Tensor]:
    """A package laid out as the real one, with small numbers of random values."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, list[int]] = {"conv1/kernel": [7, 7, 3, 64], "conv1/bias": [64]}
    norms = ("gamma", "beta", "moving_mean", "moving_variance")
    shapes |= {f"bn_conv1/{part}": [64] for part in norms}
    width = 64
    for stage, (blocks, inner) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 2):
        for block in range(blocks):
            name = f"{stage}{'abcdef'[block]}_branch"
            sizes = {"2a": (1, width, inner), "2b": (3, inner, inner), "2c": (1, inner, 4 * inner)}
            if block == 0:
                sizes["1"] = (1, width, 4 * inner)
            for branch, (side, before, after) in sizes.items():
                shapes[f"res{name}{branch}/kernel"] = [side, side, before, after]
                shapes[f"res{name}{branch}/bias"] = [after]
                shapes |= {f"bn{name}{branch}/{part}": [after] for part in norms}
            width = 4 * inner
    shapes |= {"fc1000/kernel": [2048, 1000], "fc1000/bias": [1000]}
    tensors = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if name.endswith("kernel"):
            value = value * (2 / np.prod(shape[:-1])) ** 0.5
        elif name.endswith(("gamma", "variance")):
            value = 1 + 0.1 * value.abs()
        tensors[name] = value
    content = b"".join(value.numpy().tobytes() for value in tensors.values())
    half = len(content) // 2 + 3
    model = dict(
        weightsManifest=[
            dict(
                paths=["b.bin", "a.bin"],
                weights=[dict(name=k, shape=v, dtype="float32") for k, v in shapes.items()],
            )
        ]
    )
    files = {
        "model.json": json.dumps(model).encode(),
        "b.bin": content[:half],
        "a.bin": content[half:],
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/ResNet50/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return tensors


def test_keras_s_resnet_computes_the_same_after_conversion(tmp_path: Path) -> None:
    pytest.importorskip("mmpretrain", reason="the network is mmpretrain's: pip install mmpretrain")
    init_default_scope("patchreg")
    package, out = tmp_path / "package.tgz", tmp_path / "out.pth"
    tensors = keras_package(package)
    found = converters()["resnet50-keras"]
    report = convert_file(found, str(package), str(out), "ours")
    assert len(report["used"]) == 320
    config = Config.fromfile(ROOT / "configs/anchornet/resnet50_keras.py")
    model = MODELS.build(dict(config.model)).eval()
    model.load_state_dict(load_weights(out))
    images = torch.randn(1, 3, 64, 64)
    norm = torch.nn.functional.batch_norm

    def layer(x: torch.Tensor, conv: str, bn: str, stride: int) -> torch.Tensor:
        kernel = tensors[f"{conv}/kernel"].permute(3, 2, 0, 1)
        pad = kernel.shape[-1] // 2
        x = torch.nn.functional.conv2d(x, kernel, tensors[f"{conv}/bias"], stride, pad)
        parts = [
            tensors[f"{bn}/{part}"] for part in ("moving_mean", "moving_variance", "gamma", "beta")
        ]
        return norm(x, *parts, eps=1e-3)

    with torch.inference_mode():
        # Keras reads BGR.
        x = layer(images.flip(1), "conv1", "bn_conv1", 2).relu()
        x = torch.nn.functional.max_pool2d(x, 3, 2, 1)
        for stage, blocks in enumerate((3, 4, 6, 3), 2):
            for block in range(blocks):
                name = f"{stage}{'abcdef'[block]}_branch"
                stride = 2 if block == 0 and stage > 2 else 1
                skip = layer(x, f"res{name}1", f"bn{name}1", stride) if block == 0 else x
                y = layer(x, f"res{name}2a", f"bn{name}2a", stride).relu()
                y = layer(y, f"res{name}2b", f"bn{name}2b", 1).relu()
                x = (layer(y, f"res{name}2c", f"bn{name}2c", 1) + skip).relu()
        expected = x.mean((2, 3)) @ tensors["fc1000/kernel"] + tensors["fc1000/bias"]
        assert close(model(images), expected, 1e-4)


def test_other_packages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="prepare_data.py resnet50_keras"):
        resnet50_keras.read(str(tmp_path / "gone.tgz"))
    path = tmp_path / "other.tgz"
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        resnet50_keras.read(str(path))
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no TensorFlow.js model"):
        resnet50_keras.read(str(tmp_path))
    manifest = dict(paths=["a.bin"], weights=[dict(name="conv1/kernel", shape=[2])])
    (tmp_path / "model.json").write_text(json.dumps(dict(weightsManifest=[manifest])))
    with pytest.raises(MissingFileError, match="all its shards"):
        resnet50_keras.read(str(tmp_path))
    (tmp_path / "a.bin").write_bytes(np.zeros(2, np.float32).tobytes())
    with pytest.raises(CheckpointError, match="another network"):
        resnet50_keras.read(str(tmp_path))
    with pytest.raises(ConfigError, match="from keras to ours only"):
        resnet50_keras.convert({}, "x", "keras")
    with pytest.raises(CheckpointError, match="has not: .'dense/kernel'"):
        resnet50_keras.convert({"dense/kernel": torch.zeros(1)}, "x", "ours")
