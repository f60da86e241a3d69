"""PatchSelection: order and boxes follow from the grid, wrong fields are named."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from patchreg.structures import PatchSelection, grid_boxes


def selection(**changes: Any) -> PatchSelection:
    """Two images of 6 x 10 px with 2 x 3 cells; the last column is 2 px wide."""
    fields = dict(
        image_size=(6, 10),
        grid=(2, 3),
        score=torch.tensor([[0.1, 0.9, 0.2, 0.9, 0.0, 0.3], [0.0, 0.0, 0.0, 0.0, 0.0, 0.5]]),
        keep=torch.tensor([[True, True, False, True, False, False], [False] * 5 + [True]]),
        resolution=torch.full((2, 6), 0.25),
    )
    return PatchSelection.from_grid(**{**fields, **changes})


def test_order_and_boxes_follow_from_the_grid() -> None:
    made = selection()
    assert made.order.tolist() == [[1, 3, 0], [5, -1, -1]]
    assert made.boxes[0].tolist() == [[4, 0, 8, 3], [0, 3, 4, 6], [0, 0, 4, 3]]
    assert made.boxes[1].tolist() == [[8, 3, 10, 6], [-1] * 4, [-1] * 4]
    assert len(made) == 2


def test_images_can_be_taken_and_joined() -> None:
    made = selection(macs=torch.tensor([5.0, 7.0], dtype=torch.float64), dense_macs=10.0)
    second = made[-1]
    assert second.order.tolist() == [[5, -1, -1]]
    assert second.macs.tolist() == [7.0]
    narrow = dataclasses.replace(second, order=second.order[:, :1], boxes=second.boxes[:, :1])
    joined = PatchSelection.cat([made[:1], narrow])
    joined.validate()
    assert joined.order.tolist() == made.order.tolist()
    assert joined.macs.tolist() == [5.0, 7.0]
    moved = made.to("cpu")
    assert moved.keep.dtype == torch.bool
    with pytest.raises(IndexError, match="image 2 of a selection of 2"):
        made[2]
    with pytest.raises(ValueError, match="do not fit together"):
        PatchSelection.cat([made, selection(image_size=(6, 12))])
    with pytest.raises(ValueError, match="'macs' is set in some"):
        PatchSelection.cat([made, selection()])


def test_empty_batch_is_a_selection() -> None:
    none = selection(
        score=torch.zeros(0, 6),
        keep=torch.zeros(0, 6, dtype=torch.bool),
        resolution=torch.zeros(0, 6),
    )
    assert len(none) == 0
    assert none.boxes.shape == (0, 0, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(score=torch.zeros(2, 5)), r"has 6 cells, score has shape \(2, 5\)"),
        (dict(keep=torch.zeros(2, 6)), "keep has type torch.float32; expected torch.bool"),
        (dict(resolution=torch.full((2, 6), 1.5)), "resolution holds values outside"),
        (dict(score=torch.full((2, 6), float("nan"))), "not finite"),
        (dict(log_prob=torch.zeros(3)), r"log_prob has shape \(3,\); expected \[2\]"),
        (dict(order=torch.tensor([[-1, 1], [5, -1]])), "-1 before a cell"),
        (dict(order=torch.tensor([[1, 1], [5, -1]])), "names a cell twice"),
        (dict(order=torch.tensor([[1, 3], [5, -1]])), "keep and order disagree"),
        (dict(order=torch.tensor([[1, 6], [5, -1]])), "outside -1..5"),
        (dict(macs=torch.ones(2, dtype=torch.float64)), "belong together"),
        (dict(macs=torch.ones(2), dense_macs=1.0), "macs has type"),
        (dict(macs=torch.zeros(2, dtype=torch.float64), dense_macs=1.0), "not positive"),
    ],
)
def test_wrong_fields_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selection(**changes)


def test_boxes_outside_the_image_are_refused() -> None:
    made = selection()
    made.boxes[0, 0, 2] = 11
    with pytest.raises(ValueError, match="outside the image of 6 x 10"):
        made.validate()


def test_cells_that_stick_out_are_clipped() -> None:
    boxes = grid_boxes((5, 5), (3, 3), torch.arange(9).view(1, 9))
    assert boxes[0, 8].tolist() == [4, 4, 5, 5]
    assert (boxes[0, :, 2] - boxes[0, :, 0]).view(3, 3).sum(1).tolist() == [5, 5, 5]
