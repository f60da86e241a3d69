"""Evaluations as they are run: k-NN, linear probe, several processes, benchmark."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.registry import init_default_scope

from patchreg import benchmarks
from patchreg.models.base import TokenFeatures
from patchreg.models.probe import LinearProbeHead, probe_features
from patchreg.registry import MODELS
from patchreg.runner.run import evaluate, train
from patchreg.utils.errors import CheckpointError, ConfigError, DataError

DataSample = pytest.importorskip(
    "mmpretrain.structures", reason="pip install mmpretrain"
).DataSample
ARCH = dict(embed_dims=16, depth=2, num_heads=2)
VIT = dict(type="VisionTransformerBackbone", arch=ARCH, img_size=32, patch_size=8)


@pytest.fixture(autouse=True)
def _in_root(monkeypatch: pytest.MonkeyPatch, project_root: Path) -> None:
    monkeypatch.chdir(project_root)
    init_default_scope("patchreg")


def small(start: str = "", **more: Any) -> dict[str, Any]:
    """Overrides that shrink the backbone and read the embedded data."""
    options: dict[str, Any] = {
        "model.backbone.arch": ARCH,
        "model.backbone.patch_size": 8,
        "model.backbone.mlp_ratio": 4,
        f"{start}test_dataloader.dataset.data_root": "nowhere",
        f"{start}test_dataloader.dataset.subset": 51,
    }
    return options | more


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A checkpoint of a pre-training, with a student that is another."""
    torch.manual_seed(4)
    backbone = MODELS.build(VIT)
    with torch.no_grad():  # images have to matter beside the class token
        backbone.patch_embed.proj.weight.mul_(10)
        for block in backbone.blocks:
            block.attn.qkv.weight.mul_(10)
            block.attn.proj.weight.mul_(10)
    state = {f"teacher.backbone.{key}": value for key, value in backbone.state_dict().items()}
    state |= {f"student.backbone.{key}": -value for key, value in backbone.state_dict().items()}
    state["student.head.last_layer.weight_v"] = torch.zeros(3, 2)
    torch.save(dict(state_dict=state), tmp_path / "pretrained.pth")
    return tmp_path / "pretrained.pth"


def test_knn_of_a_checkpoint_reads_the_part_that_is_named(teacher: Path, tmp_path: Path) -> None:
    options = small(
        **{
            "test_cfg.bank_dataloader.dataset.data_root": "nowhere",
            "test_cfg.bank_dataloader.dataset.subset": 400,
            "test_cfg.cache": None,
        }
    )
    config, results = "configs/pwself/knn_cifar10.py", {}
    for key in ("teacher", "student"):
        work_dir = str(tmp_path / key)
        chosen = options | {"model.checkpoint_key": key}
        results[key] = evaluate(config, str(teacher), work_dir=work_dir, options=chosen)
    assert results["teacher"] != results["student"]
    assert results["teacher"]["knn/k20_top1"] > 20
    wrong = options | {"model.backbone.arch": dict(ARCH, embed_dims=32)}
    with pytest.raises(CheckpointError, match="other shapes: backbone.cls_token"):
        evaluate(config, str(teacher), work_dir=str(tmp_path / "wrong"), options=wrong)


