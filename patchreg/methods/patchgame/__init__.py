"""PatchGame: two agents play a referential game about patches."""

from . import model

__all__ = ["model"]
