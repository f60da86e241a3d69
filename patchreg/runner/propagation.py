"""Video object segmentation without training: the first frame's mask follows similar features.

Letters: n cells of a frame, h x w grid, S context frames, C classes with background, D width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.model import is_model_wrapper
from mmengine.runner import TestLoop
from torch import Tensor
from torch.nn import functional as F

from patchreg.datasets.davis import save_mask
from patchreg.models.features import as_tokens
from patchreg.registry import LOOPS
from patchreg.utils.errors import ConfigError

CELLS = 1024
"""Cells of the target frame that are compared with the context at once."""
LOWEST = 0.0125
"""Below this temperature exp(1 / temperature) does not fit into float32."""


def propagate(
    target: Tensor,
    sources: Tensor,
    maps: Tensor,
    radius: int = 12,
    topk: int = 5,
    temperature: float = 0.1,
) -> Tensor:
    """Carry soft masks of context frames over to a target frame by feature similarity.

    Every target cell takes the mean of the masks at the cells of the context that are most similar to
    it, weighted by exp(cosine / temperature). Cells as similar as the last of them count too.

    Source:
        `label_propagation` of DINO's `eval_video_segmentation.py`; Jabri et al., "Space-time
        correspondence as a contrastive random walk".

    Args:
        target: Features of the target frame.
        sources: Features of the context frames.
        maps: Their soft masks.
        radius: Largest distance of a source cell in rows and in columns; 0 for any.
        topk: Most similar cells of all context frames together that are used.
        temperature: Divides the similarities, above 0.

    Shape:
        target [n, D]; sources [S, n, D]; maps [S, C, h, w] with h * w = n; returns [C, h, w].
    """
    count, (height, width) = len(target), maps.shape[2:]
    context = F.normalize(sources.flatten(0, 1), dim=1)
    target = F.normalize(target, dim=1)
    values = maps.flatten(2).transpose(1, 2).flatten(0, 1)
    cell = torch.arange(count, device=target.device)
    rows, columns = cell // width, cell % width
    result = []
    for part in cell.split(CELLS):
        cosines = target[part] @ context.T
        near = None
        if radius > 0:
            near = ((rows[part, None] - rows[None]).abs() <= radius) & (
                (columns[part, None] - columns[None]).abs() <= radius
            )
            near = near.repeat(1, len(sources))
        if temperature < LOWEST:
            seen = cosines if near is None else cosines.masked_fill(~near, -torch.inf)
            cosines = cosines - seen.max(dim=1, keepdim=True).values
        weights = cosines.div(temperature).exp()
        if near is not None:
            weights = torch.where(near, weights, torch.zeros_like(weights))
        last = weights.topk(min(topk, weights.shape[1]), dim=1).values[:, -1:]
        weights = torch.where(weights < last, torch.zeros_like(weights), weights)
        result.append(weights / weights.sum(dim=1, keepdim=True) @ values)
    return torch.cat(result).T.reshape(-1, height, width)


def enlarge(soft: Tensor, patch_size: int) -> Tensor:
    """Enlarge soft masks to pixels, each class stretched to [0, 1].

    Args:
        soft: Soft masks.
        patch_size: Side of a cell in px.

    Shape:
        soft [C, h, w]; returns [C, h * patch, w * patch].
    """
    large = F.interpolate(
        soft[None],
        scale_factor=patch_size,
        mode="bilinear",
        align_corners=False,
        recompute_scale_factor=False,
    )[0]
    flat = large.flatten(1)
    low, high = flat.min(dim=1).values, flat.max(dim=1).values
    # A class that is nowhere stays at zero.
    span = torch.where(high > low, high - low, torch.ones_like(high))
    stretched = (flat - low[:, None]) / span[:, None]
    # What is the same everywhere stays as it is: an object that fills the frame is not lost.
    return torch.where((high > low)[:, None], stretched, flat).view_as(large)


def first_map(mask: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """Return the first frame's mask on the grid, one channel per object and one for the background.

    Args:
        mask: Object numbers, 0 for the background.
        grid: Rows and columns.

    Shape:
        mask [H, W]; returns [C, h, w] float32.

    Differs from official:
        The number of objects is that of the mask itself; there an object that vanishes on the grid
        is not counted.
    """
    from PIL import Image

    small = Image.fromarray(mask).resize((grid[1], grid[0]), Image.Resampling.NEAREST)
    numbers = torch.from_numpy(np.array(small)).long()
    return F.one_hot(numbers, int(mask.max()) + 1).permute(2, 0, 1).float()


@LOOPS.register_module()
class PropagationTestLoop(TestLoop):
    """Follow the objects of each sequence of a `DavisDataset` with a frozen backbone.

    The model is a `FeatureExtractor` whose backbone returns tokens or a feature map; its
    preprocessor normalises the frames. Soft masks of the first frame and of the last few frames are
    the context of the next one.

    Source:
        DINO's `eval_video_segmentation.py`.

    Args:
        runner: The runner.
        dataloader: Loader of the sequences, or its config.
        evaluator: `DavisMetric`, or its config.
        n_last_frames: Frames before the target that are used besides the first one.
        radius: Side of the neighbourhood, in cells from its centre; 0 for the whole frame.
        topk: Most similar cells that are used.
        temperature: Divides the similarities, above 0.
        save_masks: Write the masks to `masks/<sequence>/` in the work dir.

    Raises:
        ConfigError: A number is out of range.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: Any,
        evaluator: Any,
        n_last_frames: int = 7,
        radius: int = 12,
        topk: int = 5,
        temperature: float = 0.1,
        save_masks: bool = True,
    ) -> None:
        super().__init__(runner, dataloader, evaluator)
        if n_last_frames < 0 or radius < 0 or topk < 1 or temperature <= 0:
            raise ConfigError(
                f"n_last_frames={n_last_frames}, radius={radius}, topk={topk}, temperature="
                f"{temperature}: expected n_last_frames and radius from 0, topk from 1 and a "
                "temperature above 0"
            )
        self.n_last_frames = n_last_frames
        self.radius = radius
        self.topk = topk
        self.temperature = temperature
        self.save_masks = save_masks
        self.model = runner.model.module if is_model_wrapper(runner.model) else runner.model

    @torch.inference_mode()
    def run_iter(self, idx: int, data_batch: Sequence[Any]) -> None:
        """Follow the objects of the sequences of a batch.

        Args:
            idx: Batch.
            data_batch: Sequences of a `DavisDataset`.
        """
        hook = dict(batch_idx=idx, data_batch=data_batch)
        self.runner.call_hook("before_test_iter", **hook)
        outputs: list[dict[str, Any]] = []
        for sequence in data_batch:
            predicted = self.track(sequence)
            truth = torch.from_numpy(np.stack([sequence.mask(i) for i in range(len(sequence))]))
            outputs.append(dict(name=sequence.name, truth=truth, predicted=predicted))
            if self.save_masks:
                folder = Path(self.runner.work_dir, "masks", sequence.name)
                for name, mask in zip(sequence.frame_names, predicted, strict=True):
                    save_mask(folder / f"{name}.png", mask.numpy())
            self.runner.logger.info(f"{sequence.name}: {len(sequence)} frames")
        self.evaluator.process(data_samples=outputs, data_batch=data_batch)
        self.runner.call_hook("after_test_iter", **hook, outputs=outputs)

    @torch.inference_mode()
    def track(self, sequence: Any) -> Tensor:
        """Return the object numbers of every frame; the first is the given mask.

        Args:
            sequence: Sequence of a `DavisDataset`.

        Shape:
            Returns [T, H, W] uint8.
        """
        mask = sequence.mask(0)
        features, grid = self.cells(sequence.frame(0))
        first = (features, first_map(mask, grid).to(features))
        recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=self.n_last_frames)
        found = [torch.from_numpy(mask)]
        for number in range(1, len(sequence)):
            frame = sequence.frame(number)
            features, _ = self.cells(frame)
            context = [first, *recent]
            soft = propagate(
                features,
                torch.stack([item[0] for item in context]),
                torch.stack([item[1] for item in context]),
                self.radius,
                self.topk,
                self.temperature,
            )
            recent.append((features, soft))
            side = frame.shape[0] // grid[0]
            labels = enlarge(soft, side).argmax(dim=0).to(torch.uint8).cpu().numpy()
            found.append(torch.from_numpy(_resize_nearest(labels, mask.shape)))
        return torch.stack(found)

    def cells(self, frame: np.ndarray) -> tuple[Tensor, tuple[int, int]]:
        """Return the features of the cells of a frame, and its grid.

        Args:
            frame: Frame of the network's size.

        Shape:
            frame [H, W, 3] uint8; returns [n, D].
        """
        inputs = torch.from_numpy(np.array(frame)).permute(2, 0, 1)[None]
        data = self.model.data_preprocessor(dict(inputs=inputs), False)
        features = as_tokens(self.model.backbone(data["inputs"]))
        return features.tokens[0, features.extra :], features.grid


def _resize_nearest(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from PIL import Image

    image = Image.fromarray(labels).resize((size[1], size[0]), Image.Resampling.NEAREST)
    return np.array(image)
