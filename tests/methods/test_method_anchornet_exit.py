"""The three networks together: end to end as the authors' scripts, and early exit as the table says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from anchornet_helpers import (
    close,
    golden,
    inclusive,
    normalised,
    recipe_localiser,
    recipe_network,
)
from dge_helpers import samples
from mmengine.config import Config
from mmengine.registry import init_default_scope
from safetensors import safe_open
from torch import Tensor

from patchreg.methods.anchornet.ensemble import AnchorNetEnsembleClassifier, in_fixed_batches
from patchreg.methods.anchornet.queue import EarlyExitQueue, Exit
from patchreg.methods.anchornet.selector import window_boxes
from patchreg.methods.anchornet.table import ConfidenceTable
from patchreg.registry import METRICS, MODELS, TRANSFORMS
from patchreg.utils.errors import ConfigError, DataError, MissingFileError
from patchreg.utils.random import seed_all

ROOT = Path(__file__).resolve().parent.parent.parent


def published(patch: tuple[str, int, float], resized: tuple[str, int, float], count: int) -> Any:
    """An ensemble of networks with closed-form weights."""
    nets = [
        dict(type="TorchvisionBackbone", model_name=name, num_classes=1000)
        for name in (resized[0], patch[0])
    ]
    model = MODELS.build(
        dict(
            type="AnchorNetEnsembleClassifier",
            anchor=dict(
                type="AnchorNetClassifier",
                backbone=dict(type="AnchorNetBackbone"),
                head=dict(type="AnchorNetCAMHead", num_classes=1000),
                selector=dict(type="CAMPatchSelector", num_patches=count, iou_limits=0.3),
            ),
            resized=dict(type="AnchorNetResizedClassifier", backbone=nets[0]),
            patch=dict(type="AnchorNetViewClassifier", backbone=nets[1]),
        )
    )
    model.anchor.load_state_dict(recipe_localiser(54).state_dict())
    model.resized.load_state_dict(recipe_network(*resized).state_dict())
    model.patch.load_state_dict(recipe_network(*patch).state_dict())
    return model.eval()


def test_images_to_table_as_the_authors_script_makes_it() -> None:
    file = golden("end_to_end")
    model = published(("resnet18", 71, 0.05), ("resnet18", 72, 0.05), 4)
    images = normalised(file["eval_crop_u8"])
    views, seen, found = model.all_views(images)
    assert close(found.logits, file["anchor_logits"], 1e-3)
    assert torch.equal(found.logits.argmax(1), file["anchor_pred"])
    assert close(found.cam, file["cam"], 1e-3)
    assert torch.equal(inclusive(window_boxes(found.cells, 17, found.window)), file["boxes"])
    assert bool(seen.all())
    assert close(views[:, 0], file["resized_logits"], 1e-3)
    assert close(views[:, 1:].flatten(0, 1), file["patch_logits"], 1e-3)
    table = ConfidenceTable.from_logits(views, file["target"], model.costs((3, 224, 224)))
    assert torch.equal(table.predicted, file["cumulative_class"])
    assert torch.equal(table.correct, file["predictions"])
    assert close(table.confidence, file["thresholds"], 1e-3)
    assert model.costs((3, 224, 224)) == tuple(
        333_615_104 * (stage + 1) + (60_538_544 if stage else 0) for stage in range(5)
    )


def test_aggregation_gives_the_published_prediction() -> None:
    file = golden("predictor")
    summed = file["resized_logits"] + file["patch_logits"].sum(0)
    assert close(summed, file["aggregated_logits"], 1e-4)
    best = summed.softmax(0).topk(10)
    assert torch.equal(best.indices.int(), file["top10_class"])
    assert close(best.values, file["top10_prob"], 1e-4)


def test_a_photo_gets_the_published_prediction() -> None:
    file = golden("predictor", "raw_u8")
    model = published(("densenet201", 81, 2.0), ("densenet201", 82, 2.0), 3)
    with safe_open(file.path, framework="pt") as opened:
        meta = opened.metadata()
    init_default_scope("patchreg")
    config = Config.fromfile(ROOT / "configs/anchornet/densenet201_dynamic.py")
    sample: dict[str, Any] = dict(img=file["raw_u8"].permute(1, 2, 0).numpy())
    for step in config.test_dataloader.dataset.pipeline[1:3]:
        sample = TRANSFORMS.build(dict(step))(sample)
    image = normalised(torch.from_numpy(sample["img"].copy()).permute(2, 0, 1)[None])
    model.batch_size = 1
    views, _, found = model.all_views(image)
    assert torch.equal(inclusive(window_boxes(found.cells, 17, found.window))[0], file["boxes"])
    # The image went through another version of Pillow than the authors': one grey level.
    assert close(views[0, 0], file["resized_logits"], 1e-4)
    assert close(views[0, 1:], file["patch_logits"], 1e-4)
    answer = model.predict(image, samples(torch.tensor([0])))[0]
    best = answer.pred_score.topk(10)
    assert torch.equal(best.indices.int(), file["top10_class"])
    names = [f"class_{label}" for label in best.indices.tolist()]
    shown = dict(zip(names, [f"{value:.3f}" for value in best.values.tolist()], strict=True))
    assert shown == json.loads(meta["json"])
    single = published(("densenet201", 81, 2.0), ("densenet201", 82, 2.0), 1)
    best = single.predict(image, samples(torch.tensor([0])))[0].pred_score.topk(10)
    names = [f"class_{label}" for label in best.indices.tolist()]
    shown = dict(zip(names, [f"{value:.3f}" for value in best.values.tolist()], strict=True))
    assert shown == json.loads(meta["json_single_patch"])


class Tiny:
    """Small ensembles for images of 32 px."""

    trunk = dict(
        type="AnchorNetBackbone", blocks=[(1, 8, 1), (2, 8, 1), (2, 8, 1)], out_channels=16
    )
    net = dict(type="CIFARResNetBackbone", num_blocks=[1, 1, 1, 1], base_channels=4)
    head = dict(type="LinearHead", num_classes=5, in_channels=32, pool="mean")

    @classmethod
    def build(cls, seed: int = 0, patches: int = 3, limits: Any = 0.3, **kwargs: Any) -> Any:
        """An ensemble in evaluation mode whose confidences are spread over the range."""
        seed_all(seed)
        config = dict(
            type="AnchorNetEnsembleClassifier",
            anchor=dict(
                type="AnchorNetClassifier",
                backbone=cls.trunk,
                head=dict(type="AnchorNetCAMHead", num_classes=5, in_channels=16),
                selector=dict(type="CAMPatchSelector", num_patches=patches, iou_limits=limits),
            ),
            resized=dict(
                type="AnchorNetResizedClassifier", backbone=cls.net, head=cls.head, view_size=16
            ),
            patch=dict(type="AnchorNetViewClassifier", backbone=cls.net, head=cls.head),
        )
        model = MODELS.build({**config, **kwargs})
        with torch.no_grad():
            model.anchor.head.fc.weight.normal_()
            for part in (model.resized, model.patch):
                part.head.head.weight.normal_(std=0.8)
        return model.eval()


def some_images(count: int, seed: int = 1) -> Tensor:
    """Images with structure, so that confidences differ."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    fine = torch.randn(count, 3, 32, 32, generator=generator)
    return 2 * torch.nn.functional.interpolate(coarse, size=32, mode="bilinear") + 0.3 * fine


