"""What happens around the iterations: averaging, progress."""

from patchreg.hooks import checkpoint, ema, finite, freeze, logger, progress, runtime

__all__ = ["checkpoint", "ema", "finite", "freeze", "logger", "progress", "runtime"]
