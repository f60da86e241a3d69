"""From image files to what the test pipeline of a config makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import init_default_scope

from patchreg.runner.build import EngineRunner, config_errors
from patchreg.utils.errors import DataError, MissingFileError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"}


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
    if source == "test":
        with config_errors("the test data cannot be read"):
            dataset: Any = EngineRunner.build_dataloader(config.test_dataloader, seed=0).dataset
        step = max(1, len(dataset) // count)
        return [dataset[index * step] for index in range(min(count, len(dataset)))]
    place = Path(source)
    if not place.exists():
        raise MissingFileError(
            f"image '{source}' does not exist; give a file, a folder of images, or 'test'"
        )
    files = [place]
    if place.is_dir():
        files = sorted(item for item in place.rglob("*") if item.suffix.lower() in SUFFIXES)[:count]
        if not files:
            raise DataError(f"folder '{source}' holds no image ({', '.join(sorted(SUFFIXES))})")
    init_default_scope(config.get("default_scope", "patchreg"))
    steps = [dict(item) for item in config.test_dataloader.dataset.pipeline]
    if not any(step["type"] == "LoadImage" for step in steps):
        # Data sets that live in memory have no loading step; their images have the model's size.
        steps.insert(0, dict(type="LoadImage"))
        side = config.model.get("backbone", {}).get("img_size")
        scale = (side, side) if side else _stored_size(config)
        steps.insert(1, dict(type="mmpretrain.Resize", scale=scale, backend="pillow"))
    pipeline = Compose(steps)
    return [pipeline(dict(img_path=str(file), img_prefix=None)) for file in files]


def _stored_size(config: Config) -> tuple[int, int]:
    """Return width and height of the images of a test set that lives in memory."""
    shape = read_samples("test", config, 1)[0]["inputs"].shape
    return int(shape[-1]), int(shape[-2])


def model_classes(config: Config) -> list[str]:
    """Return the class names of the test set, or an empty list when it does not tell.

    Args:
        config: Config with a test set.
    """
    from patchreg.registry import DATASETS

    try:
        dataset = DATASETS.build(config.test_dataloader.dataset)
    except (DataError, MissingFileError):
        return []
    return list(getattr(dataset, "metainfo", {}).get("classes", ()))
