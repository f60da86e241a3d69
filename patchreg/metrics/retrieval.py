"""Retrieval: average precision and precision at k of ranked lists, with images that do not count.

Letters: Q queries, N images of the database, D feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from patchreg.metrics.features import FeatureMetric, FeatureSet
from patchreg.registry import METRICS
from patchreg.utils.errors import ConfigError, DataError

NONE, EASY, HARD, JUNK = range(4)
"""What an image of the database is to a query."""

PROTOCOLS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "E": ((EASY,), (JUNK, HARD)),
    "M": ((EASY, HARD), (JUNK,)),
    "H": ((HARD,), (JUNK, EASY)),
}
"""Easy, medium and hard: what is to be found, and what is taken out of the list."""


def average_precision(ranks: Sequence[int], positives: int) -> float:
    """Return the area under the precision-recall curve, by the trapezoid rule.

    Source:
        `compute_ap` of the revisited Oxford and Paris benchmark (revisitop).

    Args:
        ranks: Places of the images that were found, from 0, ascending.
        positives: Images that were to be found, at least 1; those missing in `ranks` add nothing.
    """
    area = 0.0
    for number, rank in enumerate(ranks):
        before = 1.0 if rank == 0 else number / rank
        area += (before + (number + 1) / (rank + 1)) / 2
    return area / positives


def precision_at(ranks: Sequence[int], k: int) -> float:
    """Return the precision among the first k places, or up to the last image that is to be found.

    Source:
        `compute_map` of revisitop.

    Args:
        ranks: Places of all images that were to be found, from 0, ascending; at least one.
        k: Places, from 1.
    """
    places = min(1 + ranks[-1], k)
    return sum(rank < places for rank in ranks) / places


def ranks_of(order: Tensor, positive: Tensor, ignored: Tensor) -> list[int]:
    """Return the places of the positives in a list from which the ignored images are taken out.

    Args:
        order: Images of the database, best first.
        positive: Whether an image is to be found.
        ignored: Whether an image does not count.

    Shape:
        order [N] int64; positive, ignored [N] bool.
    """
    kept = order[~ignored[order]]
    return positive[kept].nonzero().squeeze(1).tolist()


def score_protocol(
    order: Tensor,
    relation: Tensor,
    positives: Sequence[int],
    ignored: Sequence[int],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, Any]:
    """Score ranked lists under one protocol.

    Args:
        order: Images of the database for each query, best first.
        relation: What each image is to each query.
        positives: Relations that are to be found.
        ignored: Relations that are taken out of the list.
        ks: Places for the mean precision.

    Returns:
        `map`, `mp` (one value per k), `aps` and `precisions` per query, nan where nothing is to be
        found; those queries are left out of the means.

    Shape:
        order [Q, N] int64; relation [Q, N].
    """
    good = torch.isin(relation, torch.tensor(positives, device=relation.device))
    left_out = torch.isin(relation, torch.tensor(ignored, device=relation.device))
    aps, precisions = [], []
    for row, positive, without in zip(order, good, left_out, strict=True):
        ranks = ranks_of(row, positive, without)
        found = bool(ranks)
        aps.append(average_precision(ranks, len(ranks)) if found else torch.nan)
        precisions.append([precision_at(ranks, k) if found else torch.nan for k in ks])
    per_query = torch.tensor(aps, dtype=torch.float64)
    at_k = torch.tensor(precisions, dtype=torch.float64)
    return dict(
        map=per_query.nanmean().item(), mp=at_k.nanmean(0).tolist(), aps=per_query, precisions=at_k
    )


def relation_matrix(ground_truth: Sequence[dict[str, Sequence[int]]], count: int) -> Tensor:
    """Say what each image of the database is to each query.

    Args:
        ground_truth: For each query the images that are `easy`, `hard` and `junk`.
        count: Images of the database N.

    Shape:
        Returns [Q, N] uint8.

    Raises:
        DataError: An image number is not in the database.
    """
    relation = torch.zeros(len(ground_truth), count, dtype=torch.uint8)
    for query, truth in enumerate(ground_truth):
        for value, name in ((EASY, "easy"), (HARD, "hard"), (JUNK, "junk")):
            rows = torch.as_tensor(truth[name], dtype=torch.int64)
            if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < count:
                raise DataError(
                    f"ground truth of query {query} names image {int(rows.max())}, but the "
                    f"database has {count}; give the whole database as bank_dataloader"
                )
            relation[query, rows] = value
    return relation


@METRICS.register_module()
class RetrievalMetric(FeatureMetric):
    """Mean average precision and mean precision at k of retrieval by dot product, in percent.

    Where the test set has a ground truth of easy, hard and junk images (revisited Oxford and Paris),
    the protocols E, M and H are reported; else images of the query's class are to be found.
    `FeatureTestLoop` gives the queries as test set, the database as `bank` and, where configured,
    further images that match nothing as `distractor`.

    Source:
        Radenovic et al., "Revisiting Oxford and Paris: large-scale image retrieval benchmarking"
        (CVPR 2018); DINO's `eval_image_retrieval.py`.

    Args:
        ks: Places for the mean precision.
        prefix: Prefix of the reported names.

    Raises:
        ConfigError: A number of places is below 1.

    Differs from official:
        Protocol E is reported too.
    """

    default_prefix = "retrieval"

    def __init__(self, ks: Sequence[int] = (1, 5, 10), prefix: str | None = None) -> None:
        super().__init__(prefix=prefix)
        if not ks or min(ks) < 1:
            raise ConfigError(f"ks={tuple(ks)}: expected numbers of places from 1")
        self.ks = tuple(ks)

    def measure(self, sets: dict[str, FeatureSet]) -> dict[str, Any]:
        """Rank the database for every query and score the lists.

        Args:
            sets: `test`, `bank` and perhaps `distractor`.

        Raises:
            DataError: There is neither a ground truth nor labels.
        """
        test, bank = self.need(sets, "test"), self.need(sets, "bank")
        queries, database = (F.normalize(part.tensor().float(), dim=1) for part in (test, bank))
        extra = 0
        if "distractor" in sets:
            further = F.normalize(sets["distractor"].tensor().float(), dim=1)
            database, extra = torch.cat((database, further)), len(further)
        order = (queries @ database.T).argsort(dim=1, descending=True, stable=True).cpu()
        protocols = PROTOCOLS
        if "ground_truth" in test.meta:
            relation = relation_matrix(test.meta["ground_truth"], len(bank))
        elif test.labels is not None and bank.labels is not None:
            relation = (test.labels[:, None] == bank.labels[None]).to(torch.uint8) * EASY
            protocols = {"": ((EASY,), (JUNK,))}
        else:
            raise DataError("retrieval needs a ground truth of the queries, or labels of both sets")
        relation = F.pad(relation, (0, extra), value=NONE)
        metrics: dict[str, float] = {}
        for name, (positives, ignored) in protocols.items():
            found = score_protocol(order, relation, positives, ignored, self.ks)
            start = f"{name}_" if name else ""
            metrics[f"{start}mAP"] = 100.0 * found["map"]
            for k, value in zip(self.ks, found["mp"], strict=True):
                metrics[f"{start}mP@{k}"] = 100.0 * value
        return metrics
