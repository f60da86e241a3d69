"""Public weights by name: where they are published, and where they are looked for. Nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path("data", "weights")
_DINO = "https://dl.fbaipublicfiles.com/dino/"


@dataclass(frozen=True)
class PublicWeights:
    """One published file.

    Args:
        url: Where it is published.
        timm: Name of the same weights in timm, or None.
    """

    url: str
    timm: str | None = None

    @property
    def path(self) -> Path:
        """Where the file is looked for, relative to the folder that the tool is called in."""
        return FOLDER / self.url.rsplit("/", 1)[-1]

    def advice(self) -> str:
        """Say how to get the file."""
        text = f"download {self.url} and put it at '{self.path}'"
        return text + (f" (timm has the same weights as '{self.timm}')" if self.timm else "")


def _dino_family(name: str, stem: str, timm: str | None = None) -> dict[str, PublicWeights]:
    """Return the backbone of one of DINO's runs, its whole checkpoint and its linear classifier."""
    folder = f"{_DINO}dino_{stem}_pretrain/dino_{stem}_"
    return {
        name: PublicWeights(f"{folder}pretrain.pth", timm),
        f"{name}_full": PublicWeights(f"{folder}pretrain_full_checkpoint.pth"),
        f"{name}_linear": PublicWeights(f"{folder}linearweights.pth"),
    }


PUBLIC_WEIGHTS: dict[str, PublicWeights] = {
    **_dino_family("dino_vits16", "deitsmall16", "vit_small_patch16_224.dino"),
    **_dino_family("dino_vits8", "deitsmall8", "vit_small_patch8_224.dino"),
    **_dino_family("dino_vitb16", "vitbase16", "vit_base_patch16_224.dino"),
    **_dino_family("dino_vitb8", "vitbase8", "vit_base_patch8_224.dino"),
    **_dino_family("dino_resnet50", "resnet50"),
    **_dino_family("dino_xcit_small_12_p16", "xcit_small_12_p16"),
    **_dino_family("dino_xcit_small_12_p8", "xcit_small_12_p8"),
    **_dino_family("dino_xcit_medium_24_p16", "xcit_medium_24_p16"),
    **_dino_family("dino_xcit_medium_24_p8", "xcit_medium_24_p8"),
    "dino_vits8_300ep": PublicWeights(
        f"{_DINO}dino_deitsmall8_300ep_pretrain/dino_deitsmall8_300ep_pretrain.pth"
    ),
    "dino_vits16_googlelandmark": PublicWeights(
        f"{_DINO}dino_vitsmall16_googlelandmark_pretrain/dino_vitsmall16_googlelandmark_pretrain.pth"
    ),
}
"""Published weights by the name that stands for their file in place of a checkpoint."""


def advice_for(path: str) -> str | None:
    """Say how to get a file that is missing, if it is one of the public ones.

    Args:
        path: Name of public weights, or the path that they are looked for at.
    """
    for name, weights in PUBLIC_WEIGHTS.items():
        if path == name or Path(path) == weights.path:
            return weights.advice()
    return None
