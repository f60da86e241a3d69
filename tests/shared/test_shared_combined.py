"""Any selector before any classifier, token merging, and what a comparison makes of them."""

from __future__ import annotations

import pytest
import torch
from mmpretrain.structures import DataSample

from patchreg.models.preprocessor import ImagePreprocessor
from patchreg.models.token_merging import TokenMergingClassifier, merge, merged_macs, merges_for
from patchreg.registry import MODELS
from patchreg.runner.combined import SelectedClassifier
from patchreg.structures import PatchSelection
from patchreg.utils.errors import ConfigError
from patchreg.utils.random import seed_all

VIT = dict(
    type="VisionTransformerBackbone",
    arch=dict(embed_dims=16, depth=3, num_heads=2),
    img_size=16,
    patch_size=4,
    mlp_ratio=2,
)
CLASSIFIER = dict(
    type="PatchClassifier",
    backbone=VIT,
    head=dict(type="LinearHead", num_classes=5, in_channels=16),
)


def build(**parts: object) -> SelectedClassifier:
    seed_all(0)
    parts = dict(selector=dict(type="CentreSelector", patch_size=4), classifier=CLASSIFIER) | parts
    return MODELS.build(dict(type="SelectedClassifier", **parts)).eval()


def images(count: int = 3, side: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_dropped_patches_do_not_take_part() -> None:
    model = build(keep=4)
    inputs = images()
    chosen = model.select(inputs)
    # The four cells around the centre of a 4 x 4 grid.
    assert chosen.keep.nonzero()[:, 1].unflatten(0, (3, 4))[0].tolist() == [5, 6, 9, 10]
    noisy = inputs.clone()
    noisy[:, :, :4] = 100
    assert torch.equal(model(noisy), model(inputs))
    expected, macs, dense = model.classifier.classify_kept(
        inputs, torch.tensor([[5, 6, 9, 10]] * 3)
    )
    assert torch.equal(model(inputs), expected)
    assert torch.equal(chosen.macs, macs)
    assert chosen.dense_macs == dense
    assert chosen.sampled_share().tolist() == [0.25] * 3
    whole = build(keep=16)
    assert torch.allclose(whole(inputs), whole.classifier(inputs), atol=1e-6)


class Ragged(torch.nn.Module):
    """Keeps one cell more in every image, from the last one backwards; each cell costs 10, none 1."""

    def select(self, inputs: torch.Tensor) -> PatchSelection:
        score = torch.arange(4.0).expand(len(inputs), 4).clone()
        keep = torch.arange(4) >= 4 - torch.arange(len(inputs))[:, None]
        return PatchSelection.from_grid(
            (16, 16),
            (2, 2),
            score,
            keep,
            keep.float(),
            macs=1 + 10 * keep.sum(1).double(),
            dense_macs=1.0,
        )


@torch.no_grad()
def test_images_may_keep_different_numbers() -> None:
    model = build()
    model._ranker.module = Ragged()
    inputs = images(5)
    chosen = model.select(inputs)
    # Half a cell of the coarse grid is two of the fine one; an image never stays without a patch.
    assert chosen.keep.sum(1).tolist() == [1, 4, 8, 12, 16]
    assert (chosen.macs.diff() > 10).all()
    for index in range(5):
        alone = model.classifier.classify_kept(
            inputs[index : index + 1], chosen.keep[index].nonzero().T
        )[0]
        assert torch.allclose(model(inputs)[index], alone[0], atol=1e-6)


@torch.no_grad()
def test_erased_patches_get_the_mean_colour() -> None:
    model = build(use="erase", keep=4)
    inputs = images()
    masked = torch.zeros_like(inputs)
    masked[:, :, 4:12, 4:12] = inputs[:, :, 4:12, 4:12]
    assert torch.equal(model(inputs), model.classifier(masked))
    samples = model.predict(inputs, [DataSample() for _ in range(3)])
    assert samples[0].macs == samples[0].dense_macs


class Windows(torch.nn.Module):
    """One window of 8 x 8 px out of nine that overlap, as a localiser gives it."""

    def select(self, inputs: torch.Tensor) -> PatchSelection:
        keep = torch.zeros(len(inputs), 9, dtype=torch.bool)
        keep[:, 5] = True
        box = torch.tensor([8.0, 4, 16, 12]).expand(len(inputs), 1, 4)
        order = torch.full((len(inputs), 1), 5)
        return PatchSelection((16, 16), (3, 3), keep.float(), keep, keep.float(), order, box)


@torch.no_grad()
def test_windows_that_overlap_are_taken_where_they_lie() -> None:
    inputs = images()
    seen = torch.zeros_like(inputs)
    seen[:, :, 4:12, 8:16] = inputs[:, :, 4:12, 8:16]
    erasing, dropping = build(use="erase"), build(use="drop")
    for model in (erasing, dropping):
        model._ranker.module = Windows()
    assert torch.equal(erasing(inputs), erasing.classifier(seen))
    cells = torch.tensor([[6, 7, 10, 11]] * 3)
    assert torch.equal(dropping(inputs), dropping.classifier.classify_kept(inputs, cells)[0])


@torch.no_grad()
def test_a_selector_sees_images_as_it_was_trained() -> None:
    ours = dict(mean=(0.0,) * 3, std=(1.0,) * 3)
    theirs = dict(mean=(100.0,) * 3, std=(50.0,) * 3)
    model = build()
    model.data_preprocessor = ImagePreprocessor(**ours)
    model.selector.data_preprocessor = ImagePreprocessor(**theirs)
    seen = model._as_selector_sees(torch.full((1, 3, 16, 16), 150.0))
    assert torch.equal(seen, torch.ones(1, 3, 16, 16))


def test_training_leaves_the_selector_alone_and_reaches_the_classifier() -> None:
    model = build(selector=dict(type="ClassAttentionSelector", backbone=VIT), keep=4).train()
    assert not model.selector.training
    samples = [DataSample().set_gt_label(label) for label in (0, 1, 2)]
    losses = model(images(), samples, mode="loss")
    sum(losses.values()).backward()
    assert all(value.grad is None for value in model.selector.parameters())
    assert all(value.grad is not None for value in model.classifier.parameters())
    # The classifier's own eyes stay trainable.
    own = build(selector=dict(type="ClassAttentionSelector"), keep=4)
    assert all(value.requires_grad for value in own.classifier.parameters())


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (dict(use="nothing"), "unknown"),
        (dict(keep=0), "at least 1"),
        (dict(use="order"), "predict_ranked"),
        (dict(classifier=dict(path="x")), "classifier="),
        (dict(selector=dict(path="x")), "ranker"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(parts: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(**parts)


def merging(share: float) -> TokenMergingClassifier:
    seed_all(0)
    return MODELS.build(CLASSIFIER | dict(type="TokenMergingClassifier", share=share)).eval()


@torch.no_grad()
def test_merged_tokens_are_means_and_are_followed() -> None:
    x = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(2)).double()
    size = torch.ones(2, 9, 1).double()
    metric = x.clone()
    # Token 4 equals token 3, token 8 token 1: these two pairs are merged.
    metric[:, 4], metric[:, 8] = metric[:, 3], metric[:, 1]
    tokens, sizes, place = merge(x, size, metric, 2, follow=True)
    assert tokens.shape == (2, 7, 4)
    assert sizes.sum(1).flatten().tolist() == [9, 9]
    assert torch.equal(place[:, 4], place[:, 3])
    assert torch.equal(place[:, 8], place[:, 1])
    assert torch.allclose(tokens[0, place[0, 4]], (x[0, 3] + x[0, 4]) / 2)
    for index in (0, 2, 5, 6, 7):
        assert torch.equal(tokens[1, place[1, index]], x[1, index])


@torch.no_grad()
def test_token_merging_meets_its_share_and_changes_nothing_at_one() -> None:
    inputs = images(2)
    plain = merging(1.0)
    seed_all(0)
    twin = MODELS.build(CLASSIFIER).eval()
    assert torch.allclose(plain(inputs), twin(inputs), atol=1e-6)
    full = twin.backbone.macs((4, 4))
    assert merged_macs(twin.backbone, (4, 4), [0, 0, 0]) == full
    model = merging(0.7)
    selection = model.select(inputs)
    assert abs(selection.macs[0].item() / selection.dense_macs - 0.7) < 0.05
    counts = merges_for(model.backbone, (4, 4), 0.7 * full)
    left = 17 - sum(counts)
    # Every token has a total weight of one over its patches; the class token is no patch.
    assert selection.score.sum(1).tolist() == pytest.approx([left - 1] * 2)
    assert twin(inputs).shape == model(inputs).shape
    with pytest.raises(ConfigError, match="outside"):
        merging(0.0)


def test_sampled_pixels_of_tiles_and_of_windows() -> None:
    tiles = PatchSelection.from_grid(
        (8, 8),
        (2, 2),
        torch.zeros(1, 4),
        torch.tensor([[True, False, False, False]]),
        torch.tensor([[1.0, 0.25, 0.25, 0.0]]),
    )
    assert tiles.tiles()
    assert tiles.sampled_share().item() == 0.375
    windows = PatchSelection(
        image_size=(8, 8),
        grid=(2, 2),
        score=torch.zeros(1, 4),
        keep=torch.tensor([[True, True, False, False]]),
        resolution=torch.tensor([[1.0, 1.0, 0.25, 0.25]]),
        order=torch.tensor([[0, 1, -1]]),
        boxes=torch.tensor([[[0.0, 0, 6, 6], [2, 0, 8, 6], [-1, -1, -1, -1]]]),
    )
    assert not windows.tiles()
    assert windows.sampled_share().item() == pytest.approx((48 + 0.25 * 16) / 64)
    assert windows.pixel_shares()[0, 7, 0].item() == 0.25
