"""What can be exported of PatchGame: the ranker of patches and the backbone of the listener.

Letters: B images, P patches.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from patchreg.methods.patchgame.model import PatchGamePretrainer
from patchreg.runner.export import Part


class _Ranker(nn.Module):
    """Images to the score of every patch."""

    def __init__(self, network: PatchGamePretrainer) -> None:
        super().__init__()
        self.sender = network.sender

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.sender.score(images)[0],)


def exports(network: Any) -> dict[str, Part | str]:
    """Return what can be exported of a PatchGame model beside its backbone, and why the rest cannot.

    Args:
        network: Any model.
    """
    if not isinstance(network, PatchGamePretrainer):
        return {}

    def reference(images: Tensor) -> tuple[Tensor]:
        return (network.select(images).score,)

    return {
        "ranker": Part(
            "score of every patch", _Ranker(network), {"score": "[B, patches]"}, reference
        ),
        "model": "it plays a game between two views and classifies nothing",
    }
