"""Which patch of one view shows what a patch of another view shows, from the geometry alone.

Letters: B images, P x P patches of a view, S steps along one axis, M matched pairs of tokens. Token 0 is
the class token, patch (row, column) is token 1 + row * P + column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchreg.structures import ViewGeometry
from patchreg.utils.errors import ConfigError

RULES = ("published", "containment")


@dataclass(eq=False)
class AxisMatches:
    """Matched rows, or columns, of two views.

    Args:
        first: Index in the first view.
        second: Index in the second view.
        valid: Which of the steps exist.

    Shape:
        All [B, S].
    """

    first: Tensor
    second: Tensor
    valid: Tensor


@dataclass(eq=False)
class TokenMatches:
    """Matched tokens of the teacher's and the student's views of a batch, with their weights.

    Everything is ordered image by image, so that images can be worked on one after the other.

    Args:
        rows: Tokens of the student that take part, counted in the order (view, image, token).
        starts: Where the rows of each image begin, and where the last ones end.
        student: Place in `rows` of each pair, ascending.
        teacher: Token of the teacher of each pair, counted in the order (image, view, token).
        weight: Share of the pair in the loss; the shares sum to 1.
        is_class: Whether the pair is that of the class tokens.

    Shape:
        rows [N], starts [B + 1], student and teacher [M] int64; weight [M] float64; is_class [M] bool.
    """

    rows: Tensor
    starts: Tensor
    student: Tensor
    teacher: Tensor
    weight: Tensor
    is_class: Tensor


def published_axis(
    start: tuple[Tensor, Tensor],
    length: tuple[Tensor, Tensor],
    cells: tuple[int, int],
    flip: tuple[Tensor, Tensor] | None = None,
) -> AxisMatches:
    """Match along one axis as published: round where the overlap begins and how many cells it has.

    Both are rounded half to even; from the longer of the two lists, evenly spread positions are kept.

    Source:
        `find_intersection_ids_in_crops` of the official code.

    Args:
        start: First px of the boxes of both views.
        length: Their lengths in px.
        cells: Their numbers of cells.
        flip: Whether the axis is mirrored, or None where it never is.

    Shape:
        start, length, flip [B] each.

    Differs from official:
        With an odd number of cells, rounding can give one cell too many; it is cut off. There, a
        mirrored view then loses all its patches, because Python counts index -1 from the end.
    """
    low = torch.maximum(start[0], start[1]).double()
    high = torch.minimum(start[0] + length[0], start[1] + length[1]).double()
    begins, counts = [], []
    for side in (0, 1):
        begin = torch.round(cells[side] * ((low - start[side]) / length[side]))
        count = torch.round(cells[side] * ((high - low) / length[side]))
        count = torch.minimum(count, cells[side] - begin).clamp(min=0)
        begins.append(begin.long())
        counts.append(torch.where(high > low, count, 0.0))
    kept = torch.minimum(*counts)
    steps = torch.arange(min(cells), device=low.device, dtype=torch.float64).expand(len(low), -1)
    found = []
    for side in (0, 1):
        stride = (counts[side] - 1) / (kept - 1).clamp(min=1)
        # As `floor(linspace(0, n - 1, m))` in float64, whose last value is exact.
        place = torch.floor(steps * stride[:, None])
        last = (steps == (kept - 1)[:, None]) & (kept > 1)[:, None]
        place = torch.where(last, (counts[side] - 1)[:, None], place).long()
        index = begins[side][:, None] + place
        if flip is not None:
            index = torch.where(flip[side][:, None], cells[side] - 1 - index, index)
        found.append(index)
    return AxisMatches(found[0], found[1], steps < kept[:, None])


def containment_axis(
    start: tuple[Tensor, Tensor],
    length: tuple[Tensor, Tensor],
    cells: tuple[int, int],
    flip: tuple[Tensor, Tensor] | None = None,
) -> AxisMatches:
    """Match each cell of the second view to the cell of the first that holds its centre.

    Args:
        start: First px of the boxes of both views.
        length: Their lengths in px.
        cells: Their numbers of cells.
        flip: Whether the axis is mirrored, or None where it never is.

    Shape:
        start, length, flip [B] each.
    """
    steps = torch.arange(cells[1], device=start[0].device).expand(len(start[0]), -1)
    if start[0].is_floating_point():
        centre = start[1][:, None] + length[1][:, None] * ((steps.double() + 0.5) / cells[1])
        place = torch.floor(cells[0] * (centre - start[0][:, None]) / length[0][:, None]).long()
    else:
        # Whole pixels in whole numbers: a centre on the border of two cells belongs to the second.
        ahead = 2 * cells[1] * (start[1] - start[0])[:, None] + length[1][:, None] * (2 * steps + 1)
        whole = 2 * cells[1] * length[0][:, None]
        place = torch.div(cells[0] * ahead, whole, rounding_mode="floor")
    valid = (place >= 0) & (place < cells[0])
    first, second = place.clamp(0, cells[0] - 1), steps
    if flip is not None:
        first = torch.where(flip[0][:, None], cells[0] - 1 - first, first)
        second = torch.where(flip[1][:, None], cells[1] - 1 - second, second)
    return AxisMatches(first, second, valid)


def match_axes(
    geometry: ViewGeometry,
    views: tuple[int, int],
    grids: tuple[tuple[int, int], tuple[int, int]],
    rule: str = "published",
) -> tuple[AxisMatches, AxisMatches]:
    """Match rows and columns of two views of each image.

    Args:
        geometry: Boxes and flips.
        views: The two views, first the teacher's.
        grids: Rows and columns of patches of both.
        rule: `published` or `containment`.

    Raises:
        ConfigError: The rule is unknown.
    """
    if rule not in RULES:
        raise ConfigError(f"matching='{rule}' is unknown; use one of {', '.join(RULES)}")
    axis = published_axis if rule == "published" else containment_axis
    boxes = [geometry.boxes[:, view] for view in views]
    if boxes[0].is_floating_point():
        boxes = [box.double() for box in boxes]
    flips = geometry.flips[:, views[0]], geometry.flips[:, views[1]]

    def both(column: int) -> tuple[Tensor, Tensor]:
        return boxes[0][:, column], boxes[1][:, column]

    rows = axis(both(0), both(2), (grids[0][0], grids[1][0]))
    columns = axis(both(1), both(3), (grids[0][1], grids[1][1]), flips)
    return rows, columns


def match_pair(
    geometry: ViewGeometry,
    views: tuple[int, int],
    grids: tuple[tuple[int, int], tuple[int, int]],
    rule: str = "published",
) -> list[tuple[Tensor, Tensor]]:
    """Return the matched tokens of two views for each image, class tokens first, then row by row.

    Args:
        geometry: Boxes and flips.
        views: The two views, first the teacher's.
        grids: Rows and columns of patches of both.
        rule: `published` or `containment`.

    Shape:
        Returns B times two int64 tensors [1 + patches].
    """
    rows, columns = match_axes(geometry, views, grids, rule)
    both = rows.valid[:, :, None] & columns.valid[:, None, :]
    first = 1 + rows.first[:, :, None] * grids[0][1] + columns.first[:, None, :]
    second = 1 + rows.second[:, :, None] * grids[1][1] + columns.second[:, None, :]
    start = first.new_zeros(1)
    return [
        (torch.cat((start, first[image][kept])), torch.cat((start, second[image][kept])))
        for image, kept in enumerate(both)
    ]


def match_batch(
    geometry: ViewGeometry,
    patch_size: int,
    num_teacher: int = 2,
    rule: str = "published",
    class_weight: float | None = None,
) -> TokenMatches:
    """Match every view of the teacher with every other view, for all images of a batch.

    Each (pair of views, image) has the same weight. Its class token and its matched patches share it
    equally, or the class token has its own part of it.

    Args:
        geometry: Boxes, flips and sizes of all views; the teacher sees the first ones.
        patch_size: Side of a patch in px.
        num_teacher: Views that the teacher sees.
        rule: `published` or `containment`.
        class_weight: Part of the class token, in [0, 1]; None counts it like a patch.

    Raises:
        ConfigError: There is no pair of views, or a view is smaller than a patch.
    """
    grids = [(height // patch_size, width // patch_size) for height, width in geometry.sizes]
    if min(min(grid) for grid in grids) < 1:
        raise ConfigError(
            f"views of {geometry.sizes} px cannot be cut into patches of {patch_size} px; enlarge them"
        )
    views, images = geometry.num_views, len(geometry)
    pairs = [(u, v) for u in range(num_teacher) for v in range(views) if u != v]
    if not 0 < num_teacher <= views or not pairs:
        raise ConfigError(
            f"{views} views, {num_teacher} of them for the teacher, give no pair to compare; "
            "make at least two views"
        )
    tokens = [1 + rows * columns for rows, columns in grids]
    offsets = torch.tensor([0, *tokens]).cumsum(0).tolist()
    number = torch.arange(images)
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    share = 1.0 / (len(pairs) * images)
    for u, v in pairs:
        rows, columns = match_axes(geometry, (u, v), (grids[u], grids[v]), rule)
        both = rows.valid[:, :, None] & columns.valid[:, None, :]
        image, row, column = both.nonzero(as_tuple=True)
        first = 1 + rows.first[image, row] * grids[u][1] + columns.first[image, column]
        second = 1 + rows.second[image, row] * grids[v][1] + columns.second[image, column]
        patches = both.sum((1, 2)).double()
        class_part = 1 / (1 + patches)
        if class_weight is not None:
            given = torch.full_like(patches, class_weight)
            class_part = torch.where(patches > 0, given, torch.ones_like(patches))
        patch_part = (1 - class_part) / patches.clamp(min=1)
        # The pairs of the class tokens come first, one per image.
        zeros = torch.zeros(images, dtype=torch.int64)
        image = torch.cat((number, image))
        teacher = image * offsets[num_teacher] + offsets[u] + torch.cat((zeros, first))
        student = offsets[v] * images + image * tokens[v] + torch.cat((zeros, second))
        weight = share * torch.cat((class_part, patch_part[image[images:]]))
        parts.append((image, teacher, student, weight))
    image, teacher, student, weight = (torch.cat(items) for items in zip(*parts, strict=True))
    total = offsets[-1] * images
    # One sort puts the pairs into the order (image, student's token).
    key, order = (image * total + student).sort(stable=True)
    key, place = key.unique_consecutive(return_inverse=True)
    teacher = teacher[order]
    starts = torch.searchsorted(key, torch.arange(images + 1) * total)
    is_class = (teacher % offsets[num_teacher]).unsqueeze(1) == torch.tensor(offsets[:num_teacher])
    return TokenMatches(key % total, starts, place, teacher, weight[order], is_class.any(1))
