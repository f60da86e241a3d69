"""PatchGame in several processes, interrupted and resumed; its views; its use."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from golden_reader import load
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import init_default_scope
from patchgame_helpers import cases, error, filled, metadata, model_config, near, official_name
from test_method_patchgame_model import small
from torch import Tensor

from patchreg.losses.contrastive import ContrastiveLoss, Embedding, matching_accuracy
from patchreg.methods.patchgame.metric import PatchGameMatchMetric
from patchreg.models.heads.projection import ProjectionHead
from patchreg.models.selectors.rank import top_mask
from patchreg.registry import HOOKS, MODELS
from patchreg.runner import run as engine
from patchreg.transforms.multi_view import MultiView, ViewKind
from patchreg.utils.errors import ConfigError
from patchreg.utils.random import batch_random
from patchreg.utils.weights import load_file

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs/patchgame/quick.py")
SMALL = {
    "train_dataloader.dataset.data_root": "nowhere",
    "train_dataloader.dataset.subset": 40,
    "train_dataloader.batch_size": 8,
    "val_dataloader.dataset.data_root": "nowhere",
    "val_dataloader.dataset.indices": 24,
    "val_dataloader.batch_size": 8,
    "train_cfg.max_epochs": 2,
    "train_cfg.val_interval": 1,
    "default_hooks.checkpoint": dict(by_epoch=False, interval=3, max_keep_ckpts=9),
    "default_hooks.logger.interval": 1,
}


def _golden_rank(rank: int, world: int, place: str) -> None:
    init(rank, world, place)
    golden = load("patchgame", "contrastive")
    rows = len(golden["im_embed"]) // world
    mine = slice(rank * rows, (rank + 1) * rows)
    im, message = (golden[name][mine].clone().requires_grad_() for name in ("im_embed", "m_embed"))
    scale = golden["logit_scale"].clone().requires_grad_()
    loss, logits, target = ContrastiveLoss()(Embedding(im), Embedding(message), scale.exp())
    loss.backward()
    top1, top5 = matching_accuracy(logits, target)
    tag = f"world{world}.rank{rank}"
    found = dict(
        logits=logits,
        loss=loss,
        labels=target,
        grad_im=im.grad,
        grad_m=message.grad,
        grad_logit_scale=scale.grad,
        acc1=top1[None],
        acc5=top5[None],
    )
    for name, value in found.items():
        tolerance = (1e-3, 1e-3) if name.startswith("acc") else (1e-4, 1e-6)
        near(value, golden[f"{tag}.{name}"], *tolerance)
    finish()


def init(rank: int, world: int, place: str) -> None:
    """Join a gloo group of this test."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=world)


def finish() -> None:
    """Leave the group together: with torch 2.6 one that leaves first can keep another one waiting."""
    dist.barrier()
    dist.destroy_process_group()


