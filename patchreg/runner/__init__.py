"""From a config to a run: strict check, launch, runner, loops, optimisation, checkpoints."""

from patchreg.runner import (
    combined,
    features,
    lars,
    loops,
    optim,
    patchrank,
    propagation,
    schedules,
    sharding,
)
from patchreg.runner.build import EngineRunner, build_runner, load_config

__all__ = [
    "EngineRunner",
    "build_runner",
    "combined",
    "features",
    "lars",
    "load_config",
    "loops",
    "optim",
    "patchrank",
    "propagation",
    "schedules",
    "sharding",
]
