"""Classifiers on some patches only, rankers, and the protocol that measures them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_reader import load
from mmengine.registry import init_default_scope
from patchgame_helpers import filled, images, near, vit
from torch import nn

from patchreg.models.layers import keep_tokens, kept_cells
from patchreg.models.selectors import CentreSelector, GradientSelector, RandomSelector
from patchreg.models.selectors.rank import top_mask
from patchreg.models.selectors.rankers import scores_on_grid
from patchreg.registry import MODELS, TRANSFORMS
from patchreg.runner import run as engine
from patchreg.runner.build import load_config
from patchreg.runner.patchrank import Ranker, draw_patchrank, keep_best, rank_patches
from patchreg.structures import PatchSelection
from patchreg.utils.errors import ConfigError, DataError, MissingFileError, UserError

ROOT = Path(__file__).resolve().parents[2]
TINY = dict(embed_dims=24, depth=2, num_heads=2)


@pytest.fixture(autouse=True)
def _scope() -> None:
    init_default_scope("patchreg")


def classifier(**options: Any) -> Any:
    """A small ViT for images of 16 px in patches of 4, with lively weights."""
    torch.manual_seed(1)
    model = MODELS.build(
        dict(
            type="PatchClassifier",
            backbone=vit(TINY, 4, 16, **options),
            head=dict(type="LinearHead", num_classes=7, in_channels=24),
            data_preprocessor=dict(type="ImagePreprocessor", mean=[128.0] * 3, std=[64.0] * 3),
        )
    )
    for value in model.parameters():
        nn.init.normal_(value, std=0.2)
    return model.eval()


def timm_classifier(**options: Any) -> Any:
    return MODELS.build(
        dict(
            type="TimmPatchClassifier",
            backbone=dict(
                type="TimmViTBackbone",
                model_name="vit_tiny_patch16_224",
                num_classes=12,
                model_kwargs=dict(
                    img_size=64, patch_size=16, embed_dim=48, depth=3, num_heads=4, **options
                ),
            ),
        )
    ).eval()


def test_timm_vit_golden() -> None:
    golden = load("patchgame", "patchrank_vit")
    model = timm_classifier()
    filled(model.backbone.model, "timmvit.")
    x = images(golden, "x_u8")
    with torch.no_grad():
        near(model(x), golden["all.logits"], 1e-3, 1e-4)
        for count in (1, 8, 16):
            cells = kept_cells(golden[f"keep{count}.mask"])
            logits, macs, dense = model.classify_kept(x, cells)
            near(logits, golden[f"keep{count}.logits"], 1e-3, 1e-4)
            assert float(macs[0]) <= dense
        soft = kept_cells(torch.full((4, 16), 0.3))
        near(model.classify_kept(x, soft)[0], golden["soft_mask_keeps_all.logits"], 1e-3, 1e-4)


def test_vit_with_dropped_tokens_golden() -> None:
    golden = load("patchgame", "vit")
    arch = dict(embed_dims=48, depth=3, num_heads=3)
    model = filled(MODELS.build(vit(arch, 16, 64)), "vit.").eval()
    with torch.no_grad():
        cells = kept_cells(golden["keep_mask"])
        features = model(images(golden, "x_u8"), out_blocks=[1], cells=cells)
        near(features.tokens[:, 0], golden["keep.out_cls"], 1e-3, 1e-4)
        read = (
            model.norm(features.blocks[0])[:, 0],
            features.tokens[:, 0],
            features.tokens[:, 1:].mean(1),
        )
        near(torch.cat(read, dim=1), golden["keep.last_blocks"], 1e-3, 1e-4)


@pytest.mark.parametrize("options", [{}, dict(cls_token=False), dict(dist_token=True)])
def test_dropping_tokens_equals_running_the_others(options: dict[str, Any]) -> None:
    model = classifier().backbone if not options else MODELS.build(vit(TINY, 4, 16, **options))
    model.eval()
    x = torch.randn(3, 3, 16, 16)
    cells = torch.tensor([[0, 5, 9], [1, 2, 3], [4, 10, 15]])
    with torch.no_grad():
        found = model(x, cells=cells)
        embedded = model.embed(x)[0]
        for index in range(3):
            tokens = torch.cat(
                (embedded[index, : model.extra], embedded[index, model.extra + cells[index]])
            )
            kept = tokens[None]
            for block in model.blocks:
                kept = block(kept)
            near(found.tokens[index], model.norm(kept)[0], 1e-5, 1e-5)
        every = torch.arange(16).expand(3, -1)
        near(model(x, cells=every).tokens, model(x).tokens, 1e-5, 1e-6)
    assert found.macs is not None
    assert float(found.macs[0]) < found.dense_macs
    assert float(model(x, cells=every).macs[0]) == found.dense_macs


def test_attention_of_timm_is_the_one_it_uses() -> None:
    model = timm_classifier().backbone
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        attention = model.last_attention(x)
        last = model.model.blocks[-1]
        tokens = last.norm1(model(x, out_blocks=[1]).blocks[0])
        qkv = last.attn.qkv(tokens).view(2, 17, 3, 4, 12).permute(2, 0, 3, 1, 4)
        mixed = (attention @ qkv[2]).transpose(1, 2).reshape(2, 17, 48)
        near(last.attn.proj(mixed), last.attn(tokens), 1e-4, 1e-5)


def test_masks_and_cells() -> None:
    score = torch.tensor([[0.1, 0.9, 0.5, 0.7], [4.0, 1.0, 2.0, 3.0]])
    assert kept_cells(top_mask(score, 2)).tolist() == [[1, 3], [0, 3]]
    with pytest.raises(DataError, match="keep 1 to 2 patches"):
        kept_cells(torch.tensor([[1, 1, 0], [1, 0, 0]]))
    with pytest.raises(DataError, match="keep 0 to 0"):
        kept_cells(torch.zeros(2, 4))
    with pytest.raises(DataError, match="cannot keep 5 of 4"):
        top_mask(score, 5)
    tokens = torch.randn(2, 5, 3)
    with pytest.raises(DataError, match=r"0\.\.4"):
        keep_tokens(tokens, torch.tensor([[0, 4], [0, 1]]), 1)
    with pytest.raises(DataError, match="one row for each of 2"):
        keep_tokens(tokens, torch.tensor([[0, 1]]), 1)


def test_classifiers_that_need_all_patches_say_so() -> None:
    model = MODELS.build(
        dict(
            type="PatchClassifier",
            backbone=dict(type="PixelBackbone"),
            head=dict(type="LinearHead", num_classes=3, in_channels=48, pool="mean"),
        )
    )
    with pytest.raises(ConfigError, match="needs all patches"):
        model.classify_kept(torch.randn(2, 3, 4, 4), torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(ConfigError, match="cannot be left out"):
        MODELS.build(dict(type="TimmViTBackbone", model_name="resnet18"))
    with pytest.raises(ConfigError, match="at least one class"):
        MODELS.build(dict(type="TimmPatchClassifier", backbone=vit(TINY, 4, 16)))


def test_rankers() -> None:
    x = torch.zeros(2, 3, 24, 24)
    x[0, :, 9, 14] = 5.0
    x[1, :, 23, 23] = 5.0
    gradient = GradientSelector(8).select(x)
    assert gradient.score.argmax(1).tolist() == [4, 8]
    centre = CentreSelector(8).select(x)
    assert centre.order[0, 0] == 4
    assert set(centre.order[0, -4:].tolist()) == {0, 2, 6, 8}
    first, again = (RandomSelector(8, seed=3) for _ in range(2))
    score = first.select(x).score
    assert torch.equal(score, again.select(x).score)
    assert not torch.equal(score, first.select(x).score)
    assert not torch.equal(score, RandomSelector(8, seed=4).select(x).score)
    for selection in (gradient, centre):
        selection.validate()
        assert selection.keep.all()
    with pytest.raises(DataError, match="patches of 5 px"):
        RandomSelector(5).select(x)
    with pytest.raises(ConfigError, match="patch_size=0"):
        RandomSelector(0)


def test_class_attention_ranks_by_the_last_block() -> None:
    model = classifier()
    x = torch.randn(2, 3, 16, 16)
    ranker = Ranker.build(dict(type="ClassAttentionSelector"), model)
    selection = ranker.select({}, x)
    expected = model.backbone.last_attention(x)[:, :, 0, 1:].mean(1)
    assert torch.equal(selection.score, expected)
    assert selection.grid == (4, 4)
    with pytest.raises(ConfigError, match="has no ViT"):
        Ranker.build(dict(type="ClassAttentionSelector")).select({}, x)


def test_scores_move_to_other_grids() -> None:
    score = torch.arange(16.0).view(1, 16)
    grid = PatchSelection.from_grid((16, 16), (4, 4), score, score >= 0, torch.ones(1, 16))
    assert torch.equal(scores_on_grid(grid, (4, 4)), score)
    down = scores_on_grid(grid, (2, 2)).view(2, 2)
    assert down[0, 0] < down[0, 1] < down[1, 0] < down[1, 1]
    boxes = torch.tensor([[[0.0, 0.0, 8.0, 8.0], [8.0, 8.0, 16.0, 16.0], [-1.0] * 4]])
    free = PatchSelection(
        image_size=(16, 16),
        grid=None,
        score=torch.tensor([[2.0, 1.0, 0.0]]),
        keep=torch.tensor([[True, True, False]]),
        resolution=torch.ones(1, 3),
        order=torch.tensor([[0, 1, -1]]),
        boxes=boxes,
    )
    found = scores_on_grid(free, (2, 2))
    assert torch.allclose(found, torch.tensor([[1.0, 0.0, 0.0, 2 / 3]]))


def windows(order: list[int]) -> PatchSelection:
    """Windows of 6 px at every 2 px of an image of 14 px, the highest score in the second row and column."""
    score = torch.zeros(1, 25)
    score[0, 6] = 1.0
    cells = torch.tensor([order])
    y, x = 2 * (cells // 5), 2 * (cells % 5)
    keep = torch.zeros(1, 25, dtype=torch.bool)
    keep[0, order] = True
    return PatchSelection(
        image_size=(14, 14),
        grid=(5, 5),
        score=score,
        keep=keep,
        resolution=torch.where(keep, 1.0, 0.25),
        order=cells,
        boxes=torch.stack((x, y, x + 6, y + 6), dim=-1).float(),
    )


def test_windows_that_overlap_keep_their_boxes_and_places() -> None:
    found = keep_best(windows([6, 24, 4]), 2)
    assert found.order.tolist() == [[6, 24]]
    assert found.boxes[0].tolist() == [[2, 2, 8, 8], [8, 8, 14, 14]]
    assert found.keep[0].nonzero()[:, 0].tolist() == [6, 24]
    assert found.resolution[0, [4, 6, 24]].tolist() == [0.25, 1.0, 1.0]
    found.validate()
    with pytest.raises(DataError, match="cannot keep 4 of 3 windows"):
        keep_best(windows([6, 24, 4]), 4)
    # The window at (1, 1) has its centre at 5 px, in the third of seven patches of 2 px.
    scores = scores_on_grid(windows([6, 24, 4]), (7, 7)).view(7, 7)
    assert scores.argmax() == 2 * 7 + 2
    assert scores[2, 2] == 1
    assert scores.sum() == pytest.approx(1.0, abs=1e-5)


CONFIG = "configs/patchgame/patchrank_quick.py"
SMALL = {
    "model.backbone.arch": dict(embed_dims=32, depth=2, num_heads=2),
    "model.head.in_channels": 32,
    "test_dataloader.dataset.data_root": "nowhere",
    "test_dataloader.dataset.indices": 51,
    "test_dataloader.batch_size": 20,
    "test_cfg.ks": [64, 4, 16],
    "test_cfg.rankers": dict(
        _delete_=True,
        random=dict(type="RandomSelector", patch_size=4),
        centre=dict(type="CentreSelector", patch_size=4),
        attention=dict(type="ClassAttentionSelector"),
    ),
}


def test_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = engine.evaluate(CONFIG, work_dir=str(tmp_path), options=SMALL)
    with (tmp_path / "patchrank.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["ranker"], int(row["k"])) for row in rows] == [
        (name, k) for name in ("random", "centre", "attention") for k in (4, 16, 64)
    ]
    whole = {row["top1"] for row in rows if row["k"] == "64"}
    assert len(whole) == 1, "with all patches the ranker does not matter"
    for row in rows:
        assert float(row["top1"]) == found[f"patchrank/{row['ranker']}_k{row['k']}"]
        assert float(row["top1"]) <= float(row["top5"])
        assert float(row["share"]) == int(row["k"]) / 64
        assert float(row["images_per_second"]) > 0
        # 51 images do not divide evenly: every image counts once.
        assert (float(row["top1"]) * 51 / 100) % 1 == pytest.approx(0, abs=1e-6)
        assert float(row["ranker_macs"]) > 0 or row["ranker"] != "attention"
    macs = [float(row["macs"]) / float(row["dense_macs"]) for row in rows[:3]]
    assert macs[0] < macs[1] < macs[2] == 1.0
    assert (tmp_path / "patchrank.png").stat().st_size > 5000
    draw_patchrank([tmp_path / "patchrank.csv"] * 3, tmp_path / "three.png")
    assert (tmp_path / "three.png").stat().st_size > 5000
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="no table"):
        draw_patchrank([tmp_path / "other.csv"], tmp_path / "three.png")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"test_cfg.ks": [65]}, "64 patches"),
        ({"test_cfg.ks": []}, "numbers of patches"),
        ({"test_cfg.rankers": dict(_delete_=True, a=dict(patch_size=4))}, "ranker"),
        (
            {"test_cfg.rankers": dict(_delete_=True, a=dict(config=CONFIG))},
            "no checkpoint was named",
        ),
        (
            {"test_cfg.rankers": dict(_delete_=True, a=dict(type="RandomSelektor", patch_size=4))},
            "RandomSelector",
        ),
    ],
)
def test_protocol_refuses(
    options: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=words):
        engine.evaluate(CONFIG, work_dir=str(tmp_path), options={**SMALL, **options})


def test_a_trained_model_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The speaker of a checkpoint, scaled to its own image size, and on the command line."""
    monkeypatch.chdir(ROOT)
    config = load_config("configs/patchgame/quick.py")
    speaker = MODELS.build(dict(config.model, data_preprocessor=config.data_preprocessor))
    torch.save(dict(state_dict=speaker.state_dict()), tmp_path / "speaker.pth")
    named = dict(config="configs/patchgame/quick.py", checkpoint=str(tmp_path / "speaker.pth"))
    options = {
        **SMALL,
        "test_cfg.ks": [32],
        "test_cfg.rankers": dict(_delete_=True, same=named, large=dict(named, img_size=64)),
    }
    engine.evaluate(CONFIG, work_dir=str(tmp_path / "run"), options=options)
    with (tmp_path / "run/patchrank.csv").open() as file:
        rows = list(csv.DictReader(file))
    same, large = (float(row["ranker_macs"]) for row in rows)
    assert large > 3 * same > 0


