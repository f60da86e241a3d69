"""A training checkpoint, cut down to what others need: the weights that are evaluated, and where they are from.

Optimiser, schedules, logs, the config with its paths and the second set of weights stay behind.
"""

from __future__ import annotations

from typing import Any

from patchreg.utils.errors import ConfigError
from patchreg.utils.weights import state_dict_of

LAYOUTS = {
    "full": "the evaluated weights as they are",
    "half": "the same in float16, half the size; integers as they are",
    "run": "a checkpoint of a run; only read",
}
"""Layouts of this converter, with what they are."""

ALLOWED: tuple[type, ...] = ()
"""Checkpoints of this project hold plain values only."""

OPTIONS: dict[str, dict[str, Any]] = {}
"""There are no further flags."""

KEPT = ("epoch", "iter", "seed", "experiment_name", "dataset_meta")
"""What stays of the description of the run."""


def convert(
    loaded: dict[str, Any], path: str, to: str, layout: str = "auto"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keep the weights of a checkpoint.

    Args:
        loaded: What `load_file` returned.
        path: Where it came from, for messages.
        to: `full` or `half`.
        layout: `run` or `auto`.

    Returns:
        The checkpoint, and the report.

    Raises:
        ConfigError: Another direction was asked for, or a weight does not fit into float16.
        CheckpointError: There are no weights.
    """
    if to not in ("full", "half") or layout not in ("auto", "run"):
        raise ConfigError(
            f"--from {layout} --to {to}: this converter goes from run to full or half"
        )
    state = {
        key: value.detach().cpu().clone() for key, value in state_dict_of(loaded, path).items()
    }
    if to == "half":
        for key, value in state.items():
            if not value.is_floating_point():
                continue
            state[key] = value.half()
            if bool(value.isfinite().all()) and not bool(state[key].isfinite().all()):
                raise ConfigError(f"'{path}': {key} exceeds the range of float16; use --to full")
    meta = loaded.get("meta")
    meta = {key: meta[key] for key in KEPT if key in meta} if isinstance(meta, dict) else {}
    dropped = [key for key in loaded if key not in ("meta", "state_dict")]
    report = {
        "from": "run",
        "to": to,
        "used": list(state),
        "not_carried": dropped if "state_dict" in loaded else [],
        "model": {},
    }
    size = sum(value.numel() * value.element_size() for value in state.values())
    report["weights"] = [f"{size / 2**20:.2f} MiB"]
    return {"meta": meta, "state_dict": {k: v.contiguous() for k, v in state.items()}}, report
