"""What can be exported of PatchDrop: the policy, and the whole model where nothing is left out for real.

Letters: B images, P patches, K classes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from patchreg.methods.patchdrop.model import PatchDropClassifier
from patchreg.methods.patchdrop.selector import PatchDropSelector
from patchreg.runner.export import Logits, Part


class _Policy(nn.Module):
    """Images to the probability of keeping each patch, and the decisions."""

    def __init__(self, network: PatchDropClassifier) -> None:
        super().__init__()
        self.overview = network.overview
        self.selector = network.selector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        probability = self.selector(self.overview(images))[0].sigmoid()
        return probability, self.selector.decide(probability)


def exports(network: Any) -> dict[str, Part | str]:
    """Return what can be exported of a PatchDrop model, and why the rest cannot.

    Args:
        network: Any model.
    """
    if not isinstance(network, PatchDropClassifier):
        return {}
    if not isinstance(network.selector, PatchDropSelector):
        why = "its policy is fixed and looks at no image"
        return {"policy": why, "model": why}

    def reference(images: Tensor) -> tuple[Tensor, Tensor]:
        selection = network.select(images)
        return selection.score, selection.keep

    outputs = {"probability": "[B, patches]", "keep": "[B, patches]"}
    found: dict[str, Part | str] = {
        "policy": Part("which patches to look at", _Policy(network), outputs, reference)
    }
    if hasattr(network.classifier, "classify"):
        found["model"] = (
            "its classifier computes the kept patches only, whose number depends on the image; export "
            "the policy, and load the classifier from its own config"
        )
    else:
        found["model"] = Part(
            "policy and classifier, which reads the image with dropped patches erased",
            Logits(network),
            {"logits": "[B, classes]"},
            lambda images: (network.run(images).logits,),
        )
    return found
