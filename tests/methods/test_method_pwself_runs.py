"""Whole runs of PW-Self: several processes, killed and resumed, converted, pictured, benchmarked."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import Any

import ddp_parts
import launches
import numpy as np
import pytest
import torch
from PIL import Image

from patchreg.methods.pwself import convert, picture
from patchreg.registry import MODELS
from patchreg.runner.build import latest_checkpoint, load_config
from patchreg.runner.convert import convert_file, converters, summary
from patchreg.utils.errors import CheckpointError, ConfigError
from patchreg.utils.weights import load_file

SHORT = """
_base_ = ["{root}/configs/pwself/quick.py"]
custom_imports = dict(imports=["ddp_parts"])
model = dict(
    backbone=dict(
        arch=dict(embed_dims=32, depth=2, num_heads=2), patch_size=8, drop_path_rate=0.2
    ),
    head=dict(in_channels=32, out_dim=40, hidden_dim=24, bottleneck_dim=12),
)
train_dataloader = dict(
    batch_size=8,
    num_workers={workers},
    dataset=dict(
        data_root="nowhere",
        subset={images},
        pipeline=[
            dict(
                type="MultiView",
                source_size=32,
                views=[
                    dict(num=2, size=32, scale=(0.4, 1.0), blur=0.5, solarize=0.2),
                    dict(num=2, size=16, scale=(0.1, 0.4)),
                ],
            )
        ],
    ),
)
custom_hooks = [
    dict(type="FreezeLastLayerHook", epochs=1),
    dict(
        type="PWSelfTeacherHook",
        momentum=0.9,
        temperature=0.07,
        warmup_temperature=0.04,
        warmup_epochs={epochs},
    ),
    dict(type="RecordLossHook"),
]
default_hooks = dict(
    logger=dict(interval=1), checkpoint=dict(by_epoch=False, interval=3, max_keep_ckpts=2)
)
train_cfg = dict(max_epochs={epochs})
"""


def write(folder: Path, **values: int) -> Path:
    """Write the short configuration on the embedded data."""
    config = folder / "short.py"
    text = SHORT
    for key, value in values.items():
        text = text.replace("{" + key + "}", str(value))
    config.write_text(text.replace("{root}", str(launches.ROOT)))
    return config


# several processes

SHARED = {"train_dataloader.dataset.pipeline.0.geometry": "shared"}
FORMS: dict[str, dict[str, Any]] = {"per_image": {}, "shared": SHARED}


def jobs(config: Path, folder: Path, processes: int) -> list[dict[str, Any]]:
    """Three steps of the same global batch."""
    return [
        dict(
            path=str(config),
            work_dir=str(folder / name),
            options={"train_dataloader.batch_size": 8 // processes, **options},
        )
        for name, options in FORMS.items()
    ]


@pytest.mark.ddp
def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    config = write(tmp_path, workers=0, images=24, epochs=1)
    text = config.read_text()
    text += '\noptim_wrapper = dict(_delete_=True, type="OptimWrapper", '
    text += 'optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05), '
    text += 'clip_grad=dict(type="per_tensor", max_norm=0.3))\n'
    text += 'param_scheduler = []\nmodel["type"] = "DoublePWSelfPretrainer"\n'
    config.write_text(text)
    alone = jobs(config, tmp_path / "one", 1)
    ddp_parts.run_two(tmp_path, jobs(config, tmp_path / "two", 2), lambda: ddp_parts.run(alone))
    finals = {}
    for name in FORMS:
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        found, expected = ddp_parts.losses(two), ddp_parts.losses(one)
        assert len(expected) == 3
        assert (found - expected).abs().max() < 1e-8
        ours, theirs = (load_file(latest_checkpoint(path))["state_dict"] for path in (two, one))
        assert float(theirs["criterion.center"].abs().max()) > 1e-3
        for key, value in theirs.items():
            assert (ours[key] - value).abs().max() < 1e-8, key
        finals[name] = float(expected[0])
    assert finals["per_image"] != finals["shared"]


def test_killed_and_terminated_run_equals_the_whole_one(tmp_path: Path) -> None:
    config = write(tmp_path, workers=1, images=80, epochs=2)
    text = config.read_text().replace('custom_imports = dict(imports=["ddp_parts"])', "")
    config.write_text(text.replace('    dict(type="RecordLossHook"),\n', ""))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert launches.finish(launches.start(config, whole)) == 0
    for step, number, code in ((4, signal.SIGKILL, -9), (12, signal.SIGTERM, 143)):
        run = launches.start(config, parts, "--resume")
        assert launches.signal_after(run, parts, step, number) == code
    assert launches.finish(launches.start(config, parts, "--resume")) == 0
    ours, theirs = (load_file(latest_checkpoint(folder)) for folder in (parts, whole))
    assert ours["meta"]["iter"] == theirs["meta"]["iter"] == 20
    for key, value in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][key], value), key
    for key, state in theirs["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(ours["optimizer"]["state"][key][name], value)
    for mine, other in zip(
        ours["optimizer"]["param_groups"], theirs["optimizer"]["param_groups"], strict=True
    ):
        assert (mine["lr"], mine["weight_decay"]) == (other["lr"], other["weight_decay"])
    assert launches.scalars(parts) == launches.scalars(whole)


# converters


def checkpoint(tmp_path: Path, center_rank: int = 3) -> Path:
    """A file as the authors write it: weights, center, optimiser, arguments."""
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type="PWSelfPretrainer",
            backbone=dict(
                type="VisionTransformerBackbone",
                arch=dict(embed_dims=24, depth=2, num_heads=2),
                img_size=32,
                patch_size=8,
                pos_resize="dino",
            ),
            head=dict(
                type="ProjectionHead", in_channels=24, out_dim=20, hidden_dim=16, bottleneck_dim=8
            ),
            loss=dict(type="PWSelfLoss"),
        )
    )
    center = torch.randn(1, 17, 20) if center_rank == 3 else torch.randn(1, 20)
    saved = dict(
        student={f"module.{key}": value for key, value in model.student.state_dict().items()},
        teacher=dict(model.teacher.state_dict()),
        optimizer=dict(state={}, param_groups=[]),
        epoch=7,
        args=argparse.Namespace(arch="vit_small"),
        dino_loss=dict(center=center),
    )
    with torch.no_grad():
        for value in saved["teacher"].values():
            value.add_(0.5)
    path = tmp_path / "checkpoint.pth"
    torch.save(saved, path)
    return path


def run_convert(source: Path, out: Path, to: str, **options: Any) -> dict[str, Any]:
    return convert_file(converters()["pwself"], str(source), str(out), to, options=options)


def test_authors_checkpoint_goes_both_ways_bit_by_bit(tmp_path: Path) -> None:
    source = checkpoint(tmp_path)
    report = run_convert(source, tmp_path / "ours.pth", "ours")
    assert report["from"] == "official"
    assert report["missing"] == report["unexpected"] == report["changed"] == []
    assert sorted(report["not_carried"]) == ["args", "optimizer"]
    backbone, head = report["model"]["backbone"], report["model"]["head"]
    assert (backbone["img_size"], backbone["patch_size"]) == (32, 8)
    assert (head["out_dim"], head["norm_last_layer"]) == (20, True)
    original = load_file(source, allowed=[argparse.Namespace])
    ours = load_file(tmp_path / "ours.pth")["state_dict"]
    assert torch.equal(ours["criterion.center"], original["dino_loss"]["center"])
    model = MODELS.build(
        dict(
            type="PWSelfPretrainer",
            backbone=dict(backbone, arch=dict(backbone["arch"], num_heads=2)),
            head=head,
            loss=dict(type="PWSelfLoss"),
        )
    )
    model.load_state_dict(ours)
    run_convert(tmp_path / "ours.pth", tmp_path / "back.pth", "official")
    back = load_file(tmp_path / "back.pth")
    for part in ("student", "teacher"):
        assert back[part].keys() == original[part].keys()
        for key, value in original[part].items():
            assert torch.equal(back[part][key], value), key
    assert torch.equal(back["dino_loss"]["center"], original["dino_loss"]["center"])


@pytest.mark.parametrize(("mode", "tokens"), [("global", 1), ("cls_patch", 2)])
def test_official_layout_has_a_center_for_every_token(
    tmp_path: Path, mode: str, tokens: int
) -> None:
    source = checkpoint(tmp_path)
    run_convert(source, tmp_path / "ours.pth", "ours")
    ours = load_file(tmp_path / "ours.pth")
    ours["state_dict"]["criterion.center"] = center = torch.randn(1, tokens, 20)
    torch.save(ours, tmp_path / f"{mode}.pth")
    run_convert(tmp_path / f"{mode}.pth", tmp_path / "official.pth", "official")
    found = load_file(tmp_path / "official.pth")["dino_loss"]["center"]
    assert tuple(found.shape) == (1, 17, 20)
    assert torch.equal(found[0, 0], center[0, 0])
    assert torch.equal(found[0, 1:], center[0, -1].expand(16, 20))


def test_printed_config_says_what_a_file_cannot(tmp_path: Path) -> None:
    report = run_convert(checkpoint(tmp_path), tmp_path / "ours.pth", "ours")
    backbone = report["model"]["backbone"]
    assert backbone["arch"] == dict(embed_dims=24, depth=2, num_heads=None)
    assert (backbone["mlp_ratio"], backbone["qkv_bias"]) == (4.0, True)
    assert report["model"]["head"]["num_layers"] == 3
    assert "num_heads is not in a file: fill it in" in summary(report)
    with pytest.raises(ConfigError, match="expected whole numbers embed_dims, depth and num_heads"):
        MODELS.build(backbone)


def test_bare_backbone_goes_both_ways(tmp_path: Path) -> None:
    source = checkpoint(tmp_path)
    report = run_convert(source, tmp_path / "bare.pth", "backbone")
    assert len(report["dropped"]) == len(report["used"]) + 2 * 8 + 1
    bare = load_file(tmp_path / "bare.pth")
    original = load_file(source, allowed=[argparse.Namespace])
    assert torch.equal(bare["cls_token"], original["teacher"]["backbone.cls_token"])
    assert "blocks.1.mlp.fc2.bias" in bare
    run_convert(source, tmp_path / "student.pth", "backbone", branch="student")
    student = load_file(tmp_path / "student.pth")
    assert torch.equal(student["norm.bias"], original["student"]["module.backbone.norm.bias"])
    # timm's models have a classifier, which the student has not.
    torch.save({**bare, "head.weight": torch.zeros(2, 24)}, tmp_path / "timm.pth")
    report = run_convert(tmp_path / "timm.pth", tmp_path / "ours.pth", "ours")
    assert report["missing"] == ["student.head.*", "teacher.head.*", "criterion.center"]
    assert set(report["unexpected"]) == {"head.weight"}
    ours = load_file(tmp_path / "ours.pth")["state_dict"]
    for branch in ("student", "teacher"):
        assert torch.equal(ours[f"{branch}.backbone.pos_embed"], bare["pos_embed"])
    again = run_convert(tmp_path / "ours.pth", tmp_path / "again.safetensors", "backbone")
    assert again["unexpected"] == []
    loaded = load_file(tmp_path / "again.safetensors")
    assert loaded.keys() == bare.keys()
    assert all(torch.equal(loaded[key], value) for key, value in bare.items())


def test_dino_checkpoint_gets_a_center_for_every_token(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, center_rank=2)
    saved = load_file(source, allowed=[argparse.Namespace])
    for branch in ("student", "teacher"):
        names = {"weight_g": "original0", "weight_v": "original1"}
        saved[branch] = {
            key.replace(old, f"parametrizations.weight.{new}")
            if (old := key.split(".")[-1]) in names and (new := names[old])
            else key: value
            for key, value in saved[branch].items()
        }
    torch.save(saved, source)
    report = run_convert(source, tmp_path / "ours.pth", "ours")
    assert report["changed"] == ["center (1, 20) -> (1, 17, 20), the same for all tokens"]
    ours = load_file(tmp_path / "ours.pth")["state_dict"]
    center = ours["criterion.center"]
    assert torch.equal(center, saved["dino_loss"]["center"][:, None].expand(1, 17, 20))
    assert tuple(ours["teacher.head.last_layer.weight_g"].shape) == (20, 1)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match="no backbone of a ViT"):
        run_convert(tmp_path / "resnet.pth", tmp_path / "out.pth", "ours")
    source = checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="--branch"):
        run_convert(source, tmp_path / "out.pth", "ours", branch="student")
    run_convert(source, tmp_path / "bare.pth", "backbone")
    with pytest.raises(CheckpointError, match="no heads"):
        run_convert(tmp_path / "bare.pth", tmp_path / "out.pth", "official")
    with pytest.raises(ConfigError, match="layout 'backbone'"):
        convert_file(
            converters()["pwself"],
            str(tmp_path / "bare.pth"),
            str(tmp_path / "o.pth"),
            "ours",
            "ours",
        )
    assert set(convert.LAYOUTS) == {"ours", "official", "backbone"}


# picture


def test_picture_shows_and_prints_the_pairs(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    found = []
    for rule in ("published", "containment"):
        arguments = argparse.Namespace(
            image=str(tmp_path / "photo.png"),
            out=str(tmp_path / f"{rule}.png"),
            patch_size=16,
            pair="global-local",
            rule=rule,
            seed=1,
        )
        text = picture.run("matching", arguments)
        lines = text.splitlines()
        teacher, student = (line.split(": ")[1].split() for line in lines[1:3])
        assert teacher[0] == student[0] == "0"
        assert len(teacher) == len(student) == int(lines[0].split()[0]) > 10
        drawn = Image.open(tmp_path / f"{rule}.png")
        assert min(drawn.size) > 300
        found.append((teacher, student))
    assert found[0] != found[1]
    with pytest.raises(ConfigError, match="--patch-size 300"):
        picture.draw_matching(str(tmp_path / "photo.png"), str(tmp_path / "a.png"), 300)
    with pytest.raises(ConfigError, match="ending in"):
        picture.draw_matching(str(tmp_path / "photo.png"), str(tmp_path / "a.txt"))


# configurations


def test_every_flag_of_the_authors_reaches_its_part() -> None:
    """The table of the page: flag of the authors' command -> key of the configuration."""
    config = load_config(
        launches.ROOT / "configs/pwself/vit_small.py",
        {
            "model.backbone.arch": "base",
            "model.backbone.patch_size": 16,
            "model.head.out_dim": 1000,
            "model.head.norm_last_layer": False,
            "model.backbone.drop_path_rate": 0.2,
            "custom_hooks.2.momentum": 0.99,
            "custom_hooks.2.warmup_temperature": 0.03,
            "custom_hooks.2.temperature": 0.05,
            "custom_hooks.2.warmup_epochs": 5,
            "custom_hooks.1.epochs": 2,
            "optim_wrapper.optimizer.weight_decay": 0.05,
            "param_scheduler.1.final": 0.5,
            "optim_wrapper.clip_grad.max_norm": 1.0,
            "train_dataloader.batch_size": 12,
            "train_cfg.max_epochs": 50,
            "optim_wrapper.optimizer.lr": 1e-3,
            "param_scheduler.0.warmup": 5,
            "param_scheduler.0.final": 1e-5,
            "train_dataloader.dataset.pipeline.1.views.0.scale": [0.5, 1.0],
            "train_dataloader.dataset.pipeline.1.views.2.num": 4,
            "train_dataloader.dataset.pipeline.1.views.2.size": 64,
            "train_dataloader.dataset.data_root": "elsewhere",
            "default_hooks.checkpoint.interval": 20,
            "randomness.seed": 3,
            "train_dataloader.num_workers": 2,
        },
    )
    assert config.model.head.out_dim == 1000


