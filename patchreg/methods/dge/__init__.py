"""Dynamic Grained Encoder: each region of the token grid picks its query granularity."""

from . import budget, convert, hook, loop, loss, metric, model, pyramid, schedule

__all__ = ["budget", "convert", "hook", "loop", "loss", "metric", "model", "pyramid", "schedule"]
