"""What the class token of a vision transformer looks at, in images and in videos.

Letters: h heads, H x W grid.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.device import get_device
from mmengine.registry import init_default_scope
from torch import Tensor

from patchreg.datasets.image_files import EXTENSIONS
from patchreg.models.features import backbone_state
from patchreg.registry import MODELS, TRANSFORMS
from patchreg.runner.build import config_errors, load_config, resolve_checkpoint
from patchreg.runner.checkpoint import load_state
from patchreg.utils.errors import ConfigError, DataError, MissingFileError
from patchreg.utils.files import replace_safely

HELP = {
    "attention": "what each head of the class token looks at",
    "attention-video": "the same for every frame of a video, mean over the heads",
}
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm")


def add_arguments(kind: str, parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line.

    Args:
        kind: "attention" or "attention-video".
        parser: Where to add them.
    """
    video = kind == "attention-video"
    what = "video file, or folder of frames" if video else "image file"
    if video:
        what += "; with --video-only a folder of finished pictures"
    parser.add_argument("source", help=what)
    parser.add_argument("config", nargs="?" if video else None, help="config with a ViT backbone")
    parser.add_argument(
        "checkpoint", nargs="?" if video else None, help="checkpoint, or folder of a run"
    )
    parser.add_argument("--out", default=kind, help=f"folder to write to (default {kind})")
    parser.add_argument(
        "--threshold",
        type=float,
        help="share of the attention that a mask keeps, from 0 to 1 (default: no masks)",
    )
    if not video:
        parser.add_argument(
            "--image-size", type=int, nargs=2, default=(480, 480), metavar=("H", "W")
        )
        return
    parser.add_argument(
        "--resize", type=int, nargs=2, metavar=("H", "W"), help="size of the frames"
    )
    parser.add_argument("--video-only", action="store_true", help="only join finished pictures")
    parser.add_argument(
        "--fps", type=float, default=30.0, help="of a folder of frames (default 30)"
    )
    parser.add_argument("--video-format", choices=["mp4", "avi"], default="mp4")


def run(kind: str, arguments: argparse.Namespace) -> str:
    """Draw the pictures and say where they are.

    Args:
        kind: "attention" or "attention-video".
        arguments: Parsed options.

    Raises:
        ConfigError: An option is out of range.
    """
    if arguments.threshold is not None and not 0 <= arguments.threshold <= 1:
        raise ConfigError(f"--threshold {arguments.threshold}: expected a share from 0 to 1")
    size = arguments.image_size if kind == "attention" else arguments.resize
    if size is not None and min(size) < 1:
        raise ConfigError(f"size {tuple(size)}: expected positive numbers of px")
    if kind == "attention":
        model = AttentionModel(arguments.config, arguments.checkpoint)
        names = draw_attention(model, arguments.source, arguments.out, size, arguments.threshold)
        return f"written to {arguments.out}: {', '.join(names)}"
    return draw_video(arguments)


