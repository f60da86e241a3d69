"""What happens around the iterations: averaging, progress."""

from patchreg.hooks import ema, progress

__all__ = ["ema", "progress"]
