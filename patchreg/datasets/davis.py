"""DAVIS 2017: video sequences with object masks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from patchreg.registry import DATASETS
from patchreg.utils.errors import ConfigError, DataError, MissingFileError

_LAYOUT = (
    "Expected the layout of DAVIS-2017-trainval-480p: JPEGImages/480p/<sequence>/00000.jpg ..., "
    "Annotations/480p/<sequence>/00000.png ... and ImageSets/2017/<split>.txt"
)


class VideoSequence:
    """Frames and masks of one video, read when they are asked for.

    Args:
        name: Name of the sequence.
        frames: Files of the frames, in order.
        masks: Files of the masks, one per frame.
        short_side: Shorter side in px to which frames are scaled; the longer one is cut down to a
            multiple of `divisor`.
        divisor: See above.
    """

    def __init__(
        self,
        name: str,
        frames: Sequence[str],
        masks: Sequence[str],
        short_side: int = 480,
        divisor: int = 64,
    ) -> None:
        self.name = name
        self.frames = list(frames)
        self.masks = list(masks)
        self.short_side = short_side
        self.divisor = divisor

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def frame_names(self) -> list[str]:
        """Names of the frames without ending."""
        return [Path(path).stem for path in self.frames]

    def frame(self, number: int) -> np.ndarray:
        """Read and scale one frame.

        Args:
            number: Frame from 0.

        Shape:
            Returns [H, W, 3] uint8 RGB.

        Raises:
            DataError: The file is no image.
        """
        import cv2

        image = cv2.imread(self.frames[number])
        if image is None:
            raise DataError(f"frame '{self.frames[number]}' cannot be read; replace the file")
        return scale_frame(image, self.short_side, self.divisor)[:, :, ::-1]

    def mask(self, number: int) -> np.ndarray:
        """Read one mask.

        Args:
            number: Frame from 0.

        Shape:
            Returns [H, W] uint8 object numbers, 0 for the background.

        Raises:
            DataError: The file is no mask.
        """
        from PIL import Image

        path = self.masks[number]
        try:
            with Image.open(path) as image:
                mask = np.array(image)
        except OSError as error:
            raise DataError(f"mask '{path}' cannot be read ({error}); replace the file") from error
        if mask.ndim != 2:
            raise DataError(f"mask '{path}' has {mask.ndim} axes; expected a palette or grey PNG")
        # 255 marks pixels without annotation in some tools' files.
        return np.where(mask == 255, 0, mask).astype(np.uint8)


def scale_frame(image: np.ndarray, short_side: int = 480, divisor: int = 64) -> np.ndarray:
    """Scale a frame so that its shorter side is fixed and the longer one a multiple of something.

    Source:
        `read_frame` of DINO's `eval_video_segmentation.py`.

    Args:
        image: Frame.
        short_side: Shorter side in px.
        divisor: The longer side is cut down to a multiple of it.

    Shape:
        image [H, W, 3] uint8; returns the same, scaled.
    """
    import cv2

    height, width = image.shape[:2]
    longer = int(short_side * max(height, width) / min(height, width) // divisor * divisor)
    size = (short_side, longer) if height > width else (longer, short_side)
    if height == width:
        size = (short_side, short_side)
    return cv2.resize(image, size)


@cache
def palette() -> bytes:
    """Return the 256 colours of Pascal VOC's masks, by bits of the object number."""
    number = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            value = (number >> (3 * bit + channel)) & 1
            colours[:, channel] |= (value << (7 - bit)).astype(np.uint8)
    return colours.tobytes()


def save_mask(path: Path, mask: np.ndarray) -> None:
    """Write object numbers as a palette PNG.

    Args:
        path: File; its folder is made.
        mask: Object numbers.

    Shape:
        mask [H, W] uint8.
    """
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask, mode="P")
    image.putpalette(palette())
    image.save(path)


@DATASETS.register_module()
class DavisDataset:
    """Sequences of DAVIS 2017, for `PropagationTestLoop`.

    Args:
        data_root: Folder that holds JPEGImages/, Annotations/ and ImageSets/.
        split: List of sequences in ImageSets/2017, "val" or "train".
        short_side: Shorter side in px to which frames are scaled.
        divisor: The longer side is cut down to a multiple of it.

    Raises:
        MissingFileError: A part of the layout is missing; the text shows it.
        DataError: A sequence has another number of masks than of frames.
    """

    def __init__(
        self, data_root: str, split: str = "val", short_side: int = 480, divisor: int = 64
    ) -> None:
        if short_side < divisor:
            raise ConfigError(f"short_side={short_side} is smaller than divisor={divisor}")
        self.metainfo: dict = {}
        listing = Path(data_root, "ImageSets", "2017", f"{split}.txt")
        if not listing.is_file():
            raise MissingFileError(f"DAVIS 2017: '{listing}' does not exist. {_LAYOUT}")
        names = listing.read_text().split()
        self.sequences = []
        for name in names:
            files = []
            for kind, ending in (("JPEGImages", ".jpg"), ("Annotations", ".png")):
                folder = Path(data_root, kind, "480p", name)
                if not folder.is_dir():
                    raise MissingFileError(f"DAVIS 2017: '{folder}' does not exist. {_LAYOUT}")
                files.append(
                    sorted(os.fspath(item) for item in folder.iterdir() if item.suffix == ending)
                )
            frames, masks = files
            if not frames or len(frames) != len(masks):
                raise DataError(
                    f"DAVIS 2017: sequence '{name}' has {len(frames)} frames and {len(masks)} "
                    f"masks; expected one mask per frame. {_LAYOUT}"
                )
            self.sequences.append(VideoSequence(name, frames, masks, short_side, divisor))

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> VideoSequence:
        return self.sequences[index]
