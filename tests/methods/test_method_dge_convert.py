"""Conversion of checkpoints: round trips, warm starts, reports, and what is refused in which words."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dge_helpers import classifier, error, force_choice, spread_routers
from golden_reader import load
from mmengine.config import Config
from safetensors.torch import save_file
from torch import Tensor, nn

from patchreg.methods.dge import convert as converter
from patchreg.methods.dge.convert import convert, merge_qkv, to_official
from patchreg.registry import MODELS
from patchreg.runner.convert import convert_file, converters, summary
from patchreg.utils.errors import CheckpointError, ConfigError, MissingFileError
from patchreg.utils.weights import load_file, load_weights

ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS = dict(model="deit_dge_s124_tiny_patch16_256", lr=5e-4, opt_betas=None, drop=(0.0, 0.1))


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check that two state dicts agree in keys, their order, types and every bit."""
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


def official_file(state: dict[str, Tensor], path: Path, **entries: Any) -> Path:
    """Write a checkpoint as vtpack's main.py does."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(3))])
    checkpoint = dict(
        model=state,
        optimizer=optimizer.state_dict(),
        lr_scheduler=dict(base_values=[5e-4], noise_range_t=None),
        epoch=299,
        model_ema=None,
        scaler=dict(scale=65536.0),
        args=Namespace(**ARGUMENTS),
    )
    torch.save(checkpoint | entries, path)
    return path


def small_state(seed: int = 3) -> dict[str, Tensor]:
    """Official state dict of a small DeiT-DGE."""
    return to_official(spread_routers(classifier(), seed).state_dict())


def run(source: Path, out: Path, to: str, **options: Any) -> dict[str, Any]:
    return convert_file(converter, str(source), str(out), to, options=options)


def plain_model(**kwargs: Any) -> nn.Module:
    """The dense twin of the helpers' small classifier."""
    backbone = dict(
        type="VisionTransformerBackbone",
        arch=dict(embed_dims=24, depth=3, num_heads=3),
        img_size=64,
        patch_size=8,
        mlp_ratio=2,
    )
    head = dict(type="LinearHead", num_classes=10, in_channels=24)
    return MODELS.build(dict(type="PatchClassifier", backbone=backbone | kwargs, head=head))


def from_report(report: dict[str, Any], num_heads: int, **head: Any) -> nn.Module:
    """Build the model that a report describes; the number of heads is not in a checkpoint."""
    backbone = report["model"]["backbone"]
    if isinstance(backbone["arch"], dict):
        backbone["arch"]["num_heads"] = num_heads
    kind = "DGEClassifier" if "DGE" in backbone["type"] else "PatchClassifier"
    model = MODELS.build(dict(type=kind, backbone=backbone, head=report["model"]["head"] | head))
    return model.eval()


# ---- round trips ----


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        (f"{kind}deit_{size}", count)
        for kind, count in (("", 212), ("dense_", 152))
        for size in ("tiny", "small", "base")
    ],
)
def test_published_models_go_round_bit_exact(name, entries):
    config = Config.fromfile(str(ROOT / f"configs/dge/{name}.py")).model
    with torch.device("meta"):
        shapes = to_official(MODELS.build(config).state_dict())
    generator = torch.Generator().manual_seed(1)
    official = {
        key: torch.tensor([4, 2, 1])
        if key.endswith("splits")
        else torch.rand(value.shape, generator=generator)
        for key, value in shapes.items()
    }
    assert len(official) == entries
    kind = "plain" if "dense" in name else "official"
    ours, report = convert(dict(model=official, epoch=7), "x.pth", "ours")
    assert report["from"] == kind
    assert len(report["used"]) == entries
    assert report["model"]["backbone"]["arch"] == name.split("_")[-1]
    assert report["model"]["backbone"]["img_size"] == [256, 256]
    assert list(ours["state_dict"])[0] == "backbone.cls_token"
    assert list(ours["state_dict"])[-1] == "head.head.bias"
    with torch.device("meta"):
        model = MODELS.build(config)
    model.load_state_dict(ours["state_dict"], assign=True)
    back, report = convert(ours, "ours.pth", kind)
    assert report["from"] == "ours"
    same(back["model"], official)
    assert back["epoch"] == 7


