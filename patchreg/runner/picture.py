"""From images in any form to what the test pipeline of a config makes of them."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import init_default_scope
from torch import Tensor

from patchreg.runner.build import EngineRunner, config_errors
from patchreg.transforms.loading import to_rgb8
from patchreg.utils.errors import ConfigError, DataError, InputTypeError, MissingFileError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"}
TEST = "test"
FORMS = (
    "a file, a folder, a PIL image, uint8 [H, W, 3] or [B, H, W, 3] as a NumPy array, uint8 or float "
    "in [0, 1] as a tensor [3, H, W] or [B, 3, H, W], or a list of these; colours are RGB"
)


class ImageReader:
    """Turn images in any form into samples of a model, by the test pipeline of its config.

    Where that pipeline makes several views of an image, as pre-training does, or there is none, the
    shorter side is scaled to the model's size and the centre is cut out.

    Args:
        config: Config of the model.
        side: Side in px of the model's images where the test pipeline does not tell, or None.
    """

    def __init__(self, config: Config, side: int | None = None) -> None:
        self.config = config
        stated = side or config.model.get("backbone", {}).get("img_size")
        self.side = stated if isinstance(stated, int) else None
        self._pipeline: Any = None
        init_default_scope(config.get("default_scope", "patchreg"))

    def read(self, images: Any, count: int | None = None) -> Iterator[dict[str, Any]]:
        """Read images one after another.

        Args:
            images: One of `FORMS`, or `test` for the config's test set.
            count: How many at most, of a test set evenly spread; None for all.

        Raises:
            UserError: An image is missing, cannot be read, or is of another form.
        """
        if isinstance(images, str) and images == TEST:
            yield from self._test_set(count)
            return
        for number, image in enumerate(each_image(images)):
            if number == count:
                return
            yield self._sample(image)

    def _test_set(self, count: int | None) -> Iterator[dict[str, Any]]:
        if self.config.get("test_dataloader") is None:
            raise ConfigError(
                f"'{self.config.filename}' has no test set; name an image or a folder"
            )
        loader = copy.deepcopy(self.config.test_dataloader)
        dataset = _dataset_of(loader)
        count = len(dataset) if count is None else min(count, len(dataset))
        if count and not isinstance(dataset[0]["inputs"], Tensor):
            loader.dataset.pipeline = self._plain_steps()
            dataset = _dataset_of(loader)
        step = max(1, len(dataset) // max(count, 1))
        for index in range(count):
            yield dataset[index * step]

    def _sample(self, image: str | np.ndarray) -> dict[str, Any]:
        def packed(pipeline: Any) -> dict[str, Any]:
            if isinstance(image, str):
                return pipeline(dict(img_path=image, img_prefix=None))
            return pipeline(dict(img=image))

        if self._pipeline is None:
            self._pipeline = self._test_pipeline()
            if not isinstance(packed(self._pipeline)["inputs"], Tensor):
                self._pipeline = Compose(self._plain_steps())
        return packed(self._pipeline)

    def _test_pipeline(self) -> Any:
        loader = self.config.get("test_dataloader")
        if loader is None:
            return Compose(self._plain_steps())
        steps = [dict(item) for item in loader.dataset.pipeline]
        if not any(step["type"] == "LoadImage" for step in steps):
            # Data sets that live in memory have no loading step; their images have the model's size.
            scale = (self.side, self.side) if self.side else self._stored_size()
            resize = dict(type="mmpretrain.Resize", scale=scale, backend="pillow")
            steps = [dict(type="LoadImage"), resize, *steps]
        return Compose(steps)

    def _plain_steps(self) -> list[dict[str, Any]]:
        if self.side is None:
            raise ConfigError(
                f"'{self.config.filename}' does not tell how images are read: it has no test_dataloader "
                "with single views and its model no img_size; use the config of an evaluation"
            )
        return plain_pipeline(self.side)

    def _stored_size(self) -> tuple[int, int]:
        """Return width and height of the images of a test set that lives in memory."""
        shape = next(self._test_set(1))["inputs"].shape
        return int(shape[-1]), int(shape[-2])


def _dataset_of(loader: Any) -> Any:
    with config_errors("the test data cannot be read"):
        return EngineRunner.build_dataloader(loader, seed=0).dataset


def plain_pipeline(side: int) -> list[dict[str, Any]]:
    """Return the steps that read an image, scale its shorter side and cut out the centre.

    Args:
        side: Side of the square in px.
    """
    return [
        dict(type="LoadImage"),
        dict(type="mmpretrain.ResizeEdge", scale=side, edge="short", backend="pillow"),
        dict(type="mmpretrain.CenterCrop", crop_size=side),
        dict(type="mmpretrain.PackInputs"),
    ]


def read_samples(source: str, config: Config, count: int) -> list[Any]:
    """Read images the way the test pipeline of a config does.

    Args:
        source: Image file, folder of images, or `test` for the config's test set.
        config: Config whose test pipeline is used.
        count: How many images at most.

    Raises:
        MissingFileError: The file or folder does not exist.
        DataError: The folder holds no image.
    """
    return list(ImageReader(config).read(source, count))


def each_image(images: Any) -> Iterator[str | np.ndarray]:
    """Return the single images of any form: paths, or pixels.

    Args:
        images: One of `FORMS`.

    Shape:
        Pixels are [H, W, 3] uint8.

    Raises:
        InputTypeError: They have another form.
        MissingFileError: The file or folder does not exist.
        DataError: There is no image, or a float tensor leaves [0, 1].
    """
    if isinstance(images, (str, os.PathLike)):
        yield from _files(Path(images))
    elif isinstance(images, (list, tuple)):
        if not images:
            raise DataError(f"an empty list holds no image; expected {FORMS}")
        for image in images:
            yield from each_image(image)
    elif isinstance(images, Tensor):
        yield from _of_array(_bytes_of(images).permute(*_last(images.ndim)).numpy(), images)
    elif isinstance(images, np.ndarray):
        yield from _of_array(images, images)
    else:
        yield _of_pil(images)


def _of_pil(image: Any) -> np.ndarray:
    from PIL import Image

    if not isinstance(image, Image.Image):
        raise InputTypeError(f"{type(image).__name__} is no image; expected {FORMS}")
    try:
        return np.array(to_rgb8(image))
    except (ValueError, OSError) as error:
        raise DataError(f"the PIL image cannot be used: {error}") from error


def _files(place: Path) -> Iterator[str]:
    if not place.exists():
        raise MissingFileError(
            f"image '{place}' does not exist; give a file, a folder of images, or '{TEST}'"
        )
    if not place.is_dir():
        yield str(place)
        return
    files = sorted(item for item in place.rglob("*") if item.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"folder '{place}' holds no image ({', '.join(sorted(SUFFIXES))})")
    yield from map(str, files)


def _last(dimensions: int) -> tuple[int, ...]:
    """Return the order of dimensions that puts the colours last."""
    return (*range(dimensions - 3), -2, -1, -3) if dimensions >= 3 else tuple(range(dimensions))


def _bytes_of(images: Tensor) -> Tensor:
    images = images.detach().cpu()
    if not images.is_floating_point():
        return images
    if images.numel() and not bool(((images >= 0) & (images <= 1)).all()):
        low, high = images.aminmax()
        raise DataError(
            f"a float tensor holds values from {low:.4g} to {high:.4g}; expected colours in [0, 1], not "
            "normalised (the model does that): pass uint8, or divide by 255"
        )
    return (images.float() * 255).round().to(torch.uint8)


def _of_array(pixels: np.ndarray, given: Any) -> Iterator[np.ndarray]:
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[-1] != 3:
        raise InputTypeError(
            f"{type(given).__name__} of {given.dtype} with shape {tuple(given.shape)} is no image; "
            f"expected {FORMS}"
        )
    if 0 in pixels.shape:
        raise DataError(f"images of shape {tuple(given.shape)} are empty")
    for image in pixels if pixels.ndim == 4 else (pixels,):
        yield np.ascontiguousarray(image)


def model_classes(config: Config) -> list[str]:
    """Return the class names of the test set, or an empty list when it does not tell.

    Args:
        config: Config with a test set.
    """
    from patchreg.registry import DATASETS

    if config.get("test_dataloader") is None:
        return []
    try:
        dataset = DATASETS.build(config.test_dataloader.dataset)
    except (DataError, MissingFileError):
        return []
    return list(getattr(dataset, "metainfo", {}).get("classes", ()))
