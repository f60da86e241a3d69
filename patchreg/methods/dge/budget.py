"""One trained checkpoint at any compute budget: routers are moved until the mean cost meets it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import torch
from mmengine.model import is_model_wrapper
from torch import Tensor

from patchreg.methods.dge.cost import Routing
from patchreg.methods.dge.model import DGEClassifier
from patchreg.utils.errors import ConfigError, DataError, MissingFileError

MAX_PASSES = 12
AIM = 0.1
"""Part of the tolerance at which the search stops early; other images will differ as well."""


@torch.no_grad()
def calibrate_budget(
    model: DGEClassifier, batches: Sequence[Tensor], target: float, tolerance: float = 0.02
) -> dict[str, float]:
    """Move the routers of a model so that evaluation costs a wanted share of its dense twin.

    All routers get the same shift, found by bisection over real forward passes, because the choices
    of a block change what later blocks see. At target 1 every region takes the finest candidate.
    The shift lasts until the next one and is no part of a checkpoint. Calibrate before capturing
    the model in a graph.

    Source:
        Own. For given inputs the shift is the price of a query in the Lagrangian of the best scores
        under a mean cost.

    Args:
        model: Model with routers; its mode stays as it is.
        batches: Preprocessed images, some hundreds in all.
        target: Wanted mean of executed / dense static cost (corrected), up to 1.
        tolerance: Largest relative distance from the target.

    Returns:
        `shift`; the `share` measured with it; `lowest` and `highest`, which can be reached; and
        `passes` over the batches, at most 12.

    Shape:
        batches [B, 3, H, W] each.

    Raises:
        ConfigError: The target lies outside the reachable range, or the shares jump over it.
        DataError: There are no images.
    """
    if not batches:
        raise DataError("a budget is calibrated on images; pass at least one batch")
    training, chosen = model.training, None
    shares: dict[float, float] = {}

    def measure(shift: float) -> list[Routing]:
        model.shift_routers(shift)
        routings = [model.extract(images).routing for images in batches]
        ratios = [item.dynamic("corrected") / item.static("corrected") for item in routings]
        shares[shift] = torch.cat(ratios).mean().item()
        return routings

    model.eval()
    try:
        measure(math.inf)
        measure(-math.inf)
        lowest, highest = shares[-math.inf], shares[math.inf]
        if not lowest * (1 - tolerance) <= target <= 1:
            raise ConfigError(
                f"budget={target}: this model reaches {lowest:.4f} (coarsest everywhere) to "
                f"{highest:.4f} (finest everywhere) of its dense twin's cost; choose a target between"
            )
        if target < highest:
            _bisect(measure, shares, target, tolerance)
            nearest = min(shares, key=lambda shift: abs(shares[shift] - target))
            if abs(shares[nearest] - target) > tolerance * target:
                around = (
                    max(share for share in shares.values() if share < target),
                    min(share for share in shares.values() if share > target),
                )
                raise ConfigError(
                    f"budget={target} cannot be met within {tolerance:.1%}: the share jumps from "
                    f"{around[0]:.4f} to {around[1]:.4f}, because the routers score too many regions "
                    "alike; use more images, or train the routers longer"
                )
            chosen = nearest
        else:
            chosen = math.inf
    finally:
        model.shift_routers(chosen)
        model.train(training)
    return dict(
        shift=chosen, share=shares[chosen], lowest=lowest, highest=highest, passes=len(shares)
    )


def _bisect(
    measure: Callable[[float], list[Routing]],
    shares: dict[float, float],
    target: float,
    tolerance: float,
) -> None:
    """Measure shifts nearer and nearer to the target."""
    levels = _ties(measure(0.0))
    low, high = -1, len(levels)
    while high - low > 1 and len(shares) < MAX_PASSES:
        middle = (low + high) // 2
        shift = levels[middle].item()
        measure(shift)
        if abs(shares[shift] - target) <= AIM * tolerance * target:
            return
        if shares[shift] < target:
            low = middle
        else:
            high = middle


def _ties(routings: Sequence[Routing]) -> Tensor:
    """Return the shifts at which two candidates of a region score the same, in rising order.

    Halving their number, not a range of shifts, fits routers of any scale.
    """
    found = []
    for routing in routings:
        for block in routing.blocks:
            if block.logits is None:
                continue
            squares = [(split / max(block.splits)) ** 2 for split in block.splits]
            for one, other in combinations(range(len(squares)), 2):
                lead = block.logits[..., other] - block.logits[..., one]
                found.append(lead.flatten().double() / (squares[one] - squares[other]))
    return torch.cat(found).sort().values if found else torch.zeros(0)


def bare_model(runner: Any) -> Any:
    """Return the model of a runner, out of its wrapper for several processes.

    Args:
        runner: The runner.
    """
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def calibration_batches(runner: Any, stage: str, count: int) -> list[Tensor]:
    """Read images to calibrate on, evenly spread over a set, without their labels.

    They come from the training set of the config with the pipeline of the evaluation; where there is
    none that can be read, from the evaluated set itself. The log says which.

    Args:
        runner: The runner; its config names the training set.
        stage: `val` or `test`.
        count: How many images at most.

    Returns:
        Preprocessed batches on the device of the model.
    """
    loader = getattr(runner, f"{stage}_dataloader")
    dataset, name = _training_images(runner, f"{stage}_dataloader"), "training"
    if dataset is None:
        dataset, name = loader.dataset, "evaluated"
    count = min(count, len(dataset))
    step = len(dataset) // count
    runner.logger.info(f"budget: calibrated on {count} images of the {name} set, without labels")
    model, batches = bare_model(runner), []
    size = loader.batch_size or 1
    for start in range(0, count, size):
        chosen = range(start, min(start + size, count))
        batch = loader.collate_fn([dataset[index * step] for index in chosen])
        batches.append(model.data_preprocessor(batch, False)["inputs"])
    return batches


def _training_images(runner: Any, evaluated: str) -> Any:
    """Return the training set under the pipeline of the evaluated one, or None."""
    configs = [runner.cfg.get(key) for key in ("train_dataloader", evaluated)]
    if any("pipeline" not in ((config or {}).get("dataset") or {}) for config in configs):
        return None
    config = copy.deepcopy(configs[1])
    config["dataset"] = {**configs[0]["dataset"], "pipeline": config["dataset"]["pipeline"]}
    config["num_workers"] = 0
    config["persistent_workers"] = False
    try:
        return runner.build_dataloader(config, seed=runner.seed).dataset
    except (DataError, MissingFileError) as error:
        runner.logger.warning(f"budget: the training set cannot be read ({error})")
        return None
