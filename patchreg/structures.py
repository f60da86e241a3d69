"""The vocabulary that all methods share: which patches, at what cost; where views were cut out.

Letters: B images, P candidate cells of the grid in raster order, K cells or boxes in the order looked at.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class PatchSelection:
    """Which patches a method looked at, in which order, how finely and at what cost.

    Every method answers with it, and every picture, ranking, comparison and combination reads it.

    Args:
        image_size: Height and width in px of the image the cells refer to.
        grid: Rows and columns of the candidate cells, or None for free boxes.
        score: Importance of each cell, higher first.
        keep: Cells looked at, at any resolution above the method's default.
        resolution: Share of full sampling spent on each cell, in [0, 1].
        order: Cells in the order looked at, -1 for none.
        boxes: The same as boxes in px (x0, y0, x1, y1), half-open; rows without a box are -1.
        log_prob: Log-probability of the sampled choice, or None for a deterministic one.
        macs: Multiply-accumulates executed for each image.
        dense_macs: Multiply-accumulates of the dense twin for one image.

    Shape:
        score, keep, resolution [B, P]; order [B, K]; boxes [B, K, 4]; log_prob, macs [B]. With `grid` None, P
        equals K and score, keep and resolution speak of the boxes.
    """

    image_size: tuple[int, int]
    grid: tuple[int, int] | None
    score: Tensor
    keep: Tensor
    resolution: Tensor
    order: Tensor
    boxes: Tensor
    log_prob: Tensor | None = None
    macs: Tensor | None = None
    dense_macs: float | None = None

    @classmethod
    def from_grid(
        cls,
        image_size: tuple[int, int],
        grid: tuple[int, int],
        score: Tensor,
        keep: Tensor,
        resolution: Tensor,
        order: Tensor | None = None,
        log_prob: Tensor | None = None,
        macs: Tensor | None = None,
        dense_macs: float | None = None,
    ) -> PatchSelection:
        """Build a selection over a regular grid; order and boxes follow from it.

        Without `order`, kept cells come by descending score, the lower index first on ties.

        Args:
            image_size: Height and width in px.
            grid: Rows and columns; a last row or column may stick out of the image and is clipped.
            score: Importance of each cell.
            keep: Cells looked at.
            resolution: Share of full sampling per cell.
            order: Cells in the order looked at, -1 for none.
            log_prob: Log-probability of the sampled choice.
            macs: Multiply-accumulates per image.
            dense_macs: Multiply-accumulates of the dense twin.

        Shape:
            As in the class.

        Raises:
            ValueError: A field has the wrong shape, type or range.
        """
        if keep.dtype != torch.bool:
            raise ValueError(f"keep has type {keep.dtype}; expected torch.bool")
        if score.ndim != 2 or score.shape[1] != grid[0] * grid[1] or keep.shape != score.shape:
            raise ValueError(
                f"grid {grid} has {grid[0] * grid[1]} cells, score has shape {tuple(score.shape)}, keep "
                f"{tuple(keep.shape)}; expected [B, {grid[0] * grid[1]}] for both"
            )
        if order is None:
            # Cells that are not kept sort behind all others and become -1.
            rank = torch.where(keep, score.double(), torch.full_like(score, -torch.inf).double())
            order = rank.argsort(dim=1, descending=True, stable=True)
            width = int(keep.sum(1).max()) if keep.numel() else 0
            order = torch.where(keep.gather(1, order), order, -1)[:, :width]
        selection = cls(
            image_size=image_size,
            grid=grid,
            score=score,
            keep=keep,
            resolution=resolution,
            order=order,
            boxes=grid_boxes(image_size, grid, order),
            log_prob=log_prob,
            macs=macs,
            dense_macs=dense_macs,
        )
        selection.validate()
        return selection

    @classmethod
    def of_all(
        cls,
        image_size: tuple[int, int],
        grid: tuple[int, int],
        score: Tensor | None = None,
        resolution: Tensor | None = None,
        macs: Tensor | None = None,
        dense_macs: float | None = None,
    ) -> PatchSelection:
        """Build a selection that keeps every cell of a grid, ordered by the scores.

        Args:
            image_size: Height and width in px.
            grid: Rows and columns.
            score: Importance of each cell; None for the same everywhere, of as many images as `macs` has.
            resolution: Share of full sampling per cell; None for 1.
            macs: Multiply-accumulates per image.
            dense_macs: Those of the dense twin.

        Shape:
            As in the class.

        Raises:
            ValueError: A field has the wrong shape, type or range.
        """
        if score is None:
            if macs is None:
                raise ValueError("neither score nor macs tells how many images there are")
            score = torch.ones(len(macs), grid[0] * grid[1], device=macs.device)
        return cls.from_grid(
            image_size=image_size,
            grid=grid,
            score=score,
            keep=torch.ones_like(score, dtype=torch.bool),
            resolution=torch.ones_like(score) if resolution is None else resolution,
            macs=macs,
            dense_macs=dense_macs,
        )

    def __len__(self) -> int:
        return self.score.shape[0]

    def __getitem__(self, index: int | slice | Tensor) -> PatchSelection:
        """Take some images; an integer keeps the batch dimension."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"image {index} of a selection of {len(self)} images")
            index = index % len(self)
            index = slice(index, index + 1)
        return self._map(lambda tensor: tensor[index])

    def tiles(self) -> bool:
        """Return whether the cells tile the image, as those of a plain grid do; windows may overlap."""
        if self.grid is None:
            return False
        boxes = grid_boxes(self.image_size, self.grid, self.order)
        return torch.equal(boxes.to(self.boxes), self.boxes)

    def pixel_shares(self) -> Tensor:
        """Return at which share of full sampling each pixel was looked at.

        Cells that tile the image all count. Of windows those that were looked at do, the finest one where
        they overlap; the rest of the image counts with the lowest resolution of the windows that were left
        out (a coarse view of the whole), or with 0 when none were.

        Shape:
            Returns float64 [B, H, W] in [0, 1].
        """
        height, width = self.image_size
        shares = self.resolution.double()
        rows = torch.arange(height, device=shares.device)
        columns = torch.arange(width, device=shares.device)
        if self.grid is not None and self.tiles():
            down = torch.div(rows * self.grid[0], height, rounding_mode="floor")
            across = torch.div(columns * self.grid[1], width, rounding_mode="floor")
            return shares.unflatten(1, self.grid)[:, down[:, None], across]
        left = torch.where(self.keep, torch.inf, shares)
        base = left.amin(1) if left.shape[1] else left.new_full((len(left),), torch.inf)
        base = torch.where(base.isfinite(), base, 0.0)
        canvas = base[:, None, None].expand(-1, height, width).clone()
        for place in range(self.order.shape[1]):
            cells = self.order[:, place]
            share = shares.gather(1, cells.clamp(min=0)[:, None])[:, :, None]
            x0, y0, x1, y1 = self.boxes[:, place].double().unbind(1)
            tall = (rows + 0.5 > y0[:, None]) & (rows + 0.5 < y1[:, None])
            wide = (columns + 0.5 > x0[:, None]) & (columns + 0.5 < x1[:, None])
            inside = tall[:, :, None] & wide[:, None, :] & (cells >= 0)[:, None, None]
            canvas = torch.where(inside, torch.maximum(canvas, share), canvas)
        return canvas

    def sampled_share(self) -> Tensor:
        """Return how much of each image was sampled: the mean of `pixel_shares`.

        Shape:
            Returns float64 [B] in [0, 1].
        """
        return self.pixel_shares().mean((1, 2))

    def to(self, *args: Any, **kwargs: Any) -> PatchSelection:
        """Move the tensors, as `torch.Tensor.to` does, without changing their types.

        Args:
            args: Device, as for a tensor.
            kwargs: As for a tensor.
        """
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def _map(self, function: Any) -> PatchSelection:
        changed = {
            field.name: function(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **changed)

    @staticmethod
    def cat(parts: list[PatchSelection]) -> PatchSelection:
        """Concatenate the images of several selections with one image size and grid.

        Args:
            parts: At least one selection; orders of different length are padded with -1.

        Raises:
            ValueError: The list is empty, or image sizes, grids or optional fields differ.
        """
        if not parts:
            raise ValueError("cannot concatenate an empty list of selections")
        first = parts[0]
        for part in parts[1:]:
            if (part.image_size, part.grid) != (first.image_size, first.grid):
                raise ValueError(
                    f"selections of image size {part.image_size}, grid {part.grid} and of image size "
                    f"{first.image_size}, grid {first.grid} do not fit together; concatenate equal ones only"
                )
        width = max(part.order.shape[1] for part in parts)

        def joined(name: str) -> Tensor | None:
            tensors = [getattr(part, name) for part in parts]
            if all(tensor is None for tensor in tensors):
                return None
            if any(tensor is None for tensor in tensors):
                raise ValueError(
                    f"'{name}' is set in some of the selections only; set it in all or none"
                )
            ragged = name in ("order", "boxes") or first.grid is None
            if ragged and tensors[0].ndim > 1:
                tensors = [_pad_columns(tensor, width) for tensor in tensors]
            return torch.cat(tensors)

        names = ("score", "keep", "resolution", "order", "boxes", "log_prob", "macs")
        fields: dict[str, Any] = {name: joined(name) for name in names}
        return dataclasses.replace(first, **fields)

    def validate(self) -> None:
        """Check shapes, types and ranges of all fields against the table of the vocabulary.

        Raises:
            ValueError: Names the field, what it holds and what was expected.
        """
        height, width = self.image_size
        if height < 1 or width < 1:
            raise ValueError(
                f"image_size {self.image_size}: expected (height, width) in px, both > 0"
            )
        if self.score.ndim != 2:
            raise ValueError(f"score has shape {tuple(self.score.shape)}; expected [B, P]")
        images, cells = self.score.shape
        if self.order.ndim != 2 or self.order.shape[0] != images:
            raise ValueError(f"order has shape {tuple(self.order.shape)}; expected [{images}, K]")
        if self.grid is not None and self.grid[0] * self.grid[1] != cells:
            raise ValueError(
                f"grid {self.grid} has {self.grid[0] * self.grid[1]} cells but score has {cells}"
            )
        looked = self.order.shape[1]
        if self.grid is None and cells != looked:
            raise ValueError(
                f"free boxes: score has {cells} columns, order has {looked}; expected equal"
            )
        shapes = {
            "keep": (images, cells),
            "resolution": (images, cells),
            "boxes": (images, looked, 4),
            "log_prob": (images,),
            "macs": (images,),
        }
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {list(shape)}")
        types = {"keep": torch.bool, "order": torch.int64, "macs": torch.float64}
        for name, dtype in types.items():
            value = getattr(self, name)
            if value is not None and value.dtype != dtype:
                raise ValueError(f"{name} has type {value.dtype}; expected {dtype}")
        for name in ("score", "resolution", "boxes"):
            if not getattr(self, name).is_floating_point():
                raise ValueError(
                    f"{name} has type {getattr(self, name).dtype}; expected a floating type"
                )
        if images == 0:
            return
        if not bool(torch.isfinite(self.score).all()):
            raise ValueError("score holds values that are not finite")
        if bool(((self.resolution < 0) | (self.resolution > 1 + 1e-6)).any()):
            raise ValueError("resolution holds values outside [0, 1]")
        valid = self.order >= 0
        if bool((self.order < -1).any()) or bool((self.order >= cells).any()):
            raise ValueError(f"order holds cells outside -1..{cells - 1}")
        if bool((valid[:, 1:] & ~valid[:, :-1]).any()):
            raise ValueError("order has -1 before a cell; -1 only pads the end")
        seen = torch.zeros_like(self.keep, dtype=torch.int64)
        seen.scatter_add_(1, self.order.clamp(min=0), valid.long())
        if bool((seen > 1).any()):
            raise ValueError("order names a cell twice")
        if bool(((seen > 0) != self.keep).any()):
            raise ValueError("keep and order disagree: the cells of order are those that are kept")
        x0, y0, x1, y1 = self.boxes.unbind(-1)
        inside = (x0 >= 0) & (y0 >= 0) & (x1 <= width) & (y1 <= height) & (x0 < x1) & (y0 < y1)
        if bool((valid & ~inside).any()):
            raise ValueError(f"boxes lie outside the image of {height} x {width} px or are empty")
        if (self.macs is None) != (self.dense_macs is None):
            raise ValueError("macs and dense_macs belong together: set both or none")
        if self.macs is not None and bool((self.macs <= 0).any()):
            raise ValueError("macs holds values that are not positive")


@dataclass(eq=False)
class ViewGeometry:
    """Where the views of images were cut out, and which of them are mirrored.

    A view shows its box of the source image, scaled to the view's size and then, if flipped, mirrored
    left to right. Views of one image share the coordinates of one source image.

    Args:
        boxes: Top, left, height and width in px of the source, as torchvision's crops give them.
        flips: Whether a view is mirrored.
        sizes: Height and width in px of each view.

    Shape:
        boxes [B, V, 4]; flips [B, V] bool; V sizes.
    """

    boxes: Tensor
    flips: Tensor
    sizes: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return self.boxes.shape[0]

    @property
    def num_views(self) -> int:
        """Views of each image."""
        return len(self.sizes)

    def to(self, *args: Any, **kwargs: Any) -> ViewGeometry:
        """Move the tensors, as `torch.Tensor.to` does, without changing their types.

        Args:
            args: Device, as for a tensor.
            kwargs: As for a tensor.
        """
        return ViewGeometry(
            self.boxes.to(*args, **kwargs), self.flips.to(*args, **kwargs), self.sizes
        )

    def centres(self, view: int, grid: tuple[int, int]) -> Tensor:
        """Return where the centres of a view's patches lie in the source.

        Args:
            view: Which view.
            grid: Rows and columns of patches the view is cut into.

        Shape:
            Returns [B, rows * columns, 2] float64 (y, x) in px.
        """
        top, left, height, width = self.boxes[:, view].double().unbind(-1)
        rows, columns = grid
        device = self.boxes.device
        y = (torch.arange(rows, device=device, dtype=torch.float64) + 0.5) / rows
        x = (torch.arange(columns, device=device, dtype=torch.float64) + 0.5) / columns
        x = torch.where(self.flips[:, view, None], 1.0 - x, x)
        y = top[:, None] + height[:, None] * y
        x = left[:, None] + width[:, None] * x
        centres = torch.stack(
            (y[:, :, None].expand(-1, -1, columns), x[:, None, :].expand(-1, rows, -1)), dim=-1
        )
        return centres.flatten(1, 2)

    def validate(self) -> None:
        """Check shapes, types and ranges.

        Raises:
            ValueError: Names the field, what it holds and what was expected.
        """
        if self.boxes.ndim != 3 or tuple(self.boxes.shape[1:]) != (self.num_views, 4):
            raise ValueError(
                f"boxes have shape {tuple(self.boxes.shape)}; expected [B, {self.num_views}, 4]"
            )
        if self.flips.shape != self.boxes.shape[:2] or self.flips.dtype != torch.bool:
            raise ValueError(
                f"flips have shape {tuple(self.flips.shape)} and type {self.flips.dtype}; expected "
                f"{list(self.boxes.shape[:2])} and torch.bool"
            )
        if any(min(size) < 1 for size in self.sizes) or bool((self.boxes[..., 2:] <= 0).any()):
            raise ValueError("a view or its box is empty; expected at least 1 px on each side")


def _pad_columns(tensor: Tensor, width: int) -> Tensor:
    missing = width - tensor.shape[1]
    if missing == 0:
        return tensor
    value = False if tensor.dtype == torch.bool else -1
    if tensor.dtype.is_floating_point and tensor.ndim == 2:
        value = 0
    tail = tensor.new_full((tensor.shape[0], missing, *tensor.shape[2:]), value)
    return torch.cat((tensor, tail), dim=1)


def grid_boxes(image_size: tuple[int, int], grid: tuple[int, int], order: Tensor) -> Tensor:
    """Return the boxes of grid cells; cell edges lie at equal distances and are clipped to the image.

    Args:
        image_size: Height and width in px.
        grid: Rows and columns.
        order: Cells, -1 for none.

    Shape:
        order [B, K]; returns [B, K, 4] float32 (x0, y0, x1, y1), -1 where order is -1.
    """
    height, width = image_size
    rows, columns = grid
    cell_height, cell_width = -(-height // rows), -(-width // columns)
    y0 = torch.div(order, columns, rounding_mode="floor") * cell_height
    x0 = order.remainder(columns) * cell_width
    edges = (
        x0.clamp(max=width),
        y0.clamp(max=height),
        (x0 + cell_width).clamp(max=width),
        (y0 + cell_height).clamp(max=height),
    )
    boxes = torch.stack(edges, dim=-1).float()
    return torch.where((order >= 0).unsqueeze(-1), boxes, torch.full_like(boxes, -1.0))
