"""Preprocessor: normalising, targets, messages; and the evaluation metric against golden values."""

from __future__ import annotations

import pytest
import torch
from golden_reader import load
from mmengine.config import Config
from mmengine.registry import init_default_scope

from patchreg.registry import DATASETS, METRICS, MODELS, TRANSFORMS
from patchreg.utils.errors import ConfigError, DataError, InputTypeError
from patchreg.utils.random import batch_random

DataSample = pytest.importorskip(
    "mmpretrain.structures", reason="pip install mmpretrain"
).DataSample


def build(**arguments):
    return MODELS.build(dict(type="ImagePreprocessor", **arguments))


def batch(count=4, size=8, classes=5):
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    samples = [DataSample().set_gt_label(i % classes) for i in range(count)]
    return dict(inputs=images, data_samples=samples)


def test_normalises_rgb_lists_and_batches():
    data = batch()
    mean, std = (10.0, 20.0, 30.0), (2.0, 4.0, 8.0)
    preprocessor = build(mean=mean, std=std)
    expected = torch.stack(
        [(data["inputs"][:, c].float() - mean[c]) / std[c] for c in range(3)], dim=1
    )
    for inputs in (data["inputs"], list(data["inputs"])):
        found = preprocessor(dict(inputs=inputs, data_samples=data["data_samples"]))
        assert torch.allclose(found["inputs"], expected, atol=1e-6)
        assert found["inputs"].dtype == torch.float32
        assert found["data_samples"] is data["data_samples"]
    assert build()(dict(inputs=data["inputs"]))["data_samples"] is None
    assert build().double()(data)["inputs"].dtype == torch.float64
    assert not build().state_dict()


def test_golden_pixels_through_the_preprocessor():
    golden = load("dge", "metrics_transforms")
    image = golden["eval32/image"].permute(2, 0, 1).contiguous()
    found = build()(dict(inputs=[image]))["inputs"][0]
    assert (found - golden["eval32/out"]).abs().max() < 1e-6


def test_mixing_only_in_training():
    preprocessor = build(num_classes=5, batch_augment=dict(type="BatchMixup"))
    data = batch()
    found = preprocessor(data, training=False)
    assert "gt_score" not in found["data_samples"][0]
    plain = found["inputs"]

    batch_random.begin(seed=0, step=0)
    augment = TRANSFORMS.build(dict(type="BatchMixup"))
    inputs, targets = augment(plain, torch.tensor([0, 1, 2, 3]), 5)
    batch_random.begin(seed=0, step=0)
    found = preprocessor(batch() | dict(inputs=data["inputs"]), training=True)
    assert torch.equal(found["inputs"], inputs)
    assert not torch.equal(inputs, plain)
    for sample, target in zip(found["data_samples"], targets, strict=True):
        assert torch.equal(sample.gt_score, target)
        assert float(sample.gt_score.sum()) == pytest.approx(1.0)


def test_label_smoothing_without_mixing():
    augment = dict(type="BatchMixup", mixup_alpha=0.0, cutmix_alpha=0.0, label_smoothing=0.2)
    found = build(num_classes=5, batch_augment=augment)(batch(count=3), training=True)
    assert found["data_samples"][2].gt_score.tolist() == pytest.approx(
        [0.04, 0.04, 0.84, 0.04, 0.04]
    )


def test_messages():
    with pytest.raises(ConfigError, match="needs num_classes"):
        build(batch_augment=dict(type="BatchMixup"))
    with pytest.raises(ConfigError, match="one positive std"):
        build(mean=(1.0, 2.0), std=(1.0,))
    with pytest.raises(DataError, match=r"different shapes, such as \[\(3, 8, 8\), \(3, 9, 8\)\]"):
        build()(dict(inputs=[torch.zeros(3, 8, 8), torch.zeros(3, 9, 8)]))
    with pytest.raises(DataError, match="images have 1 channels, mean and std have 3"):
        build()(dict(inputs=torch.zeros(2, 1, 8, 8)))
    with pytest.raises(InputTypeError, match=r"shape \(3, 8, 8\)"):
        build()(dict(inputs=torch.zeros(3, 8, 8)))
    with pytest.raises(DataError, match="label 4 does not fit num_classes=4"):
        build(num_classes=4)(batch(count=5))
    unlabelled = dict(inputs=torch.zeros(2, 3, 8, 8), data_samples=[DataSample(), DataSample()])
    assert build(num_classes=4)(unlabelled)["inputs"].shape == (2, 3, 8, 8)
    with pytest.raises(DataError, match="needs one gt_label per sample"):
        build(num_classes=4, batch_augment=dict(type="BatchMixup"))(unlabelled, training=True)