# benchmark


def test_benchmark_compares_with_the_same_loss() -> None:
    from patchreg.benchmarks import pwself as benchmark
    from patchreg.methods.pwself.loss import PWSelfLoss
    from patchreg.methods.pwself.matching import match_batch, match_pair

    geometry = benchmark.geometry_of(2)
    tokens = [1 + (size[0] // benchmark.PATCH) ** 2 for size in geometry.sizes]
    assert tokens == [197] * 2 + [37] * 8
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(4, 197, 50, generator=generator, dtype=torch.float64)
    student = [
        torch.randn(4, 197, 50, generator=generator, dtype=torch.float64),
        torch.randn(16, 37, 50, generator=generator, dtype=torch.float64),
    ]
    plain = benchmark.PlainLoss(torch.zeros(1, 197, 50), match_pair, geometry)
    expected = plain(student, teacher)
    own = PWSelfLoss(50, 197).double()
    matches = match_batch(geometry, benchmark.PATCH)
    flat = torch.cat([part.flatten(0, 1) for part in student])[matches.rows]
    found = own(flat, torch.eye(50).double(), teacher, torch.eye(50).double(), matches)
    # The plain one takes log-probabilities in float32.
    assert found["loss_pwself"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(own.center.float(), plain.center, atol=1e-6)
