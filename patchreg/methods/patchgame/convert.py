"""Checkpoints."""

from __future__ import annotations


def official_name(key: str) -> str:
    """Return the official name of an entry of ours.

    Args:
        key: Name in our state dict.
    """
    for part in ("patch_rank.", "vision."):
        key = key.replace(f"{part}model.", part)
    return key.removeprefix("model.")
