"""Confidence tables: what every image would answer at every stage, and what stopping early gives.

Letters: N images, M stages (the shrunk image, then one window after another), C classes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchreg.utils.errors import CheckpointError, ConfigError, DataError, MissingFileError
from patchreg.utils.files import replace_safely
from patchreg.utils.weights import load_file

_TENSORS = ("confidence", "correct", "predicted", "labels", "logits", "views")


def stage_costs(resized: float, anchor: float, patch: float, stages: int) -> tuple[float, ...]:
    """Return what an image costs that stops at each stage.

    Source:
        `dynamic_inference.py` of the official repository, with the costs of the models instead of
        constants.

    Args:
        resized: Cost of the first look.
        anchor: Cost of the localiser, paid from the second stage on.
        patch: Cost of one window.
        stages: Stages M.
    """
    return tuple(resized + (anchor + stage * patch if stage else 0.0) for stage in range(stages))


@dataclass(eq=False)
class ConfidenceTable:
    """Confidence and correctness of every image at every stage.

    Args:
        confidence: Largest softmax probability of the logits summed up to the stage.
        correct: Whether the most probable class is the label.
        costs: What stopping at each stage costs, such as multiply-accumulates.
        predicted: The most probable class, or None.
        labels: True classes, or None.
        logits: Logits summed up to each stage, or None.
        views: Stages that an image really has (fewer than M when windows were missing, whose
            columns repeat the last one and cost nothing), or None for M everywhere.
        setup: What made the table, in words.

    Shape:
        confidence [N, M] float32; correct [N, M] bool; costs M; predicted [N, M] int32; labels,
        views [N] int64; logits [N, M, C].

    Raises:
        DataError: The parts do not fit together or hold impossible values.
    """

    confidence: Tensor
    correct: Tensor
    costs: tuple[float, ...]
    predicted: Tensor | None = None
    labels: Tensor | None = None
    logits: Tensor | None = None
    views: Tensor | None = None
    setup: str = ""

    def __post_init__(self) -> None:
        self.costs = tuple(float(cost) for cost in self.costs)
        self.validate()

    def __len__(self) -> int:
        return len(self.confidence)

    @property
    def stages(self) -> int:
        """Stages M."""
        return self.confidence.shape[1]

    def validate(self) -> None:
        """Check shapes and values.

        Raises:
            DataError: Says which part is wrong, and how.
        """
        if any(not 0 <= cost < math.inf for cost in self.costs):
            raise DataError(f"costs={self.costs}: expected numbers from 0 on")
        shape = tuple(self.confidence.shape)
        if len(shape) != 2 or 0 in shape:
            raise DataError(f"confidences have shape {shape}; expected [images, stages], both > 0")
        expected: dict[str, tuple[int | None, ...]] = {
            "correct": shape,
            "predicted": shape,
            "labels": shape[:1],
            "views": shape[:1],
            "logits": (*shape, None),
        }
        for name, wanted in expected.items():
            value = getattr(self, name)
            if value is None:
                continue
            found = tuple(value.shape)
            if len(found) != len(wanted) or any(w not in (None, f) for w, f in zip(wanted, found)):
                raise DataError(
                    f"'{name}' has shape {found} beside confidences of shape {shape}; expected "
                    f"{wanted}: the parts come from different tables"
                )
        if len(self.costs) != shape[1]:
            raise DataError(f"{len(self.costs)} costs for {shape[1]} stages; expected one for each")
        if self.correct.dtype != torch.bool:
            raise DataError(f"'correct' has type {self.correct.dtype}; expected torch.bool")
        bad = ~((self.confidence >= 0) & (self.confidence <= 1))
        if bool(bad.any()):
            row, column = bad.nonzero()[0].tolist()
            raise DataError(
                f"the confidence of image {row} at stage {column} is {self.confidence[row, column]:g}; "
                "expected a probability in [0, 1]"
            )
        if self.views is not None and not bool(
            ((self.views >= 1) & (self.views <= shape[1])).all()
        ):
            raise DataError(f"'views' holds values outside 1..{shape[1]}")
        if self.labels is not None and self.logits is not None:
            top = self.logits.shape[2]
            outside = (self.labels < 0) | (self.labels >= top)
            if bool(outside.any()):
                row = int(outside.nonzero()[0])
                raise DataError(
                    f"the label of image {row} is {int(self.labels[row])}, outside of the {top} classes"
                )

    @classmethod
    def from_logits(
        cls,
        views: Tensor,
        labels: Tensor,
        costs: Sequence[float],
        seen: Tensor | None = None,
        keep_logits: bool = True,
        setup: str = "",
    ) -> ConfidenceTable:
        """Build a table from the logits of the single views, which are summed stage by stage.

        Source:
            Section 3.4 of the paper; `make_table.py` of the official repository.

        Args:
            views: Logits of each view.
            labels: True classes.
            costs: What stopping at each stage costs.
            seen: Which views there are; one that is missing adds nothing. None for all.
            keep_logits: Whether the table keeps the summed logits.
            setup: What made the table.

        Shape:
            views [N, M, C]; labels [N]; seen [N, M].

        Raises:
            DataError: A label is no class.
        """
        classes = views.shape[2]
        outside = (labels < 0) | (labels >= classes)
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            raise DataError(
                f"the label of image {row} is {int(labels[row])}; the networks know {classes} classes, 0 to "
                f"{classes - 1}: use the data set they were trained for"
            )
        if seen is not None:
            views = torch.where(seen.unsqueeze(2), views, 0)
        # Step by step, as the early exit adds them: cumsum rounds otherwise.
        summed = torch.stack(list(itertools.accumulate(views.unbind(1))), dim=1)
        confidence, predicted = summed.float().softmax(2).max(2)
        return cls(
            confidence=confidence,
            correct=predicted == labels.unsqueeze(1),
            costs=tuple(costs),
            predicted=predicted.int(),
            labels=labels.long(),
            logits=summed if keep_logits else None,
            views=None if seen is None else seen.sum(1),
            setup=setup,
        )

    def rows(self, chosen: Tensor) -> ConfidenceTable:
        """Take some images.

        Args:
            chosen: Their rows, or a mask.
        """
        parts = {
            name: getattr(self, name)[chosen]
            for name in _TENSORS
            if getattr(self, name) is not None
        }
        return dataclasses.replace(self, **parts)

    def halves(self, seed: int) -> tuple[ConfidenceTable, ConfidenceTable]:
        """Split the images in two, by a permutation that depends on the seed alone.

        Args:
            seed: Seed of NumPy's frozen generator.

        Raises:
            DataError: There is only one image.
        """
        import numpy as np

        if len(self) < 2:
            raise DataError("a table of one image cannot be split into two halves")
        order = torch.from_numpy(np.random.RandomState(seed).permutation(len(self)))
        return self.rows(order[: len(self) // 2]), self.rows(order[len(self) // 2 :])

    def exits(self, thresholds: Sequence[float]) -> Tensor:
        """Return the stage at which each image is sure enough, -1 for never.

        An image leaves at the first stage whose confidence is strictly above the threshold.
        Thresholds are compared in float32, as the published decisions were made.

        Args:
            thresholds: One per stage used, in [0, 1]; at most M.

        Shape:
            Returns [N] int64.

        Raises:
            ConfigError: Too many thresholds, or one outside [0, 1].
        """
        check_thresholds(thresholds, self.stages)
        limits = torch.tensor(list(thresholds), dtype=torch.float32, device=self.confidence.device)
        sure = self.confidence[:, : len(limits)].float() > limits
        found, stage = sure.byte().max(dim=1)
        return torch.where(found.bool(), stage, -1)

    def evaluate(self, thresholds: Sequence[float]) -> Outcome:
        """Return what stopping early by these thresholds gives.

        Source:
            `dynamic_inference.py` of the official repository.

        Args:
            thresholds: One per stage used; those of the last stage accepts every image whatever it is.

        Raises:
            ConfigError: Too many thresholds, or one outside [0, 1].
        """
        first = self.exits(thresholds)
        last = len(thresholds) - 1
        left = torch.where(first < 0, last, first)
        if self.views is not None:
            left = torch.minimum(left, self.views - 1)
        rows = torch.arange(len(self), device=left.device)
        correct = self.correct[rows, left]
        costs = torch.tensor(self.costs, dtype=torch.float64, device=left.device)
        decided = first >= 0
        count = torch.bincount(left[decided], minlength=self.stages)
        hits = torch.bincount(left[decided], correct[decided].double(), minlength=self.stages)
        return Outcome(
            thresholds=tuple(float(value) for value in thresholds),
            accuracy=correct.double().mean().item(),
            cost=costs[left].mean().item(),
            exits=count.tolist(),
            correct=hits.long().tolist(),
            forced=int((~decided).sum()),
            official_accuracy=(hits.sum() / count.sum().clamp(min=1)).item(),
            official_cost=(costs[left] * decided).sum().item() / len(self),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as safetensors.

        Args:
            path: File to write or replace.
        """
        from safetensors.torch import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: getattr(self, name).cpu().contiguous()
            for name in _TENSORS
            if getattr(self, name) is not None
        }
        meta = {"format": "patchreg confidence table", "costs": json.dumps(self.costs)}
        partial = path.with_name(f".{path.name}.partial")
        save_file(tensors, partial, metadata={**meta, "setup": self.setup})
        replace_safely(partial, path)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], costs: Sequence[float] | None = None
    ) -> ConfidenceTable:
        """Read a table: this project's safetensors file, or the authors' `.pth` file.

        Args:
            path: File to read.
            costs: What stopping at each stage costs; needed for the authors' format, which does not
                tell (an empty one means nothing), and overrides what the file says.

        Raises:
            MissingFileError: The file does not exist.
            CheckpointError: The file cannot be read.
            DataError: It holds no table, or one with impossible values.
        """
        path = os.fspath(path)
        if not os.path.isfile(path):
            raise MissingFileError(
                f"table '{path}' does not exist; make it with tools/test.py and the *_table.py config of "
                "the same networks"
            )
        if not path.endswith(".safetensors"):
            return cls.from_official(load_file(path), costs, path)
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                meta = file.metadata() or {}
                names = file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"table '{path}' cannot be read ({error}); make it anew"
            ) from error
        missing = {"confidence", "correct"} - set(tensors)
        if missing or set(tensors) - set(_TENSORS):
            raise DataError(
                f"'{path}' is no confidence table (it holds {', '.join(sorted(tensors))}); expected "
                f"{', '.join(_TENSORS)}"
            )
        if costs is None:
            costs = json.loads(meta.get("costs", "[]"))
        return cls(**tensors, costs=tuple(costs or ()), setup=meta.get("setup", ""))

    @classmethod
    def from_official(
        cls, loaded: Mapping[str, Any], costs: Sequence[float] | None, source: str = "the table"
    ) -> ConfidenceTable:
        """Take over the authors' table; it knows correctness but neither classes nor costs.

        Source:
            `make_table.py` of the official repository.

        Args:
            loaded: Dict with `setup`, `thresholds` (confidences) and `predictions` (correctness).
            costs: What stopping at each stage costs.
            source: Where it came from, for messages.

        Raises:
            DataError: A part is missing or wrong, or there are no costs.
        """
        parts = [loaded.get(name) for name in ("thresholds", "predictions")]
        if not all(isinstance(part, Tensor) for part in parts):
            raise DataError(
                f"'{source}' is no table of the authors (its keys: {', '.join(map(str, loaded))}); expected "
                "the tensors 'thresholds' and 'predictions'"
            )
        if costs is None:
            raise DataError(
                f"'{source}' does not tell what its stages cost; give one cost per stage, such as "
                "stage_costs(0.79e9, 0.06e9, 0.79e9, 5)"
            )
        confidence, correct = parts
        assert isinstance(confidence, Tensor)
        assert isinstance(correct, Tensor)
        if correct.dtype != torch.bool and not bool(((correct == 0) | (correct == 1)).all()):
            raise DataError(
                f"'{source}': predictions hold {correct.max().item():g}; expected whether each stage is "
                "right (bool, or 0 and 1), not classes"
            )
        return cls(
            confidence=confidence.cpu().float(),
            correct=correct.cpu().bool(),
            costs=tuple(costs) or (0.0,) * (correct.shape[1] if correct.ndim == 2 else 0),
            setup=str(loaded.get("setup", "")),
        )

    def to_official(self) -> dict[str, Any]:
        """Return the table in the authors' format, for `torch.save`."""
        return {
            "setup": self.setup,
            "thresholds": self.confidence.cpu().float(),
            "predictions": self.correct.cpu(),
        }


