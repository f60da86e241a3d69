"""Weighted k-nearest-neighbour classification of features, all values of k in one exact pass.

Letters: Q queries, N entries of the bank, D feature width, K classes, k neighbours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_reduce, get_dist_info
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.nn import functional as F

from patchreg.metrics.features import FeatureMetric, FeatureSet
from patchreg.registry import METRICS
from patchreg.utils.errors import ConfigError, DataError

TILE = 4096
CHUNK = 512
SLAB = 65536
BACKENDS = ("torch", "faiss")
NO_PLACE = torch.iinfo(torch.int64).max


class TopK:
    """Running k largest scores of some queries, over tiles of a bank.

    The scores of a tile are compared with the k-th largest so far, so that only the few that can
    enter are looked at; they are sorted in once there are k of them for some query.

    Args:
        k: Scores kept for each query.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self.values: list[Tensor] = []
        self.indices: list[Tensor] = []
        self.bound: Tensor | None = None

    def update(self, scores: Tensor, start: int) -> None:
        """Take in the scores of the next tile.

        Args:
            scores: Scores of all queries.
            start: Number of the tile's first entry in the bank.

        Shape:
            scores [q, t].
        """
        # On a GPU picking single scores would wait for the device.
        if self.bound is None or scores.is_cuda:
            found = scores.topk(min(self.k, scores.shape[1]), dim=1)
            values, columns = found.values, found.indices
        else:
            values, columns = _above(scores, self.bound)
        self.values.append(values)
        self.indices.append(columns + start)
        if sum(part.shape[1] for part in self.values[1:]) >= self.k or self.bound is None:
            self.merge()

    def merge(self) -> tuple[Tensor, Tensor]:
        """Sort in what is waiting and return the scores, largest first, and their entries.

        Shape:
            Returns [q, k] and int64 [q, k].
        """
        values, indices = torch.cat(self.values, dim=1), torch.cat(self.indices, dim=1)
        values, order = values.topk(min(self.k, values.shape[1]), dim=1)
        self.values, self.indices = [values], [indices.gather(1, order)]
        if values.shape[1] == self.k:
            self.bound = values[:, -1:]
        return self.values[0], self.indices[0]


