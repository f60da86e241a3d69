"""What happens around the iterations: averaging, progress."""

from patchreg.hooks import ema, logger, progress, runtime

__all__ = ["ema", "logger", "progress", "runtime"]
