"""What happens around the iterations: averaging, progress."""

from patchreg.hooks import checkpoint, ema, logger, progress, runtime

__all__ = ["checkpoint", "ema", "logger", "progress", "runtime"]