def test_rank_patches(tmp_path: Path) -> None:
    from PIL import Image

    model = classifier()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    ranker = CentreSelector(10)
    found = rank_patches(str(tmp_path / "photo.png"), ranker, keep=2)
    assert found.grid == (2, 3)
    assert int(found.keep.sum()) == 2
    assert set(found.order[0].tolist()) == {1, 4}
    assert found.boxes[0, 0].tolist() in ([10.0, 0.0, 20.0, 10.0], [10.0, 10.0, 20.0, 20.0])
    assert torch.equal(rank_patches(pixels, ranker).score, found.score)
    assert rank_patches(Image.fromarray(pixels), model, img_size=16).grid == (4, 4)
    with pytest.raises(ConfigError, match="img_size=0: expected a side"):
        rank_patches(pixels, ranker, img_size=0)
    with pytest.raises(DataError, match="uint8 RGB"):
        rank_patches(pixels.astype(np.float32), ranker)
    with pytest.raises(MissingFileError, match="no checkpoint was named"):
        rank_patches(pixels, CONFIG)
    with pytest.raises(ConfigError, match="cannot rank"):
        rank_patches(pixels, nn.Linear(2, 2))
    with pytest.raises(DataError, match="cannot keep 7 of 6"):
        keep_best(rank_patches(pixels, ranker), 7)


