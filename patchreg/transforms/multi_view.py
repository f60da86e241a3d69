"""Several random views of one image, with the geometry that relates them.

Letters: V views, S views of one kind.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from patchreg.registry import TRANSFORMS
from patchreg.transforms.photometry import Photometry, apply_to_image
from patchreg.utils.errors import ConfigError
from patchreg.utils.random import shared_seed

GEOMETRIES = ("per_image", "shared")
PHOTOMETRIES = ("loader", "device")
_VIEW_KEYS = {"num", "size", "scale", "ratio", "flip"}


class ViewKind:
    """How views of one kind are cut out of an image.

    Args:
        size: Side of the view in px.
        scale: Least and largest share of the image's area.
        num: How many views of this kind.
        ratio: Least and largest width / height of the box.
        flip: Probability of mirroring left to right.
        photometry: Arguments of `Photometry`.

    Raises:
        ConfigError: A value is out of its range.
    """

    def __init__(
        self,
        size: int,
        scale: Sequence[float],
        num: int = 1,
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        **photometry: Any,
    ) -> None:
        if num < 0 or size < 1:
            raise ConfigError(f"view: num={num}, size={size}: expected num >= 0 and at least 1 px")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ConfigError(f"view: scale={tuple(scale)}: expected 0 < least <= largest <= 1")
        if not 0 < ratio[0] <= ratio[1]:
            raise ConfigError(f"view: ratio={tuple(ratio)}: expected 0 < least <= largest")
        if not 0 <= flip <= 1:
            raise ConfigError(f"view: flip={flip}: expected a probability in [0, 1]")
        self.num, self.size, self.flip = num, size, flip
        self.scale, self.ratio = tuple(scale), tuple(ratio)
        self.photometry = Photometry(**photometry)

    def draw_box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Draw a box from torch's global generator, by torchvision's rule.

        Source:
            `RandomResizedCrop.get_params` of torchvision.

        Args:
            height: Height of the image in px.
            width: Width of the image in px.

        Returns:
            Top, left, height and width in px.
        """
        bounds = torch.log(torch.tensor(self.ratio))
        for _ in range(10):
            area = height * width * torch.empty(1).uniform_(*self.scale).item()
            ratio = torch.exp(torch.empty(1).uniform_(float(bounds[0]), float(bounds[1]))).item()
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top = int(torch.randint(0, height - h + 1, (1,)))
                left = int(torch.randint(0, width - w + 1, (1,)))
                return top, left, h, w
        if width / height < min(self.ratio):
            w, h = width, round(width / min(self.ratio))
        elif width / height > max(self.ratio):
            w, h = round(height * max(self.ratio)), height
        else:
            w, h = width, height
        return (height - h) // 2, (width - w) // 2, h, w

    def draw(self, height: int, width: int) -> tuple[tuple[int, ...], bool, list[float]]:
        """Draw box, mirroring and photometry of one view.

        Args:
            height: Height of the image in px.
            width: Width of the image in px.
        """
        box = self.draw_box(height, width)
        flip = torch.rand(1).item() < self.flip
        return box, flip, self.photometry.draw()


