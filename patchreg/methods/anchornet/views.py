"""What the downstream networks get to see: the shrunk image, windows, five crops.

Letters: B images, S images of a pool, H x W image, n views, s side of a view.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from patchreg.methods.anchornet.trunk import Window
from patchreg.utils.errors import DataError


def resized_view(images: Tensor, side: int) -> Tensor:
    """Shrink images to a square: bicubic, corners aligned, no antialiasing.

    Source:
        `train_downnet_resized.py` of the official repository.

    Args:
        images: Preprocessed images.
        side: Side in px.

    Shape:
        images [B, 3, H, W]; returns [B, 3, s, s].
    """
    return F.interpolate(images, size=(side, side), mode="bicubic", align_corners=True)


def crop_windows(pool: Tensor, rows: Tensor, cells: Tensor, window: Window) -> Tensor:
    """Cut windows out of images; nothing waits for the device.

    Args:
        pool: Preprocessed images.
        rows: Image of the pool for each window.
        cells: Cell of each window in raster order; a negative one is taken as cell 0.
        window: Geometry of the cells.

    Shape:
        pool [S, 3, H, W]; rows, cells [n]; returns [n, 3, s, s].
    """
    side, stride = window.side, window.stride
    views = pool.unfold(2, side, stride).unfold(3, side, stride)
    cells = cells.clamp(min=0)
    columns = views.shape[3]
    i = torch.div(cells, columns, rounding_mode="floor")
    return views[rows, :, i, cells.remainder(columns)]


def five_crop_origins(height: int, width: int, side: int) -> list[tuple[int, int]]:
    """Return top and left of the four corner crops and the centre crop, in torchvision's order.

    Args:
        height: Height of the image in px.
        width: Width of the image in px.
        side: Side of the crops in px.

    Raises:
        DataError: A crop does not fit.
    """
    if min(height, width) < side:
        raise DataError(
            f"five crops of {side} px do not fit into an image of {height} x {width} px; use larger images"
        )
    down, right = height - side, width - side
    return [(0, 0), (0, right), (down, 0), (down, right), (round(down / 2), round(right / 2))]


def five_crops(images: Tensor, side: int) -> Tensor:
    """Cut the four corners and the centre, image by image.

    Source:
        `torchvision.transforms.FiveCrop`, as in `train_downnet_patch.py`.

    Args:
        images: Preprocessed images.
        side: Side in px.

    Shape:
        images [B, 3, H, W]; returns [5 * B, 3, s, s].
    """
    origins = five_crop_origins(images.shape[2], images.shape[3], side)
    crops = [images[..., y : y + side, x : x + side] for y, x in origins]
    return torch.stack(crops, dim=1).flatten(0, 1)