def test_preprocessing_of_timm() -> None:
    from PIL import Image
    from timm.data import create_transform

    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    name = "deit_small_patch16_224"
    cropped = TRANSFORMS.build(dict(type="TimmEvalCrop", model_name=name))(dict(img=pixels))["img"]
    preprocessor = MODELS.build(dict(type="TimmPreprocessor", model_name=name))
    found = preprocessor(dict(inputs=torch.from_numpy(cropped).permute(2, 0, 1)[None]))["inputs"]
    # DeiT was published with 224 px, bicubic, a crop of 0.9 and ImageNet's mean.
    expected = create_transform(224, interpolation="bicubic", crop_pct=0.9)(Image.fromarray(pixels))
    near(found[0], expected, 1e-4, 1e-4)
    other = MODELS.build(dict(type="TimmPreprocessor", model_name="vit_base_patch32_384"))
    assert other.mean.flatten().tolist() == [127.5] * 3
    with pytest.raises(ConfigError, match="no model 'vit_huge'"):
        MODELS.build(dict(type="TimmPreprocessor", model_name="vit_huge"))


def test_a_checkpoint_can_be_left_to_the_ranker(tmp_path: Path) -> None:
    model = timm_classifier()
    torch.save(dict(state_dict={"other": torch.ones(1)}), tmp_path / "speaker.pth")
    assert set(model.read_checkpoint(tmp_path / "speaker.pth")["state_dict"]) == {"other"}
    model.own_checkpoint = False
    with pytest.raises(ConfigError, match="random weights"):
        model.read_checkpoint(tmp_path / "speaker.pth")
    model.backbone.checkpoint = "vit.safetensors"
    kept = model.read_checkpoint(tmp_path / "speaker.pth")["state_dict"]
    assert set(kept) == set(model.state_dict())
