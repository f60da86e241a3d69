"""Any selector before any classifier.

Letters: B images, H x W px, P patches in raster order, K classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchreg.models.base import ImageModel, fill_predictions, stack_targets
from patchreg.models.layers import kept_cells
from patchreg.models.selectors.rank import top_mask
from patchreg.models.selectors.rankers import patch_sides, scores_on_grid
from patchreg.registry import MODELS
from patchreg.runner.api import load
from patchreg.runner.patchrank import Ranker, keep_best
from patchreg.structures import PatchSelection
from patchreg.utils.errors import ConfigError

USES = ("drop", "erase", "order")


@MODELS.register_module()
class SelectedClassifier(ImageModel):
    """A classifier that sees what a selector chose: any ranker, policy or localiser before any network.

    The selector is frozen, the classifier can be trained on what it gets to see.

    Args:
        selector: What `PatchRankLoop` takes as a ranker: a `...Selector`, or `config` and `checkpoint` of
            a model with `select`.
        classifier: Config of a classifier, or `config` and `checkpoint` of a trained one. Without
            `checkpoint` the one that ships with the config is taken, for both.
        use: How the classifier follows the selector. `drop`: the other patches are never computed (vision
            transformers). `erase`: they get the mean colour (any classifier; its cost falls only where it
            adapts to the image, as DGE does). `order`: the classifier looks at its own windows in the order
            of the scores (AnchorNet's early exit).
        keep: Patches to keep of each image, or None for those that the selector keeps.
        data_preprocessor: Config of the preprocessor, that of the classifier.
        init_cfg: Weights to load, as in MMEngine.

    Raises:
        ConfigError: The parts do not go together.
    """

    def __init__(
        self,
        selector: dict,
        classifier: dict,
        use: str = "drop",
        keep: int | None = None,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        if use not in USES:
            raise ConfigError(f"use={use!r} is unknown; expected one of {', '.join(USES)}")
        if keep is not None and keep < 1:
            raise ConfigError(f"keep={keep}: expected at least 1 patch, or None")
        self.classifier, self._checkpoint = _trained(classifier)
        needed = {"drop": "classify_kept", "erase": "predict", "order": "predict_ranked"}[use]
        if not callable(getattr(self.classifier, needed, None)):
            raise ConfigError(
                f"use={use!r}: {type(self.classifier).__name__} has no method '{needed}'; "
                "'drop' needs a vision transformer in a PatchClassifier, 'order' a classifier of windows, "
                "'erase' works with any classifier"
            )
        self._ranker = Ranker.build(dict(selector), self.classifier)
        self.selector = self._ranker.module
        shared = set(self.classifier.parameters())
        for parameter in self.selector.parameters():
            # A selector may look through the classifier's own eyes.
            if parameter not in shared:
                parameter.requires_grad_(False)
        self.use = use
        self.keep = keep

    @property
    def min_image_size(self) -> int:
        """Shortest side of an image in px that both parts can read."""
        parts = (self.selector, self.classifier)
        return max(getattr(part, "min_image_size", 0) for part in parts)

    def train(self, mode: bool = True) -> SelectedClassifier:
        """Switch the mode of the classifier; the selector stays in evaluation mode.

        Args:
            mode: True for training.
        """
        super().train(mode)
        self.selector.eval()
        return self

    def set_budget(self, budget: float, checkpoint: str) -> None:
        """Hand a mean cost per image on to the classifier; the selector's cost comes on top.

        Args:
            budget: In the classifier's unit.
            checkpoint: Taken where the classifier has none of its own.

        Raises:
            ConfigError: The classifier has no budget.
        """
        if not hasattr(self.classifier, "set_budget"):
            raise ConfigError(f"{type(self.classifier).__name__} has no budget that can be set")
        self.classifier.set_budget(budget, self._checkpoint or checkpoint)

    def logits(self, inputs: Tensor) -> Tensor:
        """Classify images.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W]; returns [B, K].
        """
        return self.run(inputs)[0]

    @torch.no_grad()
    def choose(self, inputs: Tensor) -> PatchSelection:
        """Let the selector choose; `macs` are its own.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W].
        """
        selection = self._ranker.rank(self._as_selector_sees(inputs))
        if self.use == "drop":
            return self._on_patches(inputs, selection)
        if self.keep is None or selection.grid is None:
            return selection
        return keep_best(selection, min(self.keep, selection.score.shape[1]))

    def _as_selector_sees(self, inputs: Tensor) -> Tensor:
        """Normalise images as the selector was trained, where that is another way than ours."""
        ours, theirs = self.data_preprocessor, getattr(self.selector, "data_preprocessor", None)
        if theirs is None or not hasattr(theirs, "mean") or not hasattr(ours, "mean"):
            return inputs
        if torch.equal(ours.mean, theirs.mean) and torch.equal(ours.std, theirs.std):
            return inputs
        return (inputs * ours.std + ours.mean - theirs.mean) / theirs.std

    def _on_patches(self, inputs: Tensor, selection: PatchSelection) -> PatchSelection:
        """Say the same on the grid of patches of a vision transformer."""
        height, width = patch_sides(self.classifier.backbone)
        grid = (inputs.shape[2] // height, inputs.shape[3] // width)
        score = scores_on_grid(selection, grid)
        if self.keep is not None:
            mask = top_mask(score, self.keep)
        else:
            covered = F.adaptive_avg_pool2d(_looked_at(selection, inputs), grid).flatten(1)
            # An image without a patch would leave a transformer its class token alone.
            mask = (covered >= 0.5) | top_mask(score, 1)
        return PatchSelection.from_grid(
            image_size=(inputs.shape[2], inputs.shape[3]),
            grid=grid,
            score=score,
            keep=mask,
            resolution=mask.float(),
            macs=selection.macs,
            dense_macs=selection.dense_macs,
        )

    @staticmethod
    def _cells(selection: PatchSelection) -> list[tuple[Tensor, Tensor]]:
        """Return images and their kept patches, by equal numbers."""
        counts = selection.keep.sum(1)
        groups = []
        for count in counts.unique():
            rows = (counts == count).nonzero()[:, 0]
            groups.append((rows, kept_cells(selection.keep[rows])))
        return groups

    def run(self, inputs: Tensor) -> tuple[Tensor, Tensor, float, PatchSelection | None]:
        """Choose and classify.

        Args:
            inputs: Preprocessed images.

        Returns:
            Logits, cost of each image, cost of the classifier on whole images, and what was chosen (None
            when the classifier asks for some images only).

        Shape:
            inputs [B, 3, H, W]; logits [B, K]; cost [B] float64.
        """
        if self.use == "order":
            spent = inputs.new_zeros(len(inputs), dtype=torch.float64)
            logits, macs, dense = self.classifier.predict_ranked(
                inputs, self._noted(lambda rows: self.choose(inputs[rows]), spent)
            )
            return logits, macs.to(spent) + spent, dense, None
        selection = self.choose(inputs)
        if self.use == "drop":
            found = [
                (rows, *self.classifier.classify_kept(inputs[rows], cells))
                for rows, cells in self._cells(selection)
            ]
            place = torch.cat([rows for rows, *_ in found]).argsort()
            logits = torch.cat([part for _, part, *_ in found])[place]
            macs = torch.cat([part for _, _, part, _ in found])[place]
            dense = found[0][3]
        else:
            # The mean colour is 0 after preprocessing.
            erased = inputs * _looked_at(selection, inputs)
            logits, macs, dense = self.classifier.classify_all(erased)
        if selection.macs is not None:
            macs = macs + selection.macs.to(macs)
        return logits, macs, dense, selection

    @staticmethod
    def _noted(
        choose: Callable[[Tensor], PatchSelection], spent: Tensor
    ) -> Callable[[Tensor], PatchSelection]:
        """Return a function that ranks some images of the batch and notes what it spent."""

        def rank(rows: Tensor) -> PatchSelection:
            selection = choose(rows)
            if selection.macs is not None:
                spent[rows] += selection.macs.to(spent)
            return selection

        return rank

    def loss(self, inputs: Tensor, data_samples: list[Any]) -> dict[str, Tensor]:
        """Return the classifier's losses on what the selector leaves it.

        Args:
            inputs: Preprocessed images.
            data_samples: Samples with targets.

        Shape:
            inputs [B, 3, H, W].
        """
        if self.use == "order":
            return self.classifier.loss(inputs, data_samples)
        selection = self.choose(inputs)
        if self.use == "erase":
            return self.classifier.loss(inputs * _looked_at(selection, inputs), data_samples)
        targets = stack_targets(data_samples, inputs.device)
        losses: dict[str, Tensor] = {}
        for rows, cells in self._cells(selection):
            features = self.classifier.backbone(inputs[rows], cells=cells)
            share = len(rows) / len(inputs)
            for name, value in self.classifier.head.loss(features, targets[rows]).items():
                losses[name] = losses.get(name, 0.0) + share * value
        return losses

    @torch.no_grad()
    def predict(self, inputs: Tensor, data_samples: list[Any] | None = None) -> list[Any]:
        """Fill in predictions and the cost of both parts.

        Args:
            inputs: Preprocessed images.
            data_samples: Samples to fill.

        Shape:
            inputs [B, 3, H, W].

        Raises:
            DataError: There are no samples to fill.
        """
        logits, macs, dense, _ = self.run(inputs)
        return fill_predictions(data_samples, logits, macs, dense)

    @torch.no_grad()
    def select(self, inputs: Tensor) -> PatchSelection:
        """Say what the selector chose; the cost is that of both parts.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W].
        """
        if self.use == "order":
            # Ranked once: a selector that draws would answer otherwise the second time.
            whole = self.choose(inputs)
            spent = inputs.new_zeros(len(inputs), dtype=torch.float64)
            ranks = self._noted(whole.__getitem__, spent)
            _, macs, dense = self.classifier.predict_ranked(inputs, ranks)
            macs = macs.to(spent) + spent
            # The classifier knows which of its windows it looked at.
            found = self.classifier.select_ranked(inputs, whole.__getitem__)
            return dataclasses.replace(found, macs=macs, dense_macs=dense)
        _, macs, dense, selection = self.run(inputs)
        assert selection is not None
        return dataclasses.replace(selection, macs=macs, dense_macs=dense)


def _trained(config: Mapping[str, Any]) -> tuple[Any, str | None]:
    """Build a classifier, or load a trained one; return it and its checkpoint."""
    if "type" in config:
        return MODELS.build(dict(config)), None
    if not {"config"} <= set(config) <= {"config", "checkpoint"}:
        raise ConfigError(
            f"classifier={dict(config)}: expected type=..., or config='configs/...' and perhaps "
            "checkpoint=... of a trained classifier"
        )
    loaded = load(config["config"], config.get("checkpoint"))
    return loaded.network, loaded.checkpoint


def _looked_at(selection: PatchSelection, inputs: Tensor) -> Tensor:
    """Return 1 for pixels inside cells or windows that were kept, else 0: [B, 1, H, W] like the images."""
    kept = dataclasses.replace(selection, resolution=selection.keep.float())
    mask = kept.pixel_shares().to(inputs.dtype).unsqueeze(1)
    return F.interpolate(mask, size=inputs.shape[2:], mode="nearest")