def table_of(model: AnchorNetEnsembleClassifier, images: Tensor) -> ConfidenceTable:
    """The model's table of some images with label 0."""
    parts = [model.all_views(batch) for batch in images.split(50)]
    views, seen = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    labels = torch.zeros(len(images), dtype=torch.int64)
    return ConfidenceTable.from_logits(views, labels, model.costs((3, 32, 32)), seen)


def expected_stages(table: ConfidenceTable, thresholds: list[float]) -> Tensor:
    """Where the table says that each image stops."""
    first = table.exits(thresholds)
    stage = torch.where(first < 0, len(thresholds) - 1, first)
    return torch.minimum(stage, table.views - 1) if table.views is not None else stage


@pytest.mark.parametrize("limits", [0.3, [0.05, 0.0]])
@pytest.mark.parametrize("size", [1, 7, 16])
def test_the_queue_decides_exactly_as_the_table(size: int, limits: Any) -> None:
    model = Tiny.build(limits=limits, batch_size=size)
    images = some_images(117)
    table = table_of(model, images)
    # Medians as thresholds: about half of the images leave at each stage.
    for thresholds in (
        [*table.confidence.median(0).values[:-1].tolist(), 0.0],
        [*table.confidence.quantile(0.8, 0)[:-1].tolist(), 0.0],
        [0.0, 0.5, 0.5, 0.0],
        [1.0, 1.0, 1.0, 0.0],
        [1.0, 0.0],
    ):
        queue = EarlyExitQueue(model, thresholds)
        found = sorted(queue.run(images.split(23)), key=lambda one: one.index)
        stage = expected_stages(table, thresholds)
        assert [one.index for one in found] == list(range(117))
        assert [one.stage for one in found] == stage.tolist()
        rows = torch.arange(117)
        assert [one.label for one in found] == table.predicted[rows, stage].tolist()
        assert [one.confidence for one in found] == table.confidence[rows, stage].tolist()
        # Batches are full but for the end of the data.
        windows = int(stage.sum())
        assert queue.batches["first"] == -(-117 // size)
        assert queue.batches["look"] <= windows // size + len(thresholds) - 1
        assert queue.batches["find"] == -(-int((stage > 0).sum()) // size)


def test_latency_mode_stops_where_the_table_says() -> None:
    model = Tiny.build(batch_size=16)
    images = some_images(60)
    table = table_of(model, images)
    # Halfway between two confidences, so that the rounding of other batch shapes cannot matter.
    ordered = table.confidence.sort(0).values
    thresholds = [*((ordered[29] + ordered[30]) / 2)[:-1].tolist(), 0.0]
    model.set_thresholds(thresholds)
    stage = expected_stages(table, thresholds)
    assert len(set(stage.tolist())) == 4
    batch = model.predict(images, samples(torch.zeros(60, dtype=torch.int64)))
    for row, sample in enumerate(batch):
        alone = model.predict(images[row : row + 1], samples(torch.tensor([0])))[0]
        assert sample.stage == alone.stage == stage[row]
        assert sample.pred_label.item() == table.predicted[row, stage[row]]
        assert sample.macs == alone.macs == table.costs[stage[row]]
        assert abs(alone.pred_score.max() - table.confidence[row, stage[row]]) < 1e-5
        assert [cell for cell in sample.cells if cell >= 0] == sample.cells[: sample.stage]
    selection = model.select(images)
    assert selection.keep.sum(1).tolist() == stage.tolist()
    assert selection.macs.tolist() == [table.costs[number] for number in stage]
    assert selection.resolution[selection.keep].eq(1).all()
    assert selection.resolution[~selection.keep].eq(0.25).all()


def test_networks_that_are_not_needed_are_not_run() -> None:
    model = Tiny.build(thresholds=[0.0, 0.5, 0.5, 0.0])
    model.anchor.localise = None
    assert model(some_images(3)).shape == (3, 5)
    queue = EarlyExitQueue(Tiny.build(batch_size=4), [0.0, 0.0])
    assert len(list(queue.run([some_images(10)]))) == 10
    assert queue.batches == {"first": 3, "find": 0, "look": 0}


def test_the_queue_takes_batches_of_any_length_and_mends_nothing() -> None:
    model = Tiny.build(batch_size=8)
    images, thresholds = some_images(30), [0.9, 0.9, 0.9, 0.0]

    def run(batches: Any) -> list[Exit]:
        found = EarlyExitQueue(model, thresholds).run(batches)
        return sorted(found, key=lambda one: one.index)

    assert run(images.split(30)) == run(images.split(1)) == run(images.split(11))
    assert run([]) == []
    with pytest.raises(DataError, match="come after"):
        run([images[:8], torch.zeros(8, 3, 40, 40)])
    with pytest.raises(ConfigError, match="5 values for 4 stages"):
        EarlyExitQueue(model, [0.5] * 5)


def test_fixed_batches_pad_and_drop_the_padding() -> None:
    seen = []

    def network(batch: Tensor) -> Tensor:
        seen.append(len(batch))
        return batch * 2

    found = in_fixed_batches(network, torch.arange(7), 3)
    assert seen == [3, 3, 3]
    assert torch.cat([out[:count] for out, count in found]).tolist() == [0, 2, 4, 6, 8, 10, 12]


def test_a_budget_becomes_thresholds_by_the_table_beside_the_checkpoint(tmp_path: Path) -> None:
    model = Tiny.build(batch_size=16)
    table = table_of(model, some_images(200))
    table.save(tmp_path / "table.safetensors")
    budget = (table.costs[0] + table.costs[2]) / 2
    model.set_budget(budget, tmp_path / "ensemble.pth")
    assert model.thresholds is not None
    assert table.evaluate(model.thresholds).cost <= budget
    with pytest.raises(MissingFileError, match="table.py"):
        model.set_budget(budget, tmp_path / "elsewhere" / "ensemble.pth")
    with pytest.raises(ConfigError, match="lies outside"):
        model.set_thresholds([2.0])


@pytest.mark.parametrize("keep", [True, False])
def test_the_metric_gathers_the_table_of_the_model(keep: bool) -> None:
    model = Tiny.build(batch_size=16, limits=[0.05, 0.0])
    images = some_images(30)
    expected = table_of(model, images)
    metric = METRICS.build(dict(type="AnchorNetTableMetric", keep_logits=keep))
    metric.costs = expected.costs
    for batch in images.split(11):
        filled = model.predict(batch, samples(torch.zeros(len(batch), dtype=torch.int64)))
        metric.process({}, [sample.to_dict() for sample in filled])
    found = metric.evaluate(30)
    assert metric.table is not None
    for name in ("confidence", "correct", "predicted", "views"):
        assert torch.equal(getattr(metric.table, name), getattr(expected, name))
    assert (metric.table.logits is None) == (not keep)
    if keep:
        assert torch.equal(metric.table.logits, expected.logits)
    assert found["table/top5"] == 100.0
    assert found["table/stage1_top1"] == pytest.approx(
        100 * expected.correct[:, 1].double().mean().item()
    )
    model.set_thresholds([0.5, 0.5, 0.5, 0.0])
    filled = model.predict(images[:2], samples(torch.zeros(2, dtype=torch.int64)))
    with pytest.raises(DataError, match="thresholds=None"):
        metric.process({}, [sample.to_dict() for sample in filled])


def test_all_three_networks_can_be_trained_in_one_go() -> None:
    model = Tiny.build().train()
    losses = model(some_images(4), samples(torch.tensor([0, 1, 2, 3])), mode="loss")
    assert set(losses) == {"loss_anchor", "loss_resized", "loss_patch"}
    sum(losses.values()).backward()
    assert all(value.grad is not None for value in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_the_queue_on_a_gpu_decides_as_the_table(graphs: bool) -> None:
    model = Tiny.build(batch_size=16).cuda()
    images = some_images(117).cuda()
    table = table_of(model, images)
    thresholds = [*table.confidence.median(0).values[:-1].tolist(), 0.0]
    found = EarlyExitQueue(model, thresholds, graphs=graphs).run(images.split(23))
    stages = [one.stage for one in sorted(found, key=lambda one: one.index)]
    assert stages == expected_stages(table, thresholds).tolist()