# The meta device has no values but goes the way of an accelerator.
@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_labels_and_fields_follow_to_the_device(device):
    preprocessor = build(num_classes=5, batch_augment=dict(type="BatchMixup")).to(device)
    data = batch()
    data["data_samples"][1].set_field(torch.ones(2), "extra")
    found = preprocessor(data, training=True)
    assert found["inputs"].device.type == device
    for i, sample in enumerate(found["data_samples"]):
        assert sample.gt_label.device.type == device
        assert sample.gt_label.shape == (1,)
        assert sample.gt_score.device.type == device
        assert device == "meta" or int(sample.gt_label) == i
    assert found["data_samples"][1].extra.device.type == device


def test_accuracy_and_loss_are_weighted_by_samples():
    golden = load("dge", "metrics_transforms")
    logits, labels = golden["metric/logits"], golden["metric/labels"]
    sizes = golden["metric/batch_sizes"].tolist()
    metric = METRICS.build(dict(type="mmpretrain.Accuracy", topk=(1, 5), thrs=None))
    losses = []
    for part, target in zip(logits.split(sizes), labels.split(sizes), strict=True):
        samples = [
            DataSample().set_gt_label(int(t)).set_pred_score(row).to_dict()
            for row, t in zip(part, target, strict=True)
        ]
        metric.process(None, samples)
        losses.append(torch.nn.functional.cross_entropy(part.double(), target, reduction="none"))
    found = metric.evaluate(len(labels))
    top1, top5, batch_mean = golden["metric/result"].tolist()
    # The metric keeps percentages in float32.
    assert found["accuracy/top1"] == pytest.approx(top1, rel=1e-6)
    assert found["accuracy/top5"] == pytest.approx(top5, rel=1e-6)
    # Averaging batches, as upstream does, over-weights the short last one.
    assert torch.stack([x.mean() for x in losses]).mean() == pytest.approx(batch_mean, rel=1e-6)
    per_sample = float(golden["metric/loss_per_sample"])
    assert float(torch.cat(losses).mean()) == pytest.approx(per_sample, rel=1e-6)
    assert abs(per_sample - batch_mean) > 1e-3


@pytest.mark.parametrize("name", ["cifar10_quick", "imagenet_deit_256"])
def test_data_configs_build_and_give_uint8_rgb(name, project_root, tmp_path):
    config = Config.fromfile(project_root / "configs" / "_base_" / "datasets" / f"{name}.py")
    init_default_scope("patchreg")  # as in a run
    MODELS.build(config.data_preprocessor)
    METRICS.build(config.val_evaluator)
    size = 32 if name == "cifar10_quick" else 256
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        source = dict(type="FashionMNISTMiniDataset", pipeline=loader.dataset.pipeline, indices=2)
        if name == "imagenet_deit_256":
            # Any images do; the thousand folders are checked elsewhere.
            (tmp_path / "red").mkdir(exist_ok=True)
            image = torch.zeros(300, 400, 3, dtype=torch.uint8)
            image[..., 0] = 255
            from PIL import Image

            Image.fromarray(image.numpy()).save(tmp_path / "red" / "x.png")
            source = dict(
                type="ImageFolderDataset",
                data_root=str(tmp_path),
                pipeline=loader.dataset.pipeline,
            )
        sample = DATASETS.build(source)[0]
        assert sample["inputs"].dtype == torch.uint8
        assert sample["inputs"].shape == (3, size, size)
        assert int(sample["data_samples"].gt_label) == DATASETS.build(source).get_gt_labels()[0]
    if name == "imagenet_deit_256":
        assert sample["inputs"].float().mean((1, 2)).tolist() == [255.0, 0.0, 0.0]


def test_whole_numbers_as_mean_and_a_negative_label():
    whole = build(mean=(0, 0, 0), std=(255, 255, 255), num_classes=3)
    assert whole.normalise(
        torch.full((1, 3, 2, 2), 51, dtype=torch.uint8)
    ).unique() == pytest.approx(0.2)
    sample = DataSample().set_gt_label(-1)
    with pytest.raises(DataError, match="label -1 does not fit num_classes=3"):
        whole({"inputs": torch.zeros(1, 3, 2, 2), "data_samples": [sample]})
