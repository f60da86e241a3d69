"""What can be exported of the Dynamic Grained Encoder: models that compute every granularity."""

from __future__ import annotations

from typing import Any

import torch
from patchreg_ops import reference

from patchreg.methods.dge.model import DGEClassifier
from patchreg.runner.export import Part, classifier_parts


def exports(network: Any) -> dict[str, Part | str]:
    """Return what can be exported of a DGE model, and why the rest cannot.

    Args:
        network: Any model.
    """
    path = getattr(getattr(network, "backbone", None), "eval_path", None)
    if not isinstance(network, DGEClassifier) or path is None:
        return {}
    if path != "dense":
        why = (
            "how many queries it computes depends on the image; the dense form gives the same numbers: "
            "--cfg-options model.backbone.eval_path=dense"
        )
        return {"model": why, "backbone": why}
    operators = torch.ops.patchreg
    # Spelt out, so that the file needs no operator of this project.
    table = {
        getattr(operators, name).default: getattr(reference, name)
        for name in ("region_pool_dense", "region_unpool_dense")
    }
    return dict(classifier_parts(network, decompositions=table))
