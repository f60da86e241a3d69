"""Copy detection: does the original of an edited image come first?

Letters: Q queries, N images of the database, D feature width, d width after whitening.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchreg.metrics.features import FeatureMetric, FeatureSet
from patchreg.metrics.knn import nearest_neighbours
from patchreg.metrics.retrieval import average_precision
from patchreg.registry import METRICS
from patchreg.utils.errors import ConfigError, DataError


class Whitening:
    """Principal components of some features, each divided by its standard deviation.

    Source:
        DINO's `eval_copy_detection.py`, after faiss's `PCAMatrix`.

    Args:
        features: Features to learn from.
        dims: Components kept, the largest; None keeps all.
        centered: Take the second moments about the mean. The published numbers take them about
            zero, although the mean is subtracted from what is whitened.
        subtract_mean: Subtract the mean from what is whitened.

    Shape:
        features [n, D].

    Raises:
        ConfigError: `dims` is not in 1 to D.
    """

    def __init__(
        self,
        features: Tensor,
        dims: int | None = None,
        centered: bool = False,
        subtract_mean: bool = True,
    ) -> None:
        width = features.shape[1]
        dims = width if dims is None else dims
        if not 1 <= dims <= width:
            raise ConfigError(f"whitening to {dims} components: expected 1 to {width}")
        features = features.double()
        mean = features.mean(dim=0)
        self.mean = mean if subtract_mean else torch.zeros_like(mean)
        moments = features - mean if centered else features
        values, vectors = torch.linalg.eigh(moments.T @ moments / len(features))
        values = values.clamp(min=1e-5 * float(values.max()))
        self.projection = (vectors * values.rsqrt()).flip(1)[:, :dims]

    def __call__(self, features: Tensor) -> Tensor:
        """Whiten features.

        Args:
            features: Features.

        Shape:
            features [N, D]; returns [N, d] of the same type.
        """
        return ((features.double() - self.mean) @ self.projection).to(features.dtype)


@METRICS.register_module()
class CopyDetectionMetric(FeatureMetric):
    """Mean average precision with which edited images find their originals, by kind of edit, in percent.

    The label of a query is that of its original in the database (`bank`); images of `distractor` are
    added to the database. The list is cut after some places. A test set whose metainfo holds
    `block_names` and `block_of` (one number per image) is reported block by block.

    Source:
        Douze et al., "Evaluation of GIST descriptors for web-scale image search" (Copydays);
        DINO's `eval_copy_detection.py`.

    Args:
        top: Places that are looked at.
        whiten: Whiten with the features of `whitening`, where they are configured.
        dims: Components kept by the whitening; None keeps all.
        centered: Learn the whitening about the mean; the published numbers do not.
        recall: Report the share of queries whose original comes first, too.
        prefix: Prefix of the reported names.

    Raises:
        ConfigError: `top` is below 1.
    """

    default_prefix = "copies"

    def __init__(
        self,
        top: int = 20,
        whiten: bool = True,
        dims: int | None = None,
        centered: bool = False,
        recall: bool = False,
        prefix: str | None = None,
    ) -> None:
        super().__init__(prefix=prefix)
        if top < 1:
            raise ConfigError(f"top={top}: expected at least 1 place")
        self.top = top
        self.whiten = whiten
        self.dims = dims
        self.centered = centered
        self.recall = recall

    def measure(self, sets: dict[str, FeatureSet]) -> dict[str, Any]:
        """Look for the original of every query.

        Args:
            sets: `test`, `bank` and perhaps `distractor` and `whitening`.

        Raises:
            DataError: A set has no labels.
        """
        test, bank = self.need(sets, "test"), self.need(sets, "bank")
        if test.labels is None or bank.labels is None:
            raise DataError("copy detection needs labels: the number of the original of each image")
        database = bank.tensor().float()
        if "distractor" in sets:
            database = torch.cat((database, sets["distractor"].tensor().float()))
        queries = test.tensor().float()
        if self.whiten and "whitening" in sets:
            change = Whitening(sets["whitening"].tensor(), self.dims, self.centered)
            database, queries = change(database), change(queries)
        aps, found = self.score(queries, database, test.labels, bank.labels)
        metrics = {"mAP": 100.0 * aps.mean().item()}
        if self.recall:
            metrics["R@1"] = 100.0 * (found == 0).double().mean().item()
        names = test.meta.get("block_names", ())
        block_of = torch.from_numpy(np.asarray(test.meta.get("block_of", ()), dtype=np.int64))
        for number, name in enumerate(names):
            metrics[f"{name}_mAP"] = 100.0 * aps[block_of == number].mean().item()
        return metrics

    def score(
        self, queries: Tensor, database: Tensor, labels: Tensor, originals: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Score every query.

        Args:
            queries: Features of edited images.
            database: Features of originals, then of distractors.
            labels: Label of each query.
            originals: Labels of the originals.

        Shape:
            queries [Q, D]; database [N, D]; labels [Q]; originals up to [N]; returns average
            precisions [Q] and the place of the first original [Q], -1 if not among the first.
        """
        top = min(self.top, len(database))
        _, order = nearest_neighbours(queries, database, top, cosine=True)
        known = torch.full((len(database),), -1, dtype=torch.int64)
        known[: len(originals)] = originals
        hits = known[order.cpu()] == labels[:, None]
        positives = (originals[None] == labels[:, None]).sum(dim=1).tolist()
        aps, first = [], []
        for row, number in zip(hits, positives, strict=True):
            ranks = row.nonzero().squeeze(1).tolist()
            aps.append(average_precision(ranks, number) if number else 0.0)
            first.append(ranks[0] if ranks else -1)
        return torch.tensor(aps, dtype=torch.float64), torch.tensor(first)
