"""All three networks of AnchorNet together: look coarsely, then at one window after another.

Letters: B images, H x W image, K windows, M = K + 1 stages, C classes, S slots.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchreg.methods.anchornet.budget import solve_thresholds
from patchreg.methods.anchornet.model import Localisation, window_selection
from patchreg.methods.anchornet.table import (
    ConfidenceTable,
    check_thresholds,
    stage_costs,
)
from patchreg.methods.anchornet.views import crop_windows
from patchreg.models.base import ImageModel, fill_predictions, stack_targets
from patchreg.registry import MODELS
from patchreg.structures import PatchSelection
from patchreg.utils.errors import ConfigError

TABLE = "table.safetensors"
"""Name of a confidence table beside the checkpoint that it belongs to."""


def in_fixed_batches(
    network: Callable[[Tensor], Any], inputs: Tensor, size: int
) -> list[tuple[Any, int]]:
    """Run a network in batches of one size only, the last one padded.

    An image then gets the same result, to the last bit, in whatever company it comes.

    Args:
        network: What to run.
        inputs: Its inputs.
        size: Inputs per batch.

    Returns:
        The outputs, and how many rows of each are meant.
    """
    found = []
    for start in range(0, len(inputs), size):
        part = inputs[start : start + size]
        count = len(part)
        if count < size:
            part = torch.cat((part, part[-1:].expand(size - count, *part.shape[1:])))
        found.append((network(part), count))
    return found


@MODELS.register_module()
class AnchorNetEnsembleClassifier(ImageModel):
    """Early-exit classifier: the shrunk image first, then windows, until one class is sure.

    Logits of all views seen so far are summed. Without `thresholds` all views are looked at.

    Source:
        Section 3.4 of the paper; `make_table.py` and `predict.py` of the official repository.

    Args:
        anchor: Config of the localiser.
        resized: Config of the network for the shrunk image.
        patch: Config of the network for windows.
        thresholds: Confidence above which an image stops, one per stage, in [0, 1]; the last stage
            stops always. None never stops early.
        batch_size: Images or windows per call of a network where all stages are run (tables) or the
            stages of different images mixed (early exit of a whole data set). Their results agree
            to the last bit when it is the same.
        data_preprocessor: Config of the preprocessor, or None.
        init_cfg: Weights to load, as in MMEngine.

    Raises:
        ConfigError: The thresholds do not fit.

    Differs from official:
        Networks that are not needed any more are not run; there all windows of all images always are.
    """

    def __init__(
        self,
        anchor: dict,
        resized: dict,
        patch: dict,
        thresholds: Sequence[float] | None = None,
        batch_size: int = 64,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        self.anchor = MODELS.build(anchor)
        self.resized = MODELS.build(resized)
        self.patch = MODELS.build(patch)
        self.stages = self.anchor.selector.num_patches + 1
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: expected at least 1")
        self.batch_size = batch_size
        self.thresholds: tuple[float, ...] | None = None
        self.set_thresholds(thresholds)

    @property
    def min_image_size(self) -> int:
        """Shortest side of an image that can be localised in, in px."""
        return self.anchor.min_image_size

    def set_thresholds(self, thresholds: Sequence[float] | None) -> None:
        """Choose when images stop.

        Args:
            thresholds: One per stage, or None.

        Raises:
            ConfigError: They do not fit.
        """
        if thresholds is not None:
            check_thresholds(thresholds, self.stages)
            thresholds = tuple(float(value) for value in thresholds)
        self.thresholds = thresholds

    def set_budget(self, budget: float, checkpoint: str | os.PathLike[str]) -> None:
        """Choose thresholds for a mean cost per image, by the table beside a checkpoint.

        Args:
            budget: Mean multiply-accumulates per image.
            checkpoint: Checkpoint of this model, with `table.safetensors` beside it.

        Raises:
            MissingFileError: There is no table.
            ConfigError: The budget cannot be met.
        """
        table = ConfidenceTable.load(Path(checkpoint).parent / TABLE)
        self.set_thresholds(solve_thresholds(table, budget))

    def costs(
        self, shape: tuple[int, ...], stages: int | None = None, localised: bool = True
    ) -> tuple[float, ...]:
        """Return the multiply-accumulates of an image that stops at each stage.

        Args:
            shape: Channels, height and width of the images.
            stages: Stages to tell about; None for those of the model.
            localised: Count the localiser, which another ranker replaces.
        """
        side = self._window_side(shape)
        first = self.resized.view_macs((shape[0], self.resized.view_size, self.resized.view_size))
        window = self.patch.view_macs((shape[0], side, side))
        anchor = self.anchor.macs(shape) if localised else 0.0
        return stage_costs(first, anchor, window, stages or self.stages)

    def _window_side(self, shape: tuple[int, ...]) -> int:
        if self.anchor.window_cells is None:
            return self.anchor.backbone.window.side
        training = self.anchor.training
        self.anchor.eval()  # An empty image is nothing for BatchNorm's statistics.
        try:
            with torch.no_grad():
                images = next(self.anchor.parameters()).new_zeros((1, *shape))
                return self.anchor.localise(images).window.side
        finally:
            self.anchor.train(training)

    def first_logits(self, inputs: Tensor) -> Tensor:
        """Classify the shrunk images.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W]; returns [B, C].
        """
        return self.resized(inputs)

    def window_logits(
        self, pool: Tensor, rows: Tensor, cells: Tensor, found: Localisation
    ) -> Tensor:
        """Classify windows.

        Args:
            pool: Preprocessed images.
            rows: Image of each window.
            cells: Cell of each window.
            found: What the localiser said, for the geometry.

        Shape:
            pool [S, 3, H, W]; rows, cells [n]; returns [n, C].
        """
        return self.patch.view_logits(crop_windows(pool, rows, cells, found.window))

    @torch.no_grad()
    def all_views(self, inputs: Tensor) -> tuple[Tensor, Tensor, Localisation]:
        """Classify every view of every image, whatever the thresholds.

        Args:
            inputs: Preprocessed images.

        Returns:
            Logits of the single views, which views there are, and the windows.

        Shape:
            inputs [B, 3, H, W]; logits [B, M, C]; views [B, M] bool.
        """
        size, images = self.batch_size, len(inputs)
        first = [out[:n] for out, n in in_fixed_batches(self.first_logits, inputs, size)]
        parts = [(out, n) for out, n in in_fixed_batches(self.anchor.localise, inputs, size)]
        found = Localisation(
            logits=torch.cat([out.logits[:n] for out, n in parts]),
            cam=torch.cat([out.cam[:n] for out, n in parts]),
            cells=torch.cat([out.cells[:n] for out, n in parts]),
            window=parts[0][0].window,
        )
        count = found.cells.shape[1]
        rows = torch.arange(images, device=inputs.device).repeat_interleave(count)
        jobs = torch.stack((rows, found.cells.flatten()), dim=1)
        looked = in_fixed_batches(
            lambda job: self.window_logits(inputs, job[:, 0], job[:, 1], found), jobs, size
        )
        windows = torch.cat([out[:n] for out, n in looked]).unflatten(0, (images, count))
        views = torch.cat((torch.cat(first).unsqueeze(1), windows), dim=1)
        seen = torch.cat((found.cells[:, :1] >= -1, found.cells >= 0), dim=1)
        return views, seen, found

    @torch.no_grad()
    def exit_early(
        self, inputs: Tensor, rank: Callable[[Tensor], PatchSelection] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Classify a batch and run each stage on the images that are still undecided.

        The latency mode: a batch of one image stops as soon as it can. For a whole data set
        `EarlyExitQueue` keeps the batches full.

        Args:
            inputs: Preprocessed images.
            rank: Ranks the images of some rows in place of the localiser; asked for undecided ones only.

        Returns:
            Summed logits, stage at which each image stopped, and the windows looked at (-1 for none).

        Shape:
            inputs [B, 3, H, W]; logits [B, C]; stages [B] int64; cells [B, K].
        """
        limits = self.thresholds or (1.0,) * (self.stages - 1) + (0.0,)
        sums = self.first_logits(inputs)
        stage = torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)
        windows = stage.new_full((len(inputs), self.stages - 1), -1)
        cells = windows.clone()
        left = torch.arange(len(inputs), device=inputs.device)
        for number in range(1, len(limits)):
            left = left[sums[left].float().softmax(1).amax(1) <= limits[number - 1]]
            if number > 1:
                left = left[windows[left, number - 1] >= 0]
            if len(left) == 0:
                break
            if number == 1:
                if rank is None:
                    found = self.anchor.localise(inputs[left])
                else:
                    size = (inputs.shape[2], inputs.shape[3])
                    found = self.anchor.place_windows(rank(left), size)
                windows[left] = found.cells
            chosen = windows[left, number - 1]
            sums[left] = sums[left] + self.window_logits(inputs, left, chosen, found)
            cells[left, number - 1] = chosen
            stage[left] = number
        return sums, stage, cells

    def logits(self, inputs: Tensor) -> Tensor:
        """Classify images.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W]; returns [B, K].
        """
        return self.exit_early(inputs)[0]

    def loss(self, inputs: Tensor, data_samples: list[Any]) -> dict[str, Tensor]:
        """Return the losses of the three networks, each on its own view: training in one go.

        Args:
            inputs: Preprocessed images.
            data_samples: Samples with targets.

        Shape:
            inputs [B, 3, H, W].

        Differs from official:
            There the three are trained one after another, as the stages here are too.
        """
        targets = stack_targets(data_samples, inputs.device)
        features = self.anchor.extract(inputs)
        with torch.no_grad():
            found = self.anchor.localise_features(features, (inputs.shape[2], inputs.shape[3]))
        rows, ranks = (found.cells >= 0).nonzero(as_tuple=True)
        views = crop_windows(inputs, rows, found.cells[rows, ranks], found.window)
        parts = {
            "anchor": self.anchor.head.loss(features, targets),
            "resized": self.resized.head.loss(self.resized.extract(inputs), targets),
            "patch": self.patch.head.loss(self.patch.extract(views), targets[rows]),
        }
        return {f"loss_{part}": sum(losses.values()) for part, losses in parts.items()}

    @torch.no_grad()
    def predict(self, inputs: Tensor, data_samples: list[Any] | None = None) -> list[Any]:
        """Fill in predictions, the stage at which each image stopped, and its cost.

        Without thresholds the samples also get `view_logits` and `view_seen`, of which tables are made.

        Args:
            inputs: Preprocessed images.
            data_samples: Samples to fill.

        Shape:
            inputs [B, 3, H, W].

        Raises:
            DataError: There are no samples to fill.
        """
        shape = tuple(inputs.shape[1:])
        costs = torch.tensor(self.costs(shape), dtype=torch.float64)
        views = None
        if self.thresholds is None:
            views, seen, found = self.all_views(inputs)
            sums = torch.where(seen.unsqueeze(2), views, 0).sum(1)
            stage, cells = seen.sum(1) - 1, found.cells
        else:
            sums, stage, cells = self.exit_early(inputs)
        stage = stage.cpu()
        samples = fill_predictions(data_samples, sums, costs[stage], self.resized.view_macs(shape))
        for index, sample in enumerate(samples):
            fields = {"stage": int(stage[index]), "cells": cells[index].tolist()}
            if views is not None:
                fields |= {
                    "view_logits": views[index].float().cpu(),
                    "view_seen": seen[index].cpu(),
                }
            for name, value in fields.items():
                sample.set_field(value, name, dtype=None, field_type="data")
        return samples

    @torch.no_grad()
    def predict_ranked(
        self, inputs: Tensor, rank: Callable[[Tensor], PatchSelection]
    ) -> tuple[Tensor, Tensor, float]:
        """Classify with windows in the order of another ranker.

        Args:
            inputs: Preprocessed images.
            rank: Returns the selection for some rows of the batch; its cost is not counted here.

        Returns:
            Summed logits, cost of each image, cost of the first network on a whole image.

        Shape:
            inputs [B, 3, H, W]; logits [B, C]; cost [B] float64.
        """
        shape = tuple(inputs.shape[1:])
        logits, stage, _ = self.exit_early(inputs, rank)
        costs = inputs.new_tensor(self.costs(shape, localised=False), dtype=torch.float64)
        return logits, costs[stage], self.resized.view_macs(shape)

    @torch.no_grad()
    def select(self, inputs: Tensor) -> PatchSelection:
        """Say which windows are looked at, all others being seen in the shrunk image only.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W].
        """
        return self._select(inputs, None)

    def rank(self, inputs: Tensor) -> PatchSelection:
        """Propose windows by the localiser alone, without looking at any.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W].
        """
        return self.anchor.select(inputs)

    @torch.no_grad()
    def select_ranked(
        self, inputs: Tensor, rank: Callable[[Tensor], PatchSelection]
    ) -> PatchSelection:
        """Say which windows are looked at in the order of another ranker.

        Args:
            inputs: Preprocessed images.
            rank: Returns the selection for some rows of the batch.

        Shape:
            inputs [B, 3, H, W].
        """
        return self._select(inputs, rank)

    def _select(
        self, inputs: Tensor, rank: Callable[[Tensor], PatchSelection] | None
    ) -> PatchSelection:
        shape = tuple(inputs.shape[1:])
        _, stage, cells = self.exit_early(inputs, rank)
        if rank is None:
            found = self.anchor.localise(inputs)
        else:
            everyone = torch.arange(len(inputs), device=inputs.device)
            found = self.anchor.place_windows(rank(everyone), (shape[1], shape[2]))
        found.cells = cells
        costs = inputs.new_tensor(self.costs(shape, localised=rank is None), dtype=torch.float64)
        share = min(1.0, self.resized.view_size**2 / (shape[1] * shape[2]))
        size = (shape[1], shape[2])
        dense = self.resized.view_macs(shape)
        return window_selection(found, size, share, costs[stage], dense)