class AttentionModel:
    """The backbone of a config, ready to tell where its class token looks.

    Args:
        path: Config file; any model whose `backbone` has `last_attention`.
        checkpoint: Checkpoint, or folder of a run for its newest one; `model.checkpoint_key` says
            which part of it, by default `teacher`.

    Raises:
        ConfigError: The backbone cannot tell its attention.
        UserError: The checkpoint is missing or of another model.
    """

    def __init__(self, path: str, checkpoint: str) -> None:
        config = load_config(path)
        init_default_scope(config.get("default_scope", "patchreg"))
        with config_errors(f"the backbone of '{path}' cannot be built"):
            self.backbone: Any = MODELS.build(config.model.backbone)
            self.preprocessor: Any = MODELS.build(
                config.get("data_preprocessor") or dict(type="ImagePreprocessor")
            )
        if not hasattr(self.backbone, "last_attention") or not getattr(self.backbone, "extra", 0):
            raise ConfigError(
                f"{type(self.backbone).__name__} has no class token whose attention can be drawn; "
                "use a VisionTransformerBackbone or a TimmViTBackbone"
            )
        file = resolve_checkpoint(checkpoint)
        key = config.model.get("checkpoint_key", "teacher")
        load_state(self.backbone, backbone_state(self.backbone, file, key), file, strict=True)
        self.backbone.to(get_device()).eval()
        self.preprocessor.to(get_device())
        embed = getattr(self.backbone, "model", self.backbone).patch_embed
        self.patch_size = int(embed.proj.stride[0])

    @torch.inference_mode()
    def __call__(self, image: np.ndarray) -> Tensor:
        """Return the attention of the class token to the cells of an image.

        Args:
            image: Image whose sides are multiples of the patch size.

        Shape:
            image [H * patch, W * patch, 3] uint8; returns [h, H, W].
        """
        inputs = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
        inputs = self.preprocessor.normalise(inputs)
        weights = self.backbone.last_attention(inputs)[0, :, 0, self.backbone.extra :]
        grid = (image.shape[0] // self.patch_size, image.shape[1] // self.patch_size)
        return weights.float().cpu().reshape(len(weights), *grid)


def attention_mask(attention: Tensor, threshold: float) -> Tensor:
    """Keep the cells that together hold a share of each head's attention, largest first.

    A cell is kept where the sum of all cells up to and with it, smallest first, exceeds
    1 - threshold of the whole.

    Source:
        DINO's `visualize_attention.py`.

    Args:
        attention: Attention of the class token to the cells.
        threshold: Share of the attention that is kept, in [0, 1].

    Shape:
        attention [h, H, W]; returns the same, bool.
    """
    flat = attention.flatten(1)
    values, order = flat.sort(dim=1)
    share = (values / values.sum(dim=1, keepdim=True)).cumsum(dim=1)
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter(1, order, share > 1 - threshold)
    return kept.view_as(attention)


def enlarged(cells: Tensor, side: int) -> np.ndarray:
    """Repeat every cell.

    Args:
        cells: Values of the cells.
        side: Side of a cell in px.

    Shape:
        cells [H, W]; returns [H * side, W * side].
    """
    return cells.repeat_interleave(side, 0).repeat_interleave(side, 1).numpy()


def coloured(values: np.ndarray, colours: str = "viridis") -> np.ndarray:
    """Return values as colours, over their own range.

    Args:
        values: Values.
        colours: Colour map of matplotlib.

    Shape:
        values [H, W]; returns [H, W, 3] uint8.
    """
    from matplotlib import colormaps

    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return colormaps[colours](scaled, bytes=True)[..., :3]


def whole_patches(image: np.ndarray, side: int) -> np.ndarray:
    """Cut off pixels at the right and the bottom that fill no patch.

    Args:
        image: Image.
        side: Side of a patch in px.

    Shape:
        image [H, W, 3]; returns the same, smaller.

    Raises:
        ConfigError: The image is smaller than a patch.
    """
    height, width = (length - length % side for length in image.shape[:2])
    if not height or not width:
        raise ConfigError(
            f"an image of {image.shape[1]} x {image.shape[0]} px is smaller than a patch of {side} px; "
            "enlarge it with --image-size or --resize"
        )
    return image[:height, :width]


def draw_attention(
    model: AttentionModel,
    source: str,
    out: str,
    size: tuple[int, int] | None = (480, 480),
    threshold: float | None = None,
) -> list[str]:
    """Draw one picture per head, with a threshold its mask too, and all heads side by side.

    Writes `img.png`, `attn-head<h>.png`, `mask_th<t>_head<h>.png` and `heads.png` with all of them.

    Source:
        DINO's `visualize_attention.py`.

    Args:
        model: The model.
        source: Image file.
        out: Folder to write to.
        size: Height and width in px that the image is scaled to, or None to keep its own.
        threshold: Share of the attention that a mask keeps, or None for no masks.

    Returns:
        Names of the files.
    """
    image = scaled(TRANSFORMS.build(dict(type="LoadImage"))(dict(img_path=source))["img"], size)
    image = whole_patches(image, model.patch_size)
    attention = model(image)
    side = model.patch_size
    rows = [
        {f"attn-head{head}.png": coloured(enlarged(c, side)) for head, c in enumerate(attention)}
    ]
    if threshold is not None:
        kept = attention_mask(attention, threshold)
        names = [f"mask_th{threshold:g}_head{head}.png" for head in range(len(kept))]
        masks = [masked(image, enlarged(cells, side)) for cells in kept]
        rows.append(dict(zip(names, masks, strict=True)))
    sheet = [np.concatenate([image, *row.values()], axis=1) for row in rows]
    pictures = {"img.png": image, "heads.png": np.concatenate(sheet)}
    for row in rows:
        pictures |= row
    for name, pixels in pictures.items():
        save(Path(out, name), pixels)
    return list(pictures)


def scaled(image: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Scale an image, bilinear.

    Args:
        image: Image.
        size: Height and width in px, or None to keep its own.

    Shape:
        image [H, W, 3] uint8; returns the same.
    """
    from PIL import Image

    if size is None:
        return image
    resized = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.array(resized)


def masked(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Tint what a mask keeps, darken the rest.

    Args:
        image: Image.
        mask: Pixels that are kept.

    Shape:
        image [H, W, 3] uint8; mask [H, W] bool; returns as image.
    """
    red = np.array((255, 32, 32))
    tinted = np.where(mask[..., None], 0.5 * image + 0.5 * red, 0.35 * image)
    return tinted.round().astype(np.uint8)


def save(path: Path, pixels: np.ndarray) -> None:
    """Write a picture.

    Args:
        path: File; its folder is made.
        pixels: Picture.

    Shape:
        pixels [H, W, 3] uint8.
    """
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial.{path.name}")
    Image.fromarray(pixels).save(partial, quality=95)
    replace_safely(partial, path)


def draw_video(arguments: argparse.Namespace) -> str:
    """Draw the attention of every frame and join the pictures to a video.

    Writes `frames/frame-<n>.jpg` of a video file, `attention/attn-frame-<n>.jpg` and `video.<format>`.

    Source:
        DINO's `video_generation.py`.

    Differs from official:
        With a threshold only what it keeps is drawn; there it changes nothing.

    Args:
        arguments: Parsed options of "attention-video".

    Raises:
        ConfigError: No model was named.
        MissingFileError: The source does not exist.
        DataError: It holds no frames.
    """
    source, out = Path(arguments.source), Path(arguments.out)
    if not source.exists():
        raise MissingFileError(
            f"'{source}' does not exist; give a video file or a folder of frames"
        )
    fps, folder = arguments.fps, source
    if source.is_file():
        folder = out / "frames"
        fps = split_video(source, folder)
    frames = sorted(item for item in folder.iterdir() if item.suffix.lower() in EXTENSIONS)
    if not frames:
        raise DataError(f"'{folder}' holds no frames ({', '.join(EXTENSIONS)})")
    if not arguments.video_only:
        if arguments.config is None or arguments.checkpoint is None:
            raise ConfigError("name a config and a checkpoint, or use --video-only")
        model = AttentionModel(arguments.config, arguments.checkpoint)
        load = TRANSFORMS.build(dict(type="LoadImage"))
        pictures = []
        for number, frame in enumerate(frames, 1):
            image = scaled(load(dict(img_path=str(frame)))["img"], arguments.resize)
            image = whole_patches(image, model.patch_size)
            attention = model(image)
            if arguments.threshold is not None:
                attention = attention * attention_mask(attention, arguments.threshold)
            path = out / "attention" / f"attn-{frame.stem}.jpg"
            mean = enlarged(attention.mean(0), model.patch_size)
            save(path, coloured(mean, "inferno"))
            pictures.append(path)
            print(f"\rframe {number} of {len(frames)}", end="", flush=True)
        print()
        frames = pictures
    path = out / f"video.{arguments.video_format}"
    join_video(frames, path, fps)
    return f"written to {path}: {len(frames)} frames, {fps:g} per second"


def split_video(source: Path, folder: Path) -> float:
    """Write the frames of a video as `frame-<n>.jpg` and return its frames per second.

    Args:
        source: Video file.
        folder: Folder to write to.

    Raises:
        DataError: It cannot be read.
    """
    import cv2

    video = cv2.VideoCapture(str(source))
    number = 0
    for number, frame in enumerate(_frames(video), 1):
        save(folder / f"frame-{number - 1:04d}.jpg", frame[:, :, ::-1])
    fps = float(video.get(cv2.CAP_PROP_FPS))
    video.release()
    if not number:
        raise DataError(
            f"'{source}' is no video that OpenCV can read ({', '.join(VIDEOS)}); give a folder of frames"
        )
    return fps or 30.0


def _frames(video: Any) -> Iterator[np.ndarray]:
    while True:
        more, frame = video.read()
        if not more:
            return
        yield frame


def join_video(frames: list[Path], path: Path, fps: float) -> None:
    """Join pictures of one size to a video.

    Args:
        frames: Pictures, in order.
        path: File ending in .mp4 or .avi; its folder is made.
        fps: Frames per second.

    Raises:
        DataError: A picture cannot be read or has another size, or the video cannot be written.
    """
    import cv2

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial.{path.name}")
    writer, size = None, None
    for frame in frames:
        image = cv2.imread(str(frame))
        if image is None or (size is not None and image.shape != size):
            found = "no picture" if image is None else f"{image.shape[1]} x {image.shape[0]} px"
            raise DataError(f"'{frame}' is {found}; a video needs pictures of one size")
        if writer is None:
            size = image.shape
            code = cv2.VideoWriter.fourcc(*("mp4v" if path.suffix == ".mp4" else "XVID"))
            writer = cv2.VideoWriter(str(partial), code, fps, (size[1], size[0]))
        writer.write(image)
    if writer is not None:
        writer.release()
    if not partial.is_file():
        raise DataError(f"OpenCV cannot write '{path}' here; try the other --video-format")
    replace_safely(partial, path)
