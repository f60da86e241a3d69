"""Dynamic Grained Encoder: each region of the token grid picks its query granularity."""

from . import convert, loss, metric, model, pyramid, schedule

__all__ = ["convert", "loss", "metric", "model", "pyramid", "schedule"]