@TRANSFORMS.register_module()
class MultiView:
    """Cut several random views out of an image and pack them, with their geometry, for a batch.

    The image may first be squeezed to a square. Each view is a random box, scaled (bicubic), mirrored
    or not, and changed in colour, all by Pillow. With `photometry='device'` the colours are left to
    the preprocessor (`MultiViewPreprocessor`), which applies what was drawn here.

    Source:
        `DataAugmentationDINO` and the collate function of the official PW-Self.

    Args:
        views: Kinds of views in order, as dicts of arguments of `ViewKind` (`size`, `scale`, `num`,
            `ratio`, `flip`) and `Photometry` (`jitter`, `gray`, `blur`, `solarize`, ...).
        source_size: Side in px to which every image is squeezed first (bilinear, its aspect ratio is
            lost), or None to cut from the image as it is.
        geometry: `per_image` draws for every image on its own; `shared` makes the same draws for all
            images of a global batch, as published.
        photometry: `loader` or `device`.

    Raises:
        ConfigError: A view is described wrongly, there is no view, or `shared` without `source_size`.

    Differs from official:
        No file of torchvision is replaced. There the next batch's seed is drawn from a generator that
        was just seeded with the last one's, so that few different augmentations ever occur; here
        batches are independent.
    """

    def __init__(
        self,
        views: Sequence[dict],
        source_size: int | None = 256,
        geometry: str = "per_image",
        photometry: str = "loader",
    ) -> None:
        if geometry not in GEOMETRIES:
            raise ConfigError(f"geometry='{geometry}': use one of {', '.join(GEOMETRIES)}")
        if photometry not in PHOTOMETRIES:
            raise ConfigError(f"photometry='{photometry}': use one of {', '.join(PHOTOMETRIES)}")
        if geometry == "shared" and source_size is None:
            raise ConfigError(
                "geometry='shared' cuts the same boxes out of all images: set source_size, so that they "
                "have one size"
            )
        kinds = []
        for number, view in enumerate(views):
            try:
                kinds.append(ViewKind(**view))
            except TypeError as error:
                known = sorted({*_VIEW_KEYS, *Photometry.__dataclass_fields__})
                raise ConfigError(
                    f"views.{number} of MultiView: {error}; known: {', '.join(known)}"
                ) from error
        self.kinds = [kind for kind in kinds for _ in range(kind.num)]
        if not self.kinds:
            raise ConfigError("MultiView has no view; give at least one with num >= 1")
        self.source_size = source_size
        self.geometry = geometry
        self.photometry = photometry

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Return the packed views.

        Args:
            results: Sample with `img`, [H, W, 3] uint8 RGB.

        Returns:
            `inputs`: V tensors [3, size, size] uint8; `views`: a dict of `boxes` [V, 4] int64 (top,
            left, height, width in px of the source), `flips` [V] bool and `photometry` [V, 12], what
            is left to do.
        """
        from PIL import Image

        image = Image.fromarray(results["img"])
        if self.source_size is not None and image.size != (self.source_size, self.source_size):
            # Like the tensors of torchvision, a copy of the same size is not resampled.
            image = image.resize((self.source_size, self.source_size), Image.Resampling.BILINEAR)
        if self.geometry == "shared":
            seed = shared_seed()
            random.seed(seed)
            torch.default_generator.manual_seed(seed)
        drawn = [kind.draw(image.height, image.width) for kind in self.kinds]
        inputs = [
            self.view(image, kind.size, *draw) for kind, draw in zip(self.kinds, drawn, strict=True)
        ]
        settings = [draw[2] for draw in drawn] if self.photometry == "device" else []
        views = {
            "boxes": torch.tensor([draw[0] for draw in drawn]),
            "flips": torch.tensor([draw[1] for draw in drawn]),
            "photometry": torch.tensor(settings, dtype=torch.float32),
        }
        return {"inputs": inputs, "views": views}

    def view(
        self, image: Any, size: int, box: Sequence[int], flip: bool, settings: list[float]
    ) -> torch.Tensor:
        """Cut out one view.

        Args:
            image: Pillow image.
            size: Side of the view in px.
            box: Top, left, height and width in px.
            flip: Whether to mirror.
            settings: Drawn photometry.

        Shape:
            Returns [3, size, size] uint8.
        """
        from PIL import Image

        top, left, height, width = box
        view = image.crop((left, top, left + width, top + height))
        view = view.resize((size, size), Image.Resampling.BICUBIC)
        if flip:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.photometry == "loader":
            view = apply_to_image(view, settings)
        return torch.from_numpy(np.array(view)).permute(2, 0, 1).contiguous()

    def __repr__(self) -> str:
        sizes = [kind.size for kind in self.kinds]
        return (
            f"MultiView(sizes={sizes}, source_size={self.source_size}, geometry={self.geometry!r}, "
            f"photometry={self.photometry!r})"
        )