def test_linear_probe_trains_its_head_alone(teacher: Path, tmp_path: Path) -> None:
    options = small(
        **{
            "model.head.in_channels": 16,
            "model.head.n_last_blocks": 2,
            "train_dataloader.dataset.data_root": "nowhere",
            "train_dataloader.dataset.subset": 512,
            "val_dataloader.dataset.data_root": "nowhere",
            "val_dataloader.dataset.subset": 200,
            "train_cfg.max_epochs": 8,
            "load_from": str(teacher),
            "optim_wrapper.optimizer.lr": 0.2,
        }
    )
    config, work_dir = "configs/pwself/linear_cifar10.py", str(tmp_path / "run")
    train(config, work_dir=work_dir, options=options)
    saved = torch.load(tmp_path / "run/epoch_8.pth", weights_only=True)["state_dict"]
    before = torch.load(teacher, weights_only=True)["state_dict"]
    for key, value in saved.items():
        if key.startswith("backbone."):
            assert torch.equal(value, before[f"teacher.{key}"])
    assert saved["head.linear.weight"].shape == (10, 32)
    assert saved["head.linear.bias"].abs().max() > 1e-4
    options.pop("load_from")
    found = evaluate(config, work_dir, work_dir=str(tmp_path / "test"), options=options)
    assert found["accuracy/top5"] > 58  # half by chance
    # A classifier in a file of its own, as DINO publishes them.
    parts = {f"module.linear.{key}": saved[f"head.linear.{key}"] for key in ("weight", "bias")}
    torch.save(dict(state_dict=parts), tmp_path / "linear.pth")
    apart = options | {"model.head.checkpoint": str(tmp_path / "linear.pth")}
    again = evaluate(config, str(teacher), work_dir=str(tmp_path / "apart"), options=apart)
    assert again == found


def test_linear_probe_says_what_it_lacks(tmp_path: Path) -> None:
    options = small(
        **{
            "model.head.in_channels": 16,
            "model.head.n_last_blocks": 1,
            "val_evaluator.topk": (1, 5, 20),
            "train_dataloader.dataset.data_root": "nowhere",
            "train_dataloader.dataset.subset": 128,
            "val_dataloader.dataset.data_root": "nowhere",
            "val_dataloader.dataset.subset": 20,
            "train_cfg.max_epochs": 1,
            "train_cfg.val_interval": 1,
        }
    )
    config, too_large = "configs/pwself/linear_cifar10.py", {"train_dataloader.batch_size": 129}
    with pytest.raises(
        DataError, match="no batch: 128 images for 1 .* batch_size=129, drop_last=True"
    ):
        train(config, work_dir=str(tmp_path / "none"), options=options | too_large)
    assert not (tmp_path / "none").exists()
    found = train(config, work_dir=str(tmp_path), options=options)
    assert {key for key in found if "accuracy" in key} == {"accuracy/top1", "accuracy/top5"}
    assert len(list(tmp_path.glob("best_accuracy_top1_*.pth"))) == 1
    (log,) = tmp_path.glob("*/*.log")
    text = log.read_text()
    assert "the backbone of this probe has random weights" in text
    assert "topk=(1, 5) of (1, 5, 20), there are 10 classes" in text


def test_probe_features_interleave_class_token_and_mean() -> None:
    older, newest = (
        torch.tensor([[[1.0, 2.0], [9.0, 9.0], [9.0, 9.0]]]),
        torch.tensor([[[3.0, 4.0], [10.0, 20.0], [30.0, 40.0]]]),
    )
    features = TokenFeatures(tokens=newest, grid=(1, 2), extra=1, blocks=(older, newest))
    assert probe_features(features).tolist() == [[1, 2, 3, 4]]
    one = TokenFeatures(tokens=newest, grid=(1, 2), extra=1)
    assert probe_features(one, avgpool_patchtokens=True).tolist() == [[3, 20, 4, 30]]
    plain = TokenFeatures(tokens=newest, grid=(1, 3), extra=0)
    assert probe_features(plain)[0, 0].item() == pytest.approx(43 / 3)


def test_probe_of_timm_and_of_convolutions() -> None:
    pytest.importorskip("timm", reason="pip install timm")
    images = torch.randn(2, 3, 32, 32)
    kwargs = dict(img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2)
    vit = dict(type="TimmViTBackbone", model_name="vit_tiny_patch16_224", model_kwargs=kwargs)
    head = dict(type="LinearProbeHead", num_classes=4, in_channels=16, n_last_blocks=2)
    model = MODELS.build(dict(type="LinearProbeClassifier", backbone=vit, head=head))
    assert model(images).shape == (2, 4)
    features = model.extract(images)
    assert torch.equal(features.blocks[-1], features.tokens)
    assert not any(value.requires_grad for value in model.backbone.parameters())
    assert not model.train().backbone.training
    net = dict(type="TorchvisionBackbone", model_name="resnet18", output="map")
    with pytest.raises(ConfigError, match="gives its output only; use n_last_blocks=1"):
        MODELS.build(dict(type="LinearProbeClassifier", backbone=net, head=head))
    head = dict(type="LinearProbeHead", num_classes=4, in_channels=512)
    model = MODELS.build(dict(type="LinearProbeClassifier", backbone=net, head=head)).eval()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 4)
    sample = model(torch.randn(1, 3, 64, 64), [DataSample()], mode="predict")[0]
    assert sample.pred_score.sum().item() == pytest.approx(1)