@dataclass(frozen=True)
class Outcome:
    """What stopping early by some thresholds gives.

    Args:
        thresholds: The thresholds.
        accuracy: Share of correct images; the last stage accepts all that come so far.
        cost: Mean cost of an image, in the unit of the table.
        exits: Images that were sure at each stage.
        correct: Those of them that were right.
        forced: Images that were accepted at the last stage without being sure.
        official_accuracy: Share of correct images among those that were sure.
        official_cost: Mean cost with images that were never sure for nothing.
    """

    thresholds: tuple[float, ...]
    accuracy: float
    cost: float
    exits: list[int]
    correct: list[int]
    forced: int
    official_accuracy: float
    official_cost: float


def check_thresholds(thresholds: Sequence[float], stages: int) -> None:
    """Refuse thresholds that do not fit.

    Args:
        thresholds: One per stage used.
        stages: Stages there are.

    Raises:
        ConfigError: Says what is wrong.
    """
    if not 1 <= len(thresholds) <= stages:
        raise ConfigError(
            f"thresholds={list(thresholds)}: {len(thresholds)} values for {stages} stages; give 1 to {stages}, "
            "one for each stage to be used"
        )
    wrong = [value for value in thresholds if not 0 <= value <= 1]
    if wrong:
        raise ConfigError(f"thresholds={list(thresholds)}: {wrong[0]} lies outside [0, 1]")
