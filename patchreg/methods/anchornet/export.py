"""What can be exported of AnchorNet: the localiser, and the classifiers that look at one view.

Letters: B images, h x w windows, K windows looked at, C classes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from patchreg.methods.anchornet.ensemble import AnchorNetEnsembleClassifier
from patchreg.methods.anchornet.model import AnchorNetClassifier, AnchorNetPatchClassifier
from patchreg.methods.anchornet.selector import window_boxes
from patchreg.runner.export import Part, classifier_parts

_LOCALISED = (
    "it cuts out windows that depend on the image{stops}; export its localiser, and load the networks "
    "for the views from their own configs"
)


class _Localiser(nn.Module):
    """Images to logits, class activation map of the predicted class, and boxes of the chosen windows."""

    def __init__(self, network: AnchorNetClassifier) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self.network.localise(images)
        return found.logits, found.cam, window_boxes(found.cells, found.grid[1], found.window)


def exports(network: Any) -> dict[str, Part | str]:
    """Return what can be exported of an AnchorNet model, and why the rest cannot.

    Args:
        network: Any model.
    """
    if isinstance(network, AnchorNetClassifier):
        # Convolutions and tables of overlaps: what runs is traced, so that the tables are constants.
        return {"localiser": _localiser(network), **classifier_parts(network, strict=False)}
    if isinstance(network, AnchorNetPatchClassifier):
        why = _LOCALISED.format(stops="")
    elif isinstance(network, AnchorNetEnsembleClassifier):
        why = _LOCALISED.format(stops=" and stops early")
    else:
        return {}
    return {"localiser": _localiser(network.anchor), "model": why, "backbone": why}


def _localiser(network: Any) -> Part:
    def reference(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        selection = network.select(images)
        score = selection.score.unflatten(1, selection.grid)
        return network(images), score, selection.boxes

    outputs = {"logits": "[B, classes]", "map": "[B, rows, columns]", "boxes": "[B, windows, 4]"}
    return Part(
        "class activation map and windows",
        _Localiser(network),
        outputs,
        reference,
        False,
    )