def spawn(function: Any, world: int, *arguments: Any) -> None:
    """Run a function in several processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            function,
            args=(world, f"{folder}/group", *arguments),
            nprocs=world,
            start_method="spawn",
        )


@pytest.mark.ddp
def test_gathered_loss_golden() -> None:
    worlds = {
        int(name.split(".")[0][5:]) for name in load("patchgame", "contrastive") if ".rank" in name
    }
    assert 2 in worlds
    for world in sorted(worlds):
        spawn(_golden_rank, world)
        # Processes of their own read the numbers.
        golden = load("patchgame", "contrastive")
        assert all(
            golden[name] is not None for name in golden if name.startswith(f"world{world}.rank")
        )


def _sides(rows: slice) -> tuple[list[ProjectionHead], list[Tensor]]:
    torch.manual_seed(0)
    heads = [ProjectionHead(12, 50, False, 2, 16, 8).double() for _ in range(2)]
    x = [torch.randn(6, 12, dtype=torch.float64)[rows] for _ in range(2)]
    return heads, x


def _loss_and_gradients(gather: str, bottleneck: bool, rows: slice) -> tuple[Tensor, list[Tensor]]:
    heads, x = _sides(rows)
    sides = []
    for head, part in zip(heads, x, strict=True):
        narrow, weight = head.bottleneck(part), head.last_layer.weight()
        sides.append(Embedding(narrow @ weight.T, narrow, weight))
    scale = torch.tensor(14.0, dtype=torch.float64)
    loss, _, _ = ContrastiveLoss(gather, bottleneck)(*sides, scale)
    loss.backward()
    return loss.detach(), [value.grad for head in heads for value in head.parameters()]


def _equal_rank(rank: int, world: int, place: str) -> None:
    init(rank, world, place)
    rows = slice(rank * 6 // world, (rank + 1) * 6 // world)
    for gather in ("detached", "own", "full"):
        results = []
        for bottleneck in (False, True):
            loss, grads = _loss_and_gradients(gather, bottleneck, rows)
            for value in (loss, *grads):
                dist.all_reduce(value)
                value /= world
            results.append((loss, grads))
        for (loss, grads), (other, others) in zip(results[:1], results[1:]):
            assert error(other, loss) < 1e-9
            assert max(error(a, b) for a, b in zip(others, grads, strict=True)) < 1e-9
        if gather != "own":
            # The whole batch in one process, in which nothing is sent.
            expected = torch.load(f"{place}.{gather}")
            assert error(results[0][0], expected[0]) < 1e-9
            assert max(error(a, b) for a, b in zip(results[0][1], expected[1], strict=True)) < 1e-9
    finish()


@pytest.mark.ddp
@pytest.mark.parametrize("world", [2, 3])
def test_processes_compute_what_one_does_and_the_bottleneck_suffices(world: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = f"{folder}/group"
        for gather in ("detached", "full"):
            torch.save(_loss_and_gradients(gather, False, slice(0, 6)), f"{place}.{gather}")
        mp.start_processes(_equal_rank, args=(world, place), nprocs=world, start_method="spawn")


def _model_rank(rank: int, world: int, place: str) -> None:
    init(rank, world, place)
    torch.manual_seed(0)
    model = MODELS.build(small(drop_rate=0.3)).double().train()
    views = torch.load(f"{place}.views")
    batch_random.begin(seed=1, step=3, rank=rank, world=world)
    loss = model(views[:, rank::world].unbind(0), mode="loss")["loss_contrast"]
    loss.backward()
    expected = torch.load(f"{place}.expected")
    for name, value in model.named_parameters():
        if name in expected:
            dist.all_reduce(value.grad)
            # Draws are float32, so rows agree to that.
            assert error(value.grad / world, expected[name]) < 1e-5, name
    finish()


@pytest.mark.ddp
def test_two_processes_get_the_gradients_of_one() -> None:
    torch.manual_seed(0)
    model = MODELS.build(small(drop_rate=0.3)).double().train()
    views = torch.randn(2, 8, 3, 16, 16, dtype=torch.float64)
    batch_random.begin(seed=1, step=3)
    model(views.unbind(0), mode="loss")["loss_contrast"].backward()
    batch_random.end()
    bias = "sender.ranker.1.bias"
    grads = {
        name: value.grad
        for name, value in model.named_parameters()
        # Rounding alone: ranks do not change when all scores rise.
        if value.grad is not None and name != bias
    }
    with tempfile.TemporaryDirectory() as folder:
        place = f"{folder}/group"
        torch.save(views, f"{place}.views")
        torch.save(grads, f"{place}.expected")
        mp.start_processes(_model_rank, args=(2, place), nprocs=2, start_method="spawn")


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    engine.train(CONFIG, work_dir=str(tmp_path / "whole"), options=SMALL)
    (tmp_path / "cut").mkdir()
    shutil.copy(tmp_path / "whole/iter_3.pth", tmp_path / "cut/iter_3.pth")
    (tmp_path / "cut/last_checkpoint").write_text(str(tmp_path / "cut/iter_3.pth"))
    engine.train(CONFIG, work_dir=str(tmp_path / "cut"), resume="auto", options=SMALL)
    whole, cut = (
        load_file(tmp_path / name / "iter_9.pth")["state_dict"] for name in ("whole", "cut")
    )
    assert list(whole) == list(cut)
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    first = load_file(tmp_path / "whole/iter_3.pth")["state_dict"]
    last = "receiver.text_fc.last_layer.weight_v"
    start = MODELS.build(Config.fromfile(CONFIG).model).state_dict()
    # The first epoch has five steps: until then the last layers stand still.
    assert float(first[last].std()) == pytest.approx(float(start[last].std()), rel=0.05)
    assert not torch.equal(whole[last], first[last])
    for name in (
        "sender.pe_symbol",
        "sender.patch_symbol.cls_token",
        "sender.patch_rank.cls_token",
    ):
        assert torch.equal(whole[name], first[name])


def test_last_layers_are_frozen_for_one_epoch(tmp_path: Path) -> None:
    engine.train(
        CONFIG,
        work_dir=str(tmp_path),
        options={**SMALL, "default_hooks.checkpoint": dict(by_epoch=False, interval=1, max_keep_ckpts=9)},
    )  # fmt: skip
    states = {step: load_file(tmp_path / f"iter_{step}.pth")["state_dict"] for step in (2, 3, 5, 6)}
    for part in ("weight_g", "weight_v"):
        name = f"receiver.vision_fc.last_layer.{part}"
        assert torch.equal(states[2][name], states[5][name])
        assert not torch.equal(states[5][name], states[6][name])
    assert not torch.equal(states[2]["gumbel.logits.weight"], states[3]["gumbel.logits.weight"])


def test_other_optimisers_and_clipping(tmp_path: Path) -> None:
    options = {
        "optim_wrapper.optimizer": dict(_delete_=True, type="LARS", lr=0.1, weight_decay=1e-4),
        "optim_wrapper.clip_grad": dict(type="per_tensor", max_norm=3.0),
        "model.selector.topk": 20,
        "model.selector.norm": "minmax_image",
        "model.loss.gather": "full",
        "train_cfg.max_epochs": 1,
        "param_scheduler.0.warmup": 0,
    }
    found = engine.train(CONFIG, work_dir=str(tmp_path), options={**SMALL, **options})
    assert 0 <= found["match/top1"] <= 100
    assert found["match/chance"] == 12.5


def test_temperature_hook(tmp_path: Path) -> None:
    engine.train(CONFIG, work_dir=str(tmp_path), options=SMALL)
    lines = next(tmp_path.glob("*/vis_data/scalars.json")).read_text().splitlines()
    found = [
        float(line.split('"temperature": ')[1].split(",")[0])
        for line in lines
        if "temperature" in line
    ]
    # Half of the two epochs: five steps from 5 to 1, both taken, then 1. The log shows means of them.
    assert found[0] == 5.0
    assert found[-1] < 3.5
    for options in (dict(start=0.0), dict(final=-1.0)):
        with pytest.raises(ConfigError, match="temperature"):
            HOOKS.build(dict(type="PatchGameTemperatureHook", **options))
    hooks = [dict(type="PatchGameTemperatureHook", epochs=3)]
    with pytest.raises(ConfigError, match="epochs=3 does not fit"):
        engine.train(CONFIG, work_dir=str(tmp_path / "b"), options={**SMALL, "custom_hooks": hooks})
    with pytest.raises(ConfigError, match="is for a PatchGamePretrainer"):
        engine.train(
            str(ROOT / "configs/patchgame/patchrank_quick.py"),
            work_dir=str(tmp_path / "c"),
            options={
                "train_dataloader.dataset.data_root": "nowhere",
                "val_dataloader.dataset.data_root": "nowhere",
                "custom_hooks": [dict(type="PatchGameTemperatureHook")],
            },
        )


def test_matching_metric() -> None:
    metric = PatchGameMatchMetric(topk=(1, 2))
    places = [[0, 0], [0, 1], [2, 0], [1, 1]]
    metric.process({}, [dict(match_place=torch.tensor(p), match_count=4) for p in places])
    found = metric.evaluate(4)
    assert found["match/top1"] == 50.0
    assert found["match/top2"] == pytest.approx(87.5)
    assert found["match/chance"] == 25.0


@pytest.mark.parametrize("case", cases("augment"), ids=lambda case: str(case["case"]))
def test_views_golden(case: dict[str, Any]) -> None:
    from PIL import Image

    golden = load("patchgame", "augment")
    source = Image.fromarray(golden[f"src{case['src']}_u8"].numpy())
    config = Config.fromfile(ROOT / "configs/patchgame/resnet18_s32.py")
    steps = config.train_dataloader.dataset.pipeline
    cut = MultiView(**{key: value for key, value in steps[-1].items() if key != "type"})
    for number, kind in enumerate(cut.kinds, 1):
        drawn = case[f"view{number}"]
        found = view(cut, kind, source, drawn).float()
        name = f"case{case['case']}.view{number}"
        if f"{name}_u8" in golden:
            assert float((found - golden[f"{name}_u8"].float()).abs().max()) <= 1.0
        if f"{name}_norm_rows" in golden:
            mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
            std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
            rows = ((found / 255 - mean) / std)[:, ::112]
            near(rows, golden[f"{name}_norm_rows"], 0, 1.01 / 255 / 0.224)


def view(cut: MultiView, kind: ViewKind, source: Any, drawn: dict[str, Any]) -> Tensor:
    """One view from recorded draws."""
    jitter, chance = drawn["jitter"], kind.photometry
    assert (drawn["jitter_u"] <= chance.jitter) == (jitter is not None)
    settings = [0.0, 0.0, 1.0, 2.0, 3.0, 1.0, 1.0, 1.0, 0.0]
    if jitter is not None:
        factors = [jitter[name] for name in ("brightness", "contrast", "saturation", "hue")]
        settings = [1.0, *map(float, jitter["order"]), *factors]
    settings.append(float(drawn["gray_u"] < chance.gray))
    assert (drawn["blur_u"] <= chance.blur) == (drawn["blur_radius"] is not None)
    settings.append(-1.0 if drawn["blur_radius"] is None else drawn["blur_radius"])
    settings.append(float(drawn.get("solarize_u", 1.0) < chance.solarize))
    box = drawn["crop_top_left_height_width"]
    return cut.view(source, kind.size, box, drawn["flip_u"] < 0.5, settings)


def test_evaluation_preprocessing_golden() -> None:
    golden, count = load("patchgame", "eval_preprocess"), int(metadata("eval_preprocess")["topk"])
    score = golden["speaker384.score"]
    mask = top_mask(score, count)
    near(mask.float(), golden["speaker384.selected"], 0, 1e-5)
    assert mask[0].nonzero().flatten().tolist() == golden["speaker384.indices_sorted"].tolist()
    if "source_u8" not in golden:
        return
    init_default_scope("patchreg")
    config = Config.fromfile(ROOT / "configs/patchgame/patchrank_vit_b32_legacy.py")
    steps = config.test_dataloader.dataset.pipeline[1:]
    pixels = Compose(steps)(dict(img=golden["source_u8"].numpy()))["inputs"]
    config.data_preprocessor.pop("view")
    plain = MODELS.build(config.data_preprocessor)(dict(inputs=pixels[None]))["inputs"]
    near(plain[0, :, ::4], golden["eval_224_rows"], 0, 0.02)
    legacy = Config.fromfile(ROOT / "configs/patchgame/patchrank_vit_b32_legacy.py")
    large = MODELS.build(legacy.data_preprocessor)(dict(inputs=pixels[None]))["inputs"]
    near(large[0, :, ::48], golden["nearest_384_rows"], 0, 0.02)
    sender = MODELS.build(
        model_config(sender_hidden_size=64, receiver_dim=8, num_layers=1, topk=count)
    ).sender
    filled(sender, "sender.").eval()
    assert official_name("patch_rank.model.conv1.weight") == "patch_rank.conv1.weight"
    with torch.no_grad():
        embed, found, _, selected = sender(large)
    near(found, score, 1e-3, 2e-3)
    near(selected, golden["speaker384.selected"], 0, 1e-5)
    near(embed[..., :8], golden["speaker384.symbol_embed_first8"], 1e-3, 2e-3)


def test_pictures(tmp_path: Path) -> None:
    from argparse import Namespace

    from patchreg.methods.patchgame import picture as symbols
    from patchreg.pictures import pictures, ranks

    assert {"ranks", "symbols", "patchrank"} <= set(pictures())
    torch.manual_seed(0)
    config = Config.fromfile(CONFIG)
    init_default_scope("patchreg")
    model = MODELS.build(dict(config.model, data_preprocessor=config.data_preprocessor))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / "model.pth")
    from PIL import Image

    (tmp_path / "photos").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (50, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photos/{number}.png")
    common = dict(
        image=str(tmp_path / "photos"), config=CONFIG, checkpoint=str(tmp_path / "model.pth")
    )
    out = str(tmp_path / "ranks.png")
    ranks.run("ranks", Namespace(**common, keep=None, out=out, count=2))
    assert Path(out).stat().st_size > 10_000
    out = str(tmp_path / "symbols.png")
    told = symbols.run("symbols", Namespace(**common, out=out, count=9, symbols=5, patches=4))
    assert Path(out).stat().st_size > 3_000
    assert told.startswith("3 images: ")
    with pytest.raises(ConfigError, match="--keep 65"):
        ranks.run("ranks", Namespace(**common, keep=65, out=out, count=2))
    with pytest.raises(ConfigError, match="--patches 0"):
        symbols.run("symbols", Namespace(**common, out=out, count=9, symbols=5, patches=0))
