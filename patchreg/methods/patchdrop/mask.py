"""Cutting an image into the cells of a grid, and erasing the cells that were not acquired.

Letters: B images, C channels, H x W px, P = rows * columns cells in raster order, p px per cell.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from patchreg.utils.errors import DataError


def check_actions(actions: Tensor, cells: int) -> None:
    """Refuse actions that are not zeros and ones for every cell.

    Args:
        actions: Keep decisions.
        cells: Cells P of the grid.

    Shape:
        actions [B, P].

    Raises:
        DataError: Another shape, or other values (NaN among them).
    """
    if cells < 1 or actions.ndim != 2 or actions.shape[1] != cells:
        raise DataError(f"actions have shape {tuple(actions.shape)}; expected [B, {cells}]")
    if torch.compiler.is_compiling():
        # A compiler captures no check of values.
        return
    wrong = (actions != 0) & (actions != 1)
    if bool(wrong.any()):
        value = actions[wrong].flatten()[0].item()
        raise DataError(f"actions hold {value}; a patch is kept (1) or dropped (0)")


def cell_size(
    image_size: tuple[int, int], grid: tuple[int, int], patch_size: int | None = None
) -> tuple[int, int]:
    """Return the height and width of a cell in px.

    Args:
        image_size: Height and width in px.
        grid: Rows and columns.
        patch_size: Side of the cells when the grid does not cover the image, or None.

    Raises:
        DataError: The grid does not divide the image, or sticks out of it.
    """
    (height, width), (rows, columns) = image_size, grid
    if patch_size is not None:
        if rows * patch_size > height or columns * patch_size > width:
            raise DataError(
                f"a grid of {rows} x {columns} patches of {patch_size} px does not fit into an "
                f"image of {height} x {width} px"
            )
        return patch_size, patch_size
    if height % rows or width % columns:
        raise DataError(
            f"an image of {height} x {width} px cannot be cut into {rows} x {columns} equal "
            "patches; resize or crop it to a multiple, or change the grid"
        )
    return height // rows, width // columns


def expand_actions(
    actions: Tensor,
    image_size: tuple[int, int],
    grid: tuple[int, int],
    patch_size: int | None = None,
) -> Tensor:
    """Turn decisions per cell into a mask per pixel; pixels outside the grid are dropped.

    Args:
        actions: Keep decisions, row by row.
        image_size: Height and width in px.
        grid: Rows and columns.
        patch_size: Side of the cells when the grid does not cover the image, or None.

    Shape:
        actions [B, P]; returns [B, 1, H, W].
    """
    height, width = cell_size(image_size, grid, patch_size)
    mask = actions.reshape(-1, 1, *grid)
    mask = mask.repeat_interleave(height, dim=2).repeat_interleave(width, dim=3)
    right, below = image_size[1] - mask.shape[3], image_size[0] - mask.shape[2]
    return F.pad(mask, (0, right, 0, below)) if right or below else mask


def mask_patches(
    images: Tensor,
    actions: Tensor,
    grid: tuple[int, int] = (4, 4),
    patch_size: int | None = None,
    fill: Tensor | None = None,
) -> Tensor:
    """Erase the patches that were not kept.

    Zero is the mean colour of the data set, because images are normalised.

    Source:
        `utils.agent_chosen_input` of the PatchDrop repository.

    Args:
        images: Normalised images.
        actions: 1 or True for the patches to keep, row by row.
        grid: Rows and columns.
        patch_size: Side of the cells when the grid does not cover the image, or None.
        fill: What dropped pixels become; None for zero.

    Shape:
        images, fill [B, C, H, W]; actions [B, P]; returns [B, C, H, W].

    Raises:
        DataError: Actions other than 0 and 1, or a grid that does not fit.

    Differs from official:
        One multiplication on the device instead of a loop over patches on the host.
    """
    check_actions(actions, grid[0] * grid[1])
    rows, columns = grid
    height, width = images.shape[2:]
    if patch_size is None and fill is None:
        cells = cell_size((height, width), grid)
        # A mask of one pixel row per row of cells: it stays in the cache, which one of the image's
        # size does not, and whole pixel rows are multiplied at once.
        batch = images.shape[0]
        blocks = images.reshape(batch, -1, rows, cells[0], width)
        kept = actions.to(images.dtype).reshape(batch, 1, rows, 1, columns)
        return (blocks * kept.repeat_interleave(cells[1], dim=4)).reshape(images.shape)
    mask = expand_actions(actions.to(images.dtype), (height, width), grid, patch_size)
    if fill is None:
        return images * mask
    return torch.where(mask.bool(), images, fill)


def cut_patches(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cut images into their patches.

    Args:
        images: Images.
        grid: Rows and columns; they divide the image.

    Shape:
        images [B, C, H, W]; returns [B, P, C, H / rows, W / columns].
    """
    rows, columns = grid
    height, width = cell_size((images.shape[2], images.shape[3]), grid)
    patches = images.unflatten(2, (rows, height)).unflatten(4, (columns, width))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