def _above(scores: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores above each row's bound and their columns, filled up with -inf."""
    hits = (scores > bound).flatten().nonzero().squeeze(1)
    rows = hits.div(scores.shape[1], rounding_mode="floor")
    counts = rows.bincount(minlength=len(scores))
    place = torch.arange(len(hits)) - (counts.cumsum(0) - counts)[rows]
    values = scores.new_full((len(scores), int(counts.max())), -torch.inf)
    columns = torch.zeros(values.shape, dtype=torch.int64)
    values[rows, place] = scores.flatten()[hits]
    columns[rows, place] = hits - rows * scores.shape[1]
    return values, columns


def nearest_neighbours(
    queries: Tensor,
    bank: Tensor | np.ndarray,
    k: int,
    dtype: torch.dtype | None = None,
    backend: str = "torch",
    cosine: bool = False,
) -> tuple[Tensor, Tensor]:
    """Find the k entries of a bank with the largest dot product, exactly.

    The bank is read once, in slabs that are moved to the device of the queries; memory is bounded by
    the queries, their neighbours and one slab, whatever the size of the bank. Among entries that
    score equally at the k-th place any may be chosen.

    Source:
        Replaces the search of DINO's `eval_knn.py`, which repeats it for every k.

    Args:
        queries: Features to classify.
        bank: Features to search in; a memory-mapped array is read slab by slab.
        k: Neighbours, at most N.
        dtype: Type that scores are computed in; None is the queries' own. In bfloat16 the search is
            twice as fast or more, and neighbours of nearly equal similarity change places.
        backend: `torch`, or `faiss` for faiss's flat index (float32).
        cosine: Divide all features by their length first.

    Shape:
        queries [Q, D]; bank [N, D]; returns similarities [Q, k], largest first, and int64 [Q, k].

    Raises:
        ValueError: Sizes do not fit, or k is not in 1 to N.
        ConfigError: faiss is not installed, or the backend is unknown.
    """
    if queries.ndim != 2 or len(bank.shape) != 2 or queries.shape[1] != bank.shape[1]:
        raise ValueError(
            f"queries {tuple(queries.shape)} and bank {tuple(bank.shape)}: expected two matrices "
            "with one feature width"
        )
    if not 1 <= k <= len(bank):
        raise ValueError(f"k={k}: expected 1 to {len(bank)}, the size of the bank")
    if backend not in BACKENDS:
        raise ConfigError(f"backend={backend!r} is unknown; use one of {BACKENDS}")
    dtype = dtype or queries.dtype
    device = queries.device
    prepare = partial(F.normalize, dim=1) if cosine else nn.Identity()
    queries = prepare(queries).to(dtype)
    if backend == "faiss":
        return _search_with_faiss(queries, bank, k, prepare)
    tile, chunk = (TILE, CHUNK) if device.type == "cpu" else (SLAB, 2 * TILE)
    chunks = queries.split(chunk)
    best = [TopK(k) for _ in chunks]
    for begin in range(0, len(bank), SLAB):
        slab = prepare(_tensor(bank[begin : begin + SLAB]).to(device)).to(dtype)
        for part, kept in zip(chunks, best, strict=True):
            for offset in range(0, len(slab), tile):
                kept.update(part @ slab[offset : offset + tile].T, begin + offset)
    merged = [kept.merge() for kept in best]
    return torch.cat([values for values, _ in merged]), torch.cat([index for _, index in merged])


def _tensor(part: Tensor | np.ndarray) -> Tensor:
    """Return a slab as a tensor; a read-only map is copied, as torch cannot hold it."""
    if isinstance(part, Tensor):
        return part
    return torch.from_numpy(part if part.flags.writeable else np.array(part))


def _search_with_faiss(
    queries: Tensor, bank: Tensor | np.ndarray, k: int, prepare: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            "backend='faiss' needs faiss, which is not installed: pip install faiss-cpu, or use "
            "backend='torch'"
        ) from error
    index = faiss.IndexFlatIP(queries.shape[1])
    for begin in range(0, len(bank), SLAB):
        index.add(prepare(_tensor(bank[begin : begin + SLAB]).float()).cpu().numpy())
    values, indices = index.search(queries.float().cpu().numpy(), k)
    return torch.from_numpy(values), torch.from_numpy(indices)


def knn_votes(
    similarities: Tensor,
    labels: Tensor,
    ks: Sequence[int],
    num_classes: int,
    temperature: float = 0.07,
) -> list[Tensor]:
    """Sum exp(similarity / temperature) of the k nearest neighbours by class, for several k.

    Source:
        DINO, `eval_knn.py`; "Unsupervised feature learning via non-parametric instance
        discrimination", section 3.4.

    Args:
        similarities: Of the neighbours, largest first.
        labels: Class of each neighbour.
        ks: Values of k, ascending, at most the number of neighbours.
        num_classes: Classes K.
        temperature: Divides the similarities, above 0.

    Shape:
        similarities, labels [Q, neighbours]; returns one [Q, K] per k.
    """
    kind = torch.promote_types(similarities.dtype, torch.float32)
    weights = similarities.to(kind).div(temperature).exp()
    votes = weights.new_zeros(len(weights), num_classes)
    found = []
    done = 0
    for k in ks:
        votes = votes.scatter_add(1, labels[:, done:k], weights[:, done:k])
        done = k
        found.append(votes)
    return found


def class_ranks(votes: Tensor, targets: Tensor) -> Tensor:
    """Return the place of each query's true class, 0 for the best one; `NO_PLACE` without a vote.

    Equal votes are ordered by the number of the class.

    Args:
        votes: Votes per class, not negative.
        targets: True classes.

    Shape:
        votes [Q, K]; targets [Q]; returns int64 [Q].
    """
    own = votes.gather(1, targets[:, None])
    before = torch.arange(votes.shape[1], device=votes.device) < targets[:, None]
    rank = ((votes > own) | ((votes == own) & before)).sum(dim=1)
    return torch.where(own.squeeze(1) > 0, rank, NO_PLACE)


@METRICS.register_module()
class KNNMetric(FeatureMetric):
    """Top-1 and top-5 accuracy of a weighted k-NN classifier, in percent, for several k at once.

    `FeatureTestLoop` gives it the features of the test set and, as `bank`, of the training set.
    Top-5 is the share of queries whose class is among the min(5, k) best; classes without a vote
    have no place.

    Source:
        DINO, `eval_knn.py`.

    Args:
        ks: Numbers of neighbours; one that exceeds the bank is clipped to it, with a warning.
        temperature: Divides the similarities in the weights, above 0.
        num_classes: Classes K, or None for as many as the labels need.
        dtype: `float32`, or `bfloat16` for a faster search.
        backend: `torch`, or `faiss` for faiss's flat index.
        prefix: Prefix of the reported names.

    Raises:
        ConfigError: A value is out of range.

    Differs from official:
        One search serves all k. Any number of test images, classes and neighbours works. There
        classes without a vote fill up the five best in whatever order sorting leaves them.
    """

    default_prefix = "knn"

    def __init__(
        self,
        ks: Sequence[int] = (10, 20, 100, 200),
        temperature: float = 0.07,
        num_classes: int | None = None,
        dtype: str = "float32",
        backend: str = "torch",
        prefix: str | None = None,
    ) -> None:
        super().__init__(prefix=prefix)
        if not ks or min(ks) < 1:
            raise ConfigError(f"ks={tuple(ks)}: expected numbers of neighbours from 1")
        if temperature <= 0:
            raise ConfigError(f"temperature={temperature}: expected a number above 0")
        if dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype={dtype!r}: expected 'float32' or 'bfloat16'")
        if backend not in BACKENDS:
            raise ConfigError(f"backend={backend!r} is unknown; use one of {BACKENDS}")
        self.ks = sorted(set(ks))
        self.temperature = temperature
        self.num_classes = num_classes
        self.dtype = getattr(torch, dtype)
        self.backend = backend

    def measure(self, sets: dict[str, FeatureSet]) -> dict[str, Any]:
        """Classify the test set by its neighbours in the bank.

        Args:
            sets: `test` and `bank`, with labels.

        Raises:
            DataError: A set has no labels.
        """
        test, bank = self.need(sets, "test"), self.need(sets, "bank")
        if test.labels is None or bank.labels is None:
            raise DataError("k-NN needs labelled images in test_dataloader and bank_dataloader")
        rank, world = get_dist_info()
        queries = test.tensor()[rank::world].float()
        targets = test.labels[rank::world].to(queries.device)
        counts = self.count(queries, targets, bank.features, bank.labels)
        all_reduce(counts)
        shares = (100.0 * counts / len(test)).tolist()
        return {
            f"k{k}_{name}": share
            for k, row in zip(self.ks, shares, strict=True)
            for name, share in zip(("top1", "top5"), row, strict=True)
        }

    def count(
        self, queries: Tensor, targets: Tensor, bank: Tensor | np.ndarray, labels: Tensor
    ) -> Tensor:
        """Count the queries that are right at top-1 and top-5 for every k.

        Args:
            queries: Features to classify.
            targets: Their classes.
            bank: Features to search in.
            labels: Classes of the bank.

        Shape:
            queries [Q, D]; targets [Q]; bank [N, D]; labels [N]; returns float64 [len(ks), 2].

        Raises:
            ConfigError: There are more classes than `num_classes`.
        """
        if self.ks[-1] > len(bank):
            print_log(
                f"k={[k for k in self.ks if k > len(bank)]} is more than the {len(bank)} images "
                f"of the bank; {len(bank)} neighbours are used",
                logger="current",
                level=logging.WARNING,
            )
        ks = [min(k, len(bank)) for k in self.ks]
        counts = torch.zeros(len(ks), 2, dtype=torch.float64)
        if not len(queries):  # More processes than images.
            return counts
        needed = 1 + int(max(labels.max(), targets.max()))
        classes = self.num_classes or needed
        if classes < needed:
            raise ConfigError(
                f"num_classes={classes} of the k-NN metric, but there is a label {needed - 1}; set it to "
                f"{needed} or more, or to None"
            )
        similarity, index = nearest_neighbours(
            queries, bank, ks[-1], self.dtype, self.backend, cosine=True
        )
        neighbours = labels.to(index.device)[index]
        # Relative to the nearest neighbour, in float64: no temperature is too low for the weights.
        similarity = similarity.double()
        similarity = similarity - similarity[:, :1]
        for first in range(0, len(index), CHUNK):
            part = slice(first, first + CHUNK)
            votes = knn_votes(similarity[part], neighbours[part], ks, classes, self.temperature)
            for number, (k, vote) in enumerate(zip(ks, votes, strict=True)):
                place = class_ranks(vote, targets[part].to(vote.device))
                counts[number, 0] += (place < 1).sum().item()
                counts[number, 1] += (place < min(5, k)).sum().item()
        return counts
