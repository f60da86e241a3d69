"""Features of frozen backbones: tokens, pooling, weights from any checkpoint, the loop and its cache."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope

from patchreg.metrics.features import FeatureSet
from patchreg.metrics.knn import KNNMetric
from patchreg.models.base import TokenFeatures
from patchreg.models.features import as_tokens, backbone_state, gem, pool_tokens
from patchreg.registry import MODELS
from patchreg.runner.build import resolve_checkpoint
from patchreg.runner.run import evaluate
from patchreg.utils.errors import CheckpointError, ConfigError, MissingFileError
from patchreg.utils.public_weights import PUBLIC_WEIGHTS
from patchreg.utils.weights import load_file

VIT = dict(
    type="VisionTransformerBackbone",
    arch=dict(embed_dims=8, depth=2, num_heads=2),
    img_size=32,
    patch_size=8,
    pos_resize="dino",
)
CONFIG = """
default_scope = "patchreg"
model = dict(type="FeatureExtractor", backbone={backbone}, pool="{pool}")
data_preprocessor = dict(
    type="ImagePreprocessor", mean=(125.307, 122.950, 113.866), std=(62.993, 62.089, 66.705)
)
_data = dict(
    batch_size=100,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="QuickStartDataset",
        data_root="nowhere",
        split="test",
        subset={queries},
        pipeline=[dict(type="mmpretrain.PackInputs")],
        test_mode=True,
    ),
)
test_dataloader = _data
test_cfg = dict(
    type="FeatureTestLoop",
    bank_dataloader=dict(_data, dataset=dict(_data["dataset"], split="train", subset=300)),
    cache={cache},
)
test_evaluator = dict(type="KNNMetric", ks=(1, 10, 1000), num_classes=10)
"""


@pytest.fixture(autouse=True)
def _scope() -> None:
    init_default_scope("patchreg")


def build(**kwargs: Any) -> Any:
    """A small extractor."""
    return MODELS.build(dict(type="FeatureExtractor", backbone=VIT, **kwargs))


def test_every_form_of_output_becomes_tokens() -> None:
    maps = torch.arange(24.0).view(1, 2, 3, 4)
    found = as_tokens((torch.zeros(1, 1, 1, 1), maps))
    assert found.grid == (3, 4)
    assert found.tokens[0, 5].tolist() == maps[0, :, 1, 1].tolist()
    assert as_tokens(torch.zeros(2, 5, 3)).extra == 1
    vectors = as_tokens(torch.ones(2, 7))
    assert vectors.tokens.shape == (2, 1, 7)
    assert pool_tokens(vectors).shape == (2, 7)
    with pytest.raises(ConfigError, match="returns dict; expected TokenFeatures"):
        as_tokens({})


def test_pools() -> None:
    tokens = torch.tensor([[[9.0, 9.0], [1.0, -1.0], [3.0, 2.0]]])
    features = TokenFeatures(tokens=tokens, grid=(1, 2), extra=1)
    power = ((1 + 81) / 2) ** 0.25
    assert pool_tokens(features, "auto").tolist() == [[9, 9]]
    assert pool_tokens(features, "mean").tolist() == [[2, 0.5]]
    assert pool_tokens(features, "flat").tolist() == [[1, -1, 3, 2]]
    both = pool_tokens(features, "cls_gem")[0].tolist()
    # Negative numbers count as 1e-6.
    assert both == pytest.approx([9, 9, power, 8**0.25], rel=1e-6)
    assert gem(tokens[:, 1:], power=1)[0, 0].item() == pytest.approx(2)
    no_class = TokenFeatures(tokens=tokens, grid=(1, 3), extra=0)
    assert pool_tokens(no_class, "auto").tolist() == [
        [pytest.approx(13 / 3), pytest.approx(10 / 3)]
    ]
    with pytest.raises(ConfigError, match="no class token"):
        pool_tokens(no_class, "cls")
    with pytest.raises(ConfigError, match="pool='max' is unknown"):
        pool_tokens(features, "max")


def test_several_scales_do_not_mix_the_images_of_a_batch() -> None:
    model = build(scales=(1.0, 0.5))
    images = torch.randn(3, 3, 32, 32) * torch.tensor([1.0, 5.0, 0.2]).view(3, 1, 1, 1)
    together = model(images)
    alone = torch.cat([model(image[None]) for image in images])
    assert torch.allclose(together, alone, atol=1e-6)
    assert torch.allclose(together.norm(dim=1), torch.ones(3))


def test_weights_are_found_in_every_layout(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = build()
    teacher = {key: torch.randn_like(value) for key, value in model.backbone.state_dict().items()}
    student = {key: value + 1 for key, value in teacher.items()}

    def under(prefix: str, state: dict) -> dict:
        return {f"{prefix}{key}": value for key, value in state.items()}

    both = under("teacher.backbone.", teacher) | under("student.backbone.", student)
    both["student.head.weight"] = torch.zeros(3)
    official = dict(
        student=under("module.backbone.", student),
        teacher=under("backbone.", teacher) | {"head.last": torch.zeros(2)},
        args=argparse.Namespace(arch="vit_small"),
        epoch=3,
    )
    files = {
        "ours": dict(state_dict=both, meta=dict(epoch=1)),
        "official": official,
        "bare": teacher,
        "classifier": dict(state_dict=under("backbone.", teacher)),
        "parallel": under("module.", teacher),
    }
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
        found = backbone_state(model.backbone, tmp_path / f"{name}.pth", "teacher")
        assert all(torch.equal(found[key], teacher[key]) for key in teacher), name
        assert set(found) == set(teacher)
    for name in ("ours", "official"):
        found = backbone_state(model.backbone, tmp_path / f"{name}.pth", "student")
        assert all(torch.equal(found[key], student[key]) for key in student), name
    deeper = teacher | {"blocks.2.norm1.weight": torch.zeros(8), "head.weight": torch.zeros(2)}
    for name, content in (("bare", deeper), ("ours", under("teacher.backbone.", deeper))):
        torch.save(dict(state_dict=content), tmp_path / f"deeper_{name}.pth")
        with pytest.raises(
            CheckpointError, match=r"more blocks .* blocks\.2\.norm1\.weight, \.\.\."
        ):
            backbone_state(model.backbone, tmp_path / f"deeper_{name}.pth", "teacher")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(
        CheckpointError, match="no weight of the backbone VisionTransformerBackbone"
    ):
        backbone_state(model.backbone, tmp_path / "other.pth")


def test_a_library_file_fits_a_wrapped_model(tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="pip install torchvision")
    from torchvision.models import resnet18

    net = resnet18()
    torch.save(net.state_dict(), tmp_path / "resnet18.pth")
    backbone = dict(type="TorchvisionBackbone", model_name="resnet18", output="tokens")
    model = MODELS.build(dict(type="FeatureExtractor", backbone=backbone, pool="mean"))
    state = model.read_checkpoint(tmp_path / "resnet18.pth")["state_dict"]
    model.load_state_dict(state, strict=True)
    images = torch.randn(2, 3, 64, 64)
    net.eval().fc = torch.nn.Identity()
    assert torch.allclose(model(images), net(images), atol=1e-5)


def write_config(path: Path, **values: Any) -> str:
    """A config of a k-NN evaluation on the embedded data."""
    usual = dict(backbone=dict(type="PixelBackbone"), pool="auto", cache=None, queries=7)
    path.write_text(CONFIG.format(**(usual | values)))
    return str(path)


def test_loop_evaluates_seven_images_with_more_neighbours_than_images(tmp_path: Path) -> None:
    config = write_config(tmp_path / "knn.py", pool="auto")
    metrics = evaluate(config, work_dir=str(tmp_path / "run"))
    assert set(metrics) == {f"knn/k{k}_top{n}" for k in (1, 10, 1000) for n in (1, 5)}
    # One neighbour votes for one class.
    assert metrics["knn/k1_top1"] == metrics["knn/k1_top5"]
    assert metrics["knn/k10_top5"] >= metrics["knn/k10_top1"]
    assert all(round(value * 7 / 100, 6).is_integer() for value in metrics.values())


def test_cache_is_used_for_the_same_model_and_data_only(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    options = dict(cache=repr(str(cache)), queries=50, backbone=VIT)
    config = write_config(tmp_path / "knn.py", **options)
    first = evaluate(config, work_dir=str(tmp_path / "a"), seed=0)
    files = sorted(cache.glob("*.npy"))
    assert len(files) == 2
    stamps = [file.stat().st_mtime_ns for file in files]
    assert evaluate(config, work_dir=str(tmp_path / "b"), seed=0) == first
    assert [file.stat().st_mtime_ns for file in files] == stamps
    # Other weights, another pool, other data: new features each time.
    evaluate(config, work_dir=str(tmp_path / "c"), seed=1)
    assert len(list(cache.glob("*.npy"))) == 4
    evaluate(
        write_config(tmp_path / "mean.py", **options | dict(pool="mean")),
        work_dir=str(tmp_path / "d"),
        seed=0,
    )
    assert len(list(cache.glob("*.npy"))) == 6
    evaluate(
        write_config(tmp_path / "more.py", **options | dict(queries=51)),
        work_dir=str(tmp_path / "e"),
        seed=0,
    )
    assert len(list(cache.glob("*.npy"))) == 7, "the bank is the same"
    # The same weights, read by another number of heads or at another scale.
    for name, more in (
        ("heads", dict(backbone=VIT | dict(arch=VIT["arch"] | dict(num_heads=4)))),
        ("resize", dict(backbone=VIT | dict(pos_resize="size"))),
    ):
        before = len(list(cache.glob("*.npy")))
        config = write_config(tmp_path / f"{name}.py", **options | more)
        evaluate(config, work_dir=str(tmp_path / name), seed=0)
        assert len(list(cache.glob("*.npy"))) == before + 2, name
    assert not list(cache.glob(".*"))


def test_loop_says_what_it_cannot_use(tmp_path: Path) -> None:
    config = write_config(tmp_path / "knn.py")
    text = Path(config).read_text()
    Path(config).write_text(
        text.replace('type="KNNMetric", ks=(1, 10, 1000), num_classes=10', 'type="CostMetric"')
    )
    with pytest.raises(ConfigError, match="CostMetric does not measure features"):
        evaluate(config, work_dir=str(tmp_path / "run"))
    Path(config).write_text(
        text.replace(
            '    bank_dataloader=dict(_data, dataset=dict(_data["dataset"], split="train", subset=300)),\n',
            "",
        )
    )
    with pytest.raises(ConfigError, match="give test_cfg.bank_dataloader"):
        evaluate(config, work_dir=str(tmp_path / "run"))
    Path(config).write_text(
        text.replace(
            'test_cfg = dict(\n    type="FeatureTestLoop",\n    bank_dataloader=dict(_data,',
            'test_cfg = dict(\n    type="FeatureTestLoop",\n    bank_dataloader=dict(_data, batchsize=3,',
        )
    )
    with pytest.raises(ConfigError, match="no argument 'batchsize'. Did you mean 'batch_size'"):
        evaluate(config, work_dir=str(tmp_path / "run"))


def test_metric_reads_a_mapped_bank(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bank, labels = torch.randn(500, 6), torch.randint(4, (500,))
    test, targets = torch.randn(90, 6), torch.randint(4, (90,))
    np.save(tmp_path / "bank.npy", bank.numpy())
    mapped = np.load(tmp_path / "bank.npy", mmap_mode="r")
    metric = KNNMetric(ks=(5, 20))
    sets = dict(test=FeatureSet(test, targets), bank=FeatureSet(bank, labels))
    direct = metric.report(sets)
    assert metric.report(sets | dict(bank=FeatureSet(mapped, labels))) == direct


def test_public_weights_have_names_addresses_and_places(tmp_path: Path) -> None:
    url = "https://dl.fbaipublicfiles.com/dino/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth"
    weights = PUBLIC_WEIGHTS["dino_vitb8"]
    assert (weights.url, weights.timm) == (url, "vit_base_patch8_224.dino")
    assert resolve_checkpoint("dino_vitb8") == "data/weights/dino_vitbase8_pretrain.pth"
    full = PUBLIC_WEIGHTS["dino_xcit_medium_24_p8_full"].url
    assert full.endswith("/dino_xcit_medium_24_p8_pretrain_full_checkpoint.pth")
    assert PUBLIC_WEIGHTS["dino_vits16_linear"].url.endswith("dino_deitsmall16_linearweights.pth")
    with pytest.raises(MissingFileError, match="download https://dl.fbaipublicfiles.com/dino/"):
        load_file("data/weights/dino_deitsmall8_pretrain.pth")