@pytest.mark.parametrize(("dims", "hidden"), [(88, 120), (88, 240), (168, 408), (24, 48)])
def test_hidden_width_survives_its_ratio(dims, hidden):
    # 88 * (120 / 88) is a little less than 120.
    model = classifier(dims=dims, heads=2, mlp_ratio=hidden / dims)
    assert model.backbone.blocks[0].mlp.fc1.out_features == hidden
    state = to_official(model.state_dict())
    ours, report = convert(dict(model=state), "x.pth", "ours")
    again = from_report(report, num_heads=2)
    again.load_state_dict(ours["state_dict"])
    same(to_official(again.state_dict()), state)


def test_golden_model_goes_through_files_bit_exact(tmp_path):
    golden = load("dge", "model_deit_dge")
    state = golden.group("sd")
    source = official_file(state, tmp_path / "checkpoint.pth")
    with pytest.raises(CheckpointError, match=r"\(argparse\.Namespace\), and is not loaded"):
        load_file(source)
    report = run(source, tmp_path / "ours.pth", "ours")
    assert report["not_carried"] == ["optimizer", "lr_scheduler", "model_ema", "scaler"]
    ours = load_file(tmp_path / "ours.pth")
    assert ours["meta"]["official"] == dict(epoch=299, args=ARGUMENTS)
    model = classifier()
    model.load_state_dict(ours["state_dict"])
    with torch.no_grad():
        logits = model.eval()(golden["images"])
    assert error(logits, golden["eval/logits"]) < 1e-5
    run(tmp_path / "ours.pth", tmp_path / "back.pth", "official")
    back = load_file(tmp_path / "back.pth")
    same(back["model"], state)
    assert back["model"]["blocks.0.dge.splits"].dtype == torch.int64
    assert (back["epoch"], back["args"]) == (299, ARGUMENTS)
    assert set(back) == {"model", "epoch", "args"}