def test_probe_refuses_what_the_official_script_cannot(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use n_last_blocks=1"):
        LinearProbeHead(10, 16, n_last_blocks=4, avgpool_patchtokens=True)
    head = dict(type="LinearProbeHead", num_classes=4, in_channels=16, n_last_blocks=3)
    with pytest.raises(ConfigError, match="the backbone has 2 blocks"):
        MODELS.build(dict(type="LinearProbeClassifier", backbone=VIT, head=head))
    torch.save({"linear.weight": torch.zeros(5, 16)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"linear.weight is \(5, 16\), expected \(10, 16\)"):
        LinearProbeHead(10, 16, checkpoint=str(tmp_path / "other.pth"))
    wide = LinearProbeHead(10, 16)
    tokens = TokenFeatures(tokens=torch.zeros(1, 2, 8), grid=(1, 1), extra=1)
    with pytest.raises(ConfigError, match="gives 8 features, the head reads 16"):
        wide(tokens)


@pytest.mark.ddp
def test_two_processes_find_what_one_does(tmp_path: Path, project_root: Path) -> None:
    options = {
        "test_dataloader.dataset.data_root": "nowhere",
        "test_dataloader.dataset.subset": 51,
        "test_cfg.bank_dataloader.dataset.data_root": "nowhere",
        "test_cfg.bank_dataloader.dataset.subset": 301,
        "test_cfg.cache": None,
    }
    config = "configs/pwself/knn_cifar10_pixels.py"
    expected = evaluate(config, work_dir=str(tmp_path / "one"), options=options)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = [f"{key}={value}" for key, value in options.items()]
    # The features of a cache are shared by the processes.
    flags[-1] = f"test_cfg.cache={tmp_path / 'cache'}"
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    test = ["tools/test.py", config, "--launcher", "pytorch", "--work-dir", str(tmp_path / "two")]
    done = subprocess.run(
        [sys.executable, *launch, *test, "--cfg-options", *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=project_root,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, value in expected.items():
        assert f"{name}: {value:.4f}" in done.stdout + done.stderr
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2


def test_benchmark_compares_equal_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    from patchreg.benchmarks import knn

    for name, value in (("QUERIES", 40), ("BANK", 3000), ("WIDTH", 32), ("CLASSES", 20)):
        monkeypatch.setattr(knn, name, value)
    rows = {row["metric"]: row for row in benchmarks.run("knn", "cpu")}
    assert rows["one pass, float32, top-1 differs by at most"]["value"] < 1e-9
    assert rows["one pass, bfloat16, top-1 differs by at most"]["value"] <= 5
    assert rows["one pass, float32, times faster than the loop"]["goal"] == 4.5
    assert rows["one pass, bfloat16, times faster than the loop"]["goal"] == 9.0
    beside = rows.get("one pass, float32, beside faiss Flat, four searches")
    assert beside is None or beside["ratio"] == pytest.approx(beside["value"] / beside["baseline"])


@pytest.mark.slow
def test_pixels_of_cifar10(tmp_path: Path) -> None:
    if not Path("data/cifar10").is_dir():
        pytest.skip("python tools/prepare_data.py cifar10")
    metrics = evaluate(
        "configs/pwself/knn_cifar10_pixels.py",
        work_dir=str(tmp_path / "run"),
        options={"test_cfg.cache": None},
    )
    assert metrics["knn/k20_top1"] == pytest.approx(45.67, abs=0.05)