def test_distilled_model_keeps_the_order_of_its_file(tmp_path):
    model = classifier(dist_token=True, head_distilled=True, splits=(2, 1))
    state = to_official(spread_routers(model).state_dict())
    order = ["cls_token", "pos_embed", "dist_token"]
    state = {key: state[key] for key in [*order, *(key for key in state if key not in order)]}
    source = official_file(state, tmp_path / "a.pth")
    report = run(source, tmp_path / "b.pth", "ours")
    assert report["model"]["head"]["distilled"]
    from_report(report, 3).load_state_dict(load_weights(tmp_path / "b.pth"))
    run(tmp_path / "b.pth", tmp_path / "c.pth", "official")
    same(load_weights(tmp_path / "c.pth"), state)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_detector_backbone_keeps_the_other_entries_and_comes_back(tmp_path, suffix):
    state = small_state()
    source = official_file(state, tmp_path / "a.pth", model_ema=dict(state))
    out = tmp_path / f"b{suffix}"
    report = run(source, out, "backbone")
    prefixed = {f"backbone.bottom_up.model.{key}": value for key, value in state.items()}
    written = load_file(out)
    if suffix == ".pth":
        same(written["model"], prefixed)
        assert list(written) == [
            "model",
            *(k for k in load_file(source, allowed=[Namespace]) if k != "model"),
        ]
        assert written["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)
        assert written["args"] == ARGUMENTS
        same(written["model_ema"], state)
        assert report["not_carried"] == []
    else:
        assert set(written) == set(prefixed)
        assert "optimizer" in report["not_carried"]
    report = run(out, tmp_path / "c.pth", "official")
    assert report["from"] == "backbone"
    back = load_weights(tmp_path / "c.pth")
    same({key: back[key] for key in state}, state)
    assert len(back) == len(state)

    run(source, tmp_path / "d.pth", "backbone", prefix="net.")
    assert "net.blocks.0.dge.splits" in load_weights(tmp_path / "d.pth")
    detector = load_weights(tmp_path / "d.pth") | {"roi.fc.weight": torch.zeros(2)}
    torch.save(detector, tmp_path / "e.pth")
    report = run(tmp_path / "e.pth", tmp_path / "f.pth", "official")
    assert report["unexpected"] == ["roi.fc.weight"]
    same(load_weights(tmp_path / "f.pth"), state)


def test_average_is_taken_on_request_with_the_true_splits(tmp_path):
    state = small_state()
    average = {
        key: value * 0.5 if value.is_floating_point() else value - 1 for key, value in state.items()
    }
    source = official_file(state, tmp_path / "a.pth", model_ema=average)
    report = run(source, tmp_path / "b.pth", "official", ema=True)
    assert report["changed"][0] == "blocks.0.dge.splits: [3, 1, 0] -> [4, 2, 1], as in 'model'"
    assert len(report["changed"]) == 3
    expected = {key: state[key] if "splits" in key else average[key] for key in state}
    same(load_weights(tmp_path / "b.pth"), expected)
    run(source, tmp_path / "c.pth", "official")
    same(load_weights(tmp_path / "c.pth"), state)


def test_checkpoint_of_a_run_gives_what_it_evaluates():
    state = spread_routers(classifier()).state_dict()
    trained = {f"module.{key}": value for key, value in state.items()}
    run_state = dict(meta=dict(epoch=3, iter=9), state_dict=state, optimizer={}, message_hub={})
    checkpoint, report = convert(run_state | dict(ema_state_dict=trained), "last.pth", "official")
    assert set(checkpoint) == {"model"}
    same(checkpoint["model"], to_official(state))
    assert report["not_carried"] == ["optimizer", "message_hub", "ema_state_dict"]


# ---- plain DeiT and DGE ----


def test_plain_and_dge_convert_both_ways(tmp_path):
    plain = spread_routers(plain_model()).eval()
    torch.save(dict(state_dict=plain.state_dict()), tmp_path / "plain.pth")
    report = run(tmp_path / "plain.pth", tmp_path / "dge.pth", "ours", splits=[4, 2, 1])
    assert len(report["made"]) == 9
    assert report["made"][:3] == [
        "blocks.0.dge.splits",
        "blocks.0.dge.router.gate.weight",
        "blocks.0.dge.router.gate.bias",
    ]
    assert report["used"] == list(plain.state_dict())
    state = load_weights(tmp_path / "dge.pth")
    model = classifier().eval()
    model.load_state_dict(state)
    assert list(state) == list(model.state_dict())
    block = "blocks.1.attn"
    qkv = plain.state_dict()[f"backbone.{block}.qkv.weight"]
    assert torch.equal(state[f"backbone.{block}.q.weight"], qkv[:24])
    assert torch.equal(state[f"backbone.{block}.kv.weight"], qkv[24:])
    bias = state["backbone.blocks.2.dge.router.gate.bias"]
    first = 0.5 * math.log(0.95 * 2 / 0.05)
    assert bias.tolist() == pytest.approx([first, -first, -first])

    images = torch.randn(2, 3, 64, 64)
    force_choice(model, 0)
    with torch.no_grad():
        assert error(model(images), plain(images)) < 1e-5
        force_choice(model, 2)
        assert error(model(images), plain(images)) > 1e-2

    report = run(tmp_path / "dge.pth", tmp_path / "back.pth", "plain")
    assert len(report["dropped"]) == 9
    assert report["dropped"][0] == "backbone.blocks.0.dge.splits"
    assert report["made"] == []
    same(load_weights(tmp_path / "back.pth"), to_official(plain.state_dict()))


def test_routers_are_drawn_from_the_seed_alone():
    state = to_official(plain_model().state_dict())
    gate = "blocks.1.dge.router.gate.weight"
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (
        convert(dict(model=state), "x", "official", splits=(2, 1), seed=seed)[0]["model"][gate]
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (2, 24)
    assert 0.005 < float(first.std()) < 0.02
    half = {key: value.half() for key, value in state.items()}
    drawn = convert(dict(model=half), "x", "official", splits=(2, 1))[0]["model"]
    assert drawn[gate].dtype == torch.float16
    assert drawn["blocks.0.dge.splits"].dtype == torch.int64


# ---- timm ----


def timm_model(name: str, **kwargs: Any) -> nn.Module:
    import timm

    return spread_routers(timm.create_model(name, pretrained=False, **kwargs)).eval()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_warm_start_from_timm_gives_the_same_logits(tmp_path, name, suffix):
    theirs = timm_model(name, depth=4, num_classes=20)
    source = tmp_path / f"timm{suffix}"
    if suffix == ".pth":
        torch.save(theirs.state_dict(), source)
    else:
        save_file(theirs.state_dict(), source)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = theirs(images)
    report = run(source, tmp_path / "plain.pth", "ours")
    assert (report["from"], report["unexpected"], report["missing"]) == ("plain", [], [])
    plain = from_report(report, 3)
    plain.load_state_dict(load_weights(tmp_path / "plain.pth"))
    report = run(source, tmp_path / "dge.pth", "ours", splits=[4, 2, 1])
    assert report["model"]["backbone"]["region_padding"]
    dge = from_report(report, 3)
    dge.load_state_dict(load_weights(tmp_path / "dge.pth"))
    force_choice(dge, 0)
    with torch.no_grad():
        assert error(plain(images), expected) < 1e-5
        assert error(dge(images), expected) < 1e-5
    run(tmp_path / "dge.pth", tmp_path / "back.pth", "plain")
    back = load_weights(tmp_path / "back.pth")
    same({key: back[key] for key in theirs.state_dict()}, dict(theirs.state_dict()))


def test_position_embedding_and_head_are_fitted_on_request(tmp_path):
    theirs = timm_model("deit_tiny_distilled_patch16_224", depth=2, num_classes=20)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    report = run(
        tmp_path / "timm.pth",
        tmp_path / "b.pth",
        "ours",
        img_size=[256, 320],
        num_classes=7,
        new_head=True,
    )
    heads = ["head.weight", "head.bias", "head_dist.weight", "head_dist.bias"]
    assert report["changed"] == ["pos_embed: 14 x 14 -> 16 x 20 cells, bicubic"]
    assert report["made"] == heads
    assert report["dropped"] == heads
    assert not set(heads) & set(report["used"])
    state = load_weights(tmp_path / "b.pth")
    old = theirs.state_dict()["pos_embed"]
    cells = old[:, 2:].reshape(1, 14, 14, 192).permute(0, 3, 1, 2)
    cells = F.interpolate(cells, (16, 20), mode="bicubic", align_corners=False)
    expected = torch.cat((old[:, :2], cells.permute(0, 2, 3, 1).flatten(1, 2)), 1)
    assert torch.equal(state["backbone.pos_embed"], expected)
    assert state["head.head_dist.weight"].shape == (7, 192)
    assert state["head.head.bias"].tolist() == [0.0] * 7
    assert 0.015 < float(state["head.head.weight"].std()) < 0.025
    model = from_report(report, 3)
    model.load_state_dict(state)
    assert model(torch.randn(1, 3, 256, 320)).shape == (1, 7)


def test_checkpoint_without_a_head_gets_one_only_on_request(tmp_path):
    theirs = timm_model("vit_tiny_patch16_224", depth=2, num_classes=0)
    torch.save(theirs.state_dict() | {"head.mlp.weight": torch.zeros(2)}, tmp_path / "timm.pth")
    report = run(tmp_path / "timm.pth", tmp_path / "a.pth", "ours")
    assert report["missing"] == ["head.weight", "head.bias"]
    assert report["unexpected"] == ["head.mlp.weight"]
    assert all(key.startswith("backbone.") for key in load_weights(tmp_path / "a.pth"))
    report = run(tmp_path / "timm.pth", tmp_path / "b.pth", "ours", num_classes=5)
    assert (report["missing"], report["made"]) == ([], ["head.weight", "head.bias"])
    from_report(report, 3).load_state_dict(load_weights(tmp_path / "b.pth"))


def test_grid_that_is_not_square_is_left_alone_and_named(tmp_path):
    state = plain_model(img_size=(64, 96)).state_dict()
    torch.save(state, tmp_path / "a.pth")
    report = run(tmp_path / "a.pth", tmp_path / "b.pth", "plain")
    assert report["changed"] == [
        "pos_embed is for no square grid: set img_size of the model by hand"
    ]
    report = run(tmp_path / "a.pth", tmp_path / "c.pth", "plain", img_size=[64, 96])
    assert report["changed"] == []
    assert report["model"]["backbone"]["img_size"] == [64, 96]
    same(load_weights(tmp_path / "c.pth"), to_official(state))
    with pytest.raises(CheckpointError, match=r"has 96 cells, which is no square"):
        run(tmp_path / "a.pth", tmp_path / "d.pth", "plain", img_size=[64])


# ---- refusals ----


class Intruder:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


@pytest.mark.parametrize("place", ["args", "inside args", "model", "alone"])
def test_code_in_a_pickle_does_not_run(tmp_path, place):
    intruder = Intruder(tmp_path / "ran")
    source = tmp_path / "a.pth"
    if place == "alone":
        torch.save(intruder, source)
    else:
        value = {"inside args": Namespace(x=intruder), "model": {"a": intruder}}.get(
            place, intruder
        )
        official_file(small_state(), source, **{place.split()[-1]: value})
    with pytest.raises(CheckpointError, match=r"\(.*open\), and is not loaded because unpickling"):
        run(source, tmp_path / "b.pth", "ours")
    assert [item.name for item in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize("zipped", [True, False])
def test_cut_off_file_is_refused_wherever_it_ends(tmp_path, zipped):
    checkpoint = dict(model=small_state(), args=Namespace(**ARGUMENTS))
    torch.save(checkpoint, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "a.pth").read_bytes()
    run(tmp_path / "a.pth", tmp_path / "b.pth", "ours")
    same(to_official(load_weights(tmp_path / "b.pth")), checkpoint["model"])
    cut = tmp_path / "cut.pth"
    places = [len(whole) * 9 // 10, *range(0, 4000, 211 if zipped else 17)]
    for place in places:
        cut.write_bytes(whole[:place])
        with pytest.raises(CheckpointError, match=r"cut\.pth"):
            run(cut, tmp_path / "c.pth", "ours")
    cut.write_bytes(whole[: len(whole) * 9 // 10])
    with pytest.raises(CheckpointError, match=r"it is truncated or was not written by torch\.save"):
        run(cut, tmp_path / "c.pth", "ours")
    assert not (tmp_path / "c.pth").exists()
    save_file(small_state(), tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) * 9 // 10])
    with pytest.raises(CheckpointError, match=r"may be truncated"):
        run(tmp_path / "cut.safetensors", tmp_path / "c.pth", "ours")


def without(state: dict[str, Tensor], *parts: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not any(part in key for part in parts)}


RESNET = {"conv1.weight": torch.zeros(2, 3, 7, 7), "layer1.0.bn1.weight": torch.zeros(2)}
EXTRA = {"reg_token": torch.zeros(1, 4, 24), "blocks.0.ls1.gamma": torch.zeros(24)}
OTHER_SPLITS = {"blocks.1.dge.splits": torch.tensor([4, 2, 2])}
SHAPE = {"blocks.1.mlp.fc1.bias": torch.zeros(3)}
TWO = {"teacher.patch_embed.proj.weight": torch.zeros(24, 3, 8, 8)}
GATE = {f"blocks.{index}.dge.splits": torch.tensor([4, 2]) for index in range(3)}
REFUSED = {
    "another model": (RESNET, {}, r"no DeiT or DeiT-DGE: .*found conv1\.weight, layer1\.0\.bn1"),
    "two models": (lambda s: s | TWO, {}, r"not in the model: teacher\.patch_embed\.proj\.weight$"),
    "no weights": ({"a": torch.zeros(1)}, {}, r"no DeiT or DeiT-DGE"),
    "no embedding": (lambda s: without(s, "pos_embed"), {}, r"check pos_embed"),
    "missing": (
        lambda s: without(s, "blocks.1.mlp"),
        {},
        r"no complete DGEVisionTransformer .*missing: blocks\.1\.mlp\.fc1\.weight, .*fc2\.bias$",
    ),
    "missing block": (
        lambda s: without(s, "blocks.1."),
        {},
        r"missing: blocks\.1\.norm1.* and 13 more$",
    ),
    "foreign": (
        lambda s: s | EXTRA,
        {},
        r"not in the model: reg_token, blocks\.0\.ls1\.gamma$",
    ),
    "shape": (lambda s: s | SHAPE, {}, r"blocks\.1\.mlp\.fc1\.bias is \(3,\) instead of \(48,\)"),
    "no splits": (lambda s: without(s, "splits"), {}, r"has 0 different splits"),
    "mixed splits": (
        lambda s: s | OTHER_SPLITS,
        {},
        r"has 2 different splits \[\(4, 2, 1\), \(4, 2, 2\)\]",
    ),
    "splits of the gate": (
        lambda s: s | GATE,
        {},
        r"gate\.weight is \(3, 24\) instead of \(2, 24\)",
    ),
    "splits wanted": (
        lambda s: s,
        dict(splits=[2, 1]),
        r"routers for splits \[4, 2, 1\], --splits asks for \[2, 1\].*--to plain",
    ),
    "classes": (
        lambda s: s,
        dict(num_classes=7),
        r"head for 10 classes, --num-classes asks for 7; give --new-head",
    ),
    "average": (lambda s: s, dict(ema=True), r"holds no average \(model_ema\)"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_weights_that_do_not_fit_are_refused(tmp_path, case):
    change, options, message = REFUSED[case]
    state = change if isinstance(change, dict) else change(small_state())
    source = official_file(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        run(source, tmp_path / "b.pth", "ours", **options)
    assert [item.name for item in tmp_path.iterdir()] == ["a.pth"]


MISUSED = {
    "prefix": ("ours", dict(prefix="x."), r"--prefix is for --to backbone, not for --to ours"),
    "routers": ("plain", dict(splits=[2, 1]), r"--splits adds routers, which --to plain drops"),
    "head": ("ours", dict(new_head=True), r"--new-head needs --num-classes"),
    "classes": ("ours", dict(num_classes=0), r"--num-classes 0: expected 1 or more"),
    "size": ("ours", dict(img_size=[60]), r"--img-size 60: expected one or two multiples of 8"),
    "sizes": ("ours", dict(img_size=[64] * 3), r"--img-size 64 64 64: expected one or two"),
    "splits": ("ours", dict(splits=[4, 3]), r"splits=\[4, 3\]: 3 does not divide the region 4"),
}


@pytest.mark.parametrize("case", list(MISUSED))
def test_options_that_do_not_fit_are_refused(tmp_path, case):
    to, options, message = MISUSED[case]
    source = official_file(small_state(), tmp_path / "a.pth")
    with pytest.raises(ConfigError, match=message):
        run(source, tmp_path / "b.pth", to, **options)


def test_matching_splits_and_classes_are_accepted(tmp_path):
    state = small_state()
    source = official_file(state, tmp_path / "a.pth")
    report = run(source, tmp_path / "b.pth", "official", splits=[4, 2, 1], num_classes=10)
    assert (report["made"], report["dropped"]) == ([], [])
    same(load_weights(tmp_path / "b.pth"), state)
    with pytest.raises(ConfigError, match=r"--from plain, but '.*' has the layout 'official'"):
        convert(load_file(source, allowed=[Namespace]), "a.pth", "ours", "plain")


# ---- files, report, command line ----


def test_files_are_not_replaced_unless_asked(tmp_path):
    source = official_file(small_state(), tmp_path / "a.pth")
    out = tmp_path / "b.pth"
    out.write_text("mine")
    call = (converter, str(source), str(out), "ours")
    with pytest.raises(ConfigError, match=r"b\.pth' exists; .*--force"):
        convert_file(*call)
    assert out.read_text() == "mine"
    convert_file(*call, force=True)
    assert len(load_weights(out)) == 59
    report = tmp_path / "r.json"
    report.write_text("mine")
    with pytest.raises(ConfigError, match=r"r\.json' exists"):
        convert_file(
            converter, str(source), str(tmp_path / "c.pth"), "ours", report_path=str(report)
        )
    with pytest.raises(ConfigError, match=r"the folder of '.*no/c\.pth' does not exist"):
        convert_file(converter, str(source), str(tmp_path / "no/c.pth"), "ours")
    with pytest.raises(ConfigError, match="exists"):
        convert_file(converter, str(source), str(tmp_path), "ours", force=True)
    with pytest.raises(MissingFileError, match=r"nowhere\.pth' does not exist"):
        convert_file(converter, "nowhere.pth", str(tmp_path / "c.pth"), "ours")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.pth", "b.pth", "r.json"]


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    source = official_file(small_state(), tmp_path / "a.pth")

    def full(checkpoint: Any, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"b\.pth' cannot be written: .*No space left"):
        run(source, tmp_path / "b.pth", "ours")
    assert [item.name for item in tmp_path.iterdir()] == ["a.pth"]


def test_report_names_every_entry(tmp_path):
    state = small_state()
    source = official_file(state, tmp_path / "a.pth")
    path = tmp_path / "report.json"
    report = convert_file(
        converter, str(source), str(tmp_path / "b.pth"), "plain", report_path=str(path)
    )
    assert json.loads(path.read_text()) == report
    routers = [key for key in state if ".dge." in key]
    assert report["dropped"] == routers
    assert report["used"] == [key for key in state if key not in routers]
    text = summary(report)
    assert "(official) -> " in text
    assert "used           50  cls_token, pos_embed, patch_embed.proj.weight, ..." in text
    assert "not carried     4  optimizer, lr_scheduler, model_ema, ..." in text
    assert "backbone=dict(type='VisionTransformerBackbone'" in text
    assert len(merge_qkv(state)) == len(load_weights(tmp_path / "b.pth")) == 44


def test_methods_declare_their_converters():
    found = converters()
    assert found["dge"] is converter
    for name, module in found.items():
        # One changes the size of a checkpoint, all others its layout.
        assert name == "publish" or "ours" in module.LAYOUTS
        assert callable(module.convert)


def tool(cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools/convert.py"), *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_command_line(tmp_path):
    source = official_file(small_state(), tmp_path / "a.pth")
    done = tool(tmp_path, "dge", "a.pth", "b.pth", "--to", "ours", "--report", "r.json")
    assert done.returncode == 0, done.stderr
    assert "a.pth (official) -> b.pth (ours)" in done.stdout
    assert json.loads((tmp_path / "r.json").read_text())["to"] == "ours"
    done = tool(tmp_path, "dge", "--to", "backbone", "b.pth", "c.safetensors", "--prefix", "m.")
    assert done.returncode == 0, done.stderr
    assert "m.cls_token" in load_file(tmp_path / "c.safetensors")
    done = tool(tmp_path, "dge", "a.pth", "b.pth", "--to", "ours")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == (
        "error: 'b.pth' exists; choose another name, or replace it with --force"
    )
    source.write_bytes(source.read_bytes()[: source.stat().st_size * 9 // 10])
    done = tool(tmp_path, "dge", "a.pth", "d.pth", "--to", "ours", "--splits", "4", "2", "1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: 'a.pth' cannot be read as a checkpoint")
    assert "Traceback" not in done.stderr
    done = tool(tmp_path, "dgee", "a.pth", "d.pth", "--to", "ours")
    assert done.returncode == 2
    assert "invalid choice: 'dgee'" in done.stderr
    names = sorted(item.name for item in tmp_path.iterdir())
    assert names == ["a.pth", "b.pth", "c.safetensors", "r.json"]
