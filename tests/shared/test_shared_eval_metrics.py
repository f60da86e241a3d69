"""Neighbour search, retrieval, copy detection and DAVIS measures against plain computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import patchreg.metrics.knn as knn
from patchreg.metrics.copy_detection import CopyDetectionMetric, Whitening
from patchreg.metrics.davis import (
    DavisMetric,
    boundary,
    contour_accuracy,
    dilate,
    region_similarity,
    split_objects,
    statistics,
)
from patchreg.metrics.features import FeatureSet
from patchreg.metrics.knn import NO_PLACE, KNNMetric, class_ranks, knn_votes, nearest_neighbours
from patchreg.metrics.retrieval import (
    RetrievalMetric,
    average_precision,
    precision_at,
    ranks_of,
    relation_matrix,
)
from patchreg.runner.propagation import enlarge, first_map, propagate
from patchreg.utils.errors import ConfigError, DataError


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that every branch of the search is taken."""
    for name, size in (("TILE", 16), ("CHUNK", 5), ("SLAB", 100)):
        monkeypatch.setattr(knn, name, size)


@pytest.mark.parametrize(("entries", "queries", "k"), [(1000, 23, 40), (17, 6, 17), (333, 1, 1)])
@pytest.mark.parametrize("order", ["random", "rising", "falling"])
def test_search_equals_a_sort(
    entries: int, queries: int, k: int, order: str, small_tiles: None
) -> None:
    generator = torch.Generator().manual_seed(entries + k)
    query = torch.randn(queries, 8, generator=generator).double()
    bank = torch.randn(entries, 8, generator=generator).double()
    if order != "random":
        # The best come last, or first: every tile, or none, enters.
        bank = bank[(query[0] @ bank.T).argsort(descending=order == "falling")]
    expected = (query @ bank.T).sort(dim=1, descending=True)
    values, indices = nearest_neighbours(query, bank, k)
    assert torch.equal(indices, expected.indices[:, :k])
    assert torch.allclose(values, expected.values[:, :k], rtol=0, atol=1e-12)
    values, indices = nearest_neighbours(query, bank, k, cosine=True)
    cosine = torch.nn.functional.cosine_similarity(query[:, None], bank[None], dim=2)
    assert torch.allclose(values, cosine.sort(dim=1, descending=True).values[:, :k], atol=1e-12)


def test_search_in_bfloat16_finds_nearly_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    query, bank = (torch.randn(n, 64, generator=generator) for n in (20, 9000))
    exact = nearest_neighbours(query, bank, 50, cosine=True)
    rough = nearest_neighbours(query, bank, 50, torch.bfloat16, cosine=True)
    assert rough[0].dtype is torch.bfloat16
    assert torch.allclose(rough[0].float(), exact[0], atol=0.01)
    shared = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(exact[1], rough[1])]
    assert min(shared) >= 45


def test_search_refuses_what_does_not_fit() -> None:
    bank = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="k=5: expected 1 to 4"):
        nearest_neighbours(torch.zeros(2, 3), bank, 5)
    with pytest.raises(ValueError, match="one feature width"):
        nearest_neighbours(torch.zeros(2, 2), bank, 1)
    with pytest.raises(ConfigError, match="backend='annoy' is unknown"):
        nearest_neighbours(torch.zeros(2, 3), bank, 1, backend="annoy")


def test_votes_weigh_by_similarity_and_add_up_over_k() -> None:
    similarity = torch.tensor([[0.9, 0.5, 0.4, 0.3]])
    labels = torch.tensor([[2, 0, 0, 0]])
    first, second = knn_votes(similarity, labels, (1, 4), 4, temperature=0.1)
    assert first.tolist() == [[0, 0, pytest.approx(math.exp(9), rel=1e-6), 0]]
    assert second[0, 0].item() == pytest.approx(math.exp(5) + math.exp(4) + math.exp(3), rel=1e-6)
    # Three neighbours outvote one in a plain count, but not by weight.
    assert second[0].argmax() == 2


def test_ranks_break_ties_by_class_and_leave_out_classes_without_votes() -> None:
    votes = torch.tensor([[2.0, 5.0, 2.0, 0.0]])
    found = [class_ranks(votes, torch.tensor([target])).item() for target in range(4)]
    assert found == [1, 0, 2, NO_PLACE]


def test_classes_without_a_vote_are_not_among_the_first_five_of_four() -> None:
    # Labels 0 and 1 in the bank; class 2 gets no vote, with however many classes.
    bank, labels = torch.eye(12), torch.arange(12) % 2
    sets = dict(test=FeatureSet(bank[:3], torch.tensor([0, 1, 2])), bank=FeatureSet(bank, labels))
    for classes in (3, 4, 5, None):
        found = KNNMetric(ks=(10,), num_classes=classes).report(sets)
        assert found["knn/k10_top5"] == pytest.approx(200 / 3)
    with pytest.raises(
        ConfigError, match="num_classes=2 of the k-NN metric, but there is a label 2"
    ):
        KNNMetric(ks=(10,), num_classes=2).report(sets)
    # Another process has all the images.
    empty = KNNMetric(ks=(10,)).count(bank[:0], labels[:0], bank, labels)
    assert empty.tolist() == [[0, 0]]


@pytest.mark.parametrize("temperature", [0.001, 0.007, 0.01, 0.011, 0.02])
@pytest.mark.parametrize("cosines", [(0.999, 0.99), (-0.8, -0.9)], ids=str)
def test_low_temperatures_neither_overflow_nor_vanish(temperature: float, cosines: tuple) -> None:
    angles = torch.tensor(cosines, dtype=torch.float64).acos()
    bank = torch.stack((angles.cos(), angles.sin()), dim=1).float()
    query = torch.tensor([[1.0, 0.0]])
    sets = dict(
        test=FeatureSet(query, torch.tensor([1])), bank=FeatureSet(bank, torch.tensor([1, 0]))
    )
    found = KNNMetric(ks=(2,), temperature=temperature).report(sets)
    assert found["knn/k2_top1"] == 100


def test_top5_counts_at_most_k_classes() -> None:
    bank = torch.eye(6)
    query = torch.tensor([[0.9, 0.8, 0.7, 0.1, 0.0, 0.0]])
    sets = dict(test=FeatureSet(query, torch.tensor([2])), bank=FeatureSet(bank, torch.arange(6)))
    found = KNNMetric(ks=(2, 3)).report(sets)
    assert found == {"knn/k2_top1": 0, "knn/k2_top5": 0, "knn/k3_top1": 0, "knn/k3_top5": 100}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(ks=()), "numbers of neighbours"),
        (dict(ks=(0, 5)), "numbers of neighbours"),
        (dict(temperature=0.0), "temperature=0.0"),
        (dict(dtype="float16"), "dtype='float16'"),
        (dict(backend="cuda"), "backend='cuda'"),
    ],
)
def test_knn_metric_refuses(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KNNMetric(**options)


def test_average_precision_by_hand() -> None:
    # Found at places 0 and 3 of two: (1 + 1) / 2 + (1/3 + 2/4) / 2, divided by 2.
    assert average_precision([0, 3], 2) == pytest.approx((1 + (1 / 3 + 0.5) / 2) / 2)
    assert average_precision([], 2) == 0
    assert average_precision([0], 4) == 0.25
    assert precision_at([0, 3], 1) == 1
    assert precision_at([0, 3], 10) == 0.5, "no more places than up to the last positive"
    assert precision_at([2, 3], 3) == pytest.approx(1 / 3)


def test_ignored_images_are_taken_out_of_the_list() -> None:
    order = torch.tensor([4, 1, 0, 3, 2])
    positive = torch.tensor([True, False, True, False, False])
    ignored = torch.tensor([False, True, False, False, True])
    assert ranks_of(order, positive, ignored) == [0, 2]
    assert ranks_of(order, positive, ~positive) == [0, 1]


def test_retrieval_by_label_and_distractors() -> None:
    bank = FeatureSet(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
    test = FeatureSet(torch.tensor([[0.6, 0.5]]), torch.tensor([1]))
    found = RetrievalMetric(ks=(1, 2)).report(dict(test=test, bank=bank))
    assert found == {"retrieval/mAP": 25.0, "retrieval/mP@1": 0.0, "retrieval/mP@2": 50.0}
    near = FeatureSet(torch.tensor([[0.6, 0.5]]))
    found = RetrievalMetric(ks=(3,)).report(dict(test=test, bank=bank, distractor=near))
    # Third of three places: (0/2 + 1/3) / 2.
    assert found["retrieval/mAP"] == pytest.approx(100 / 6)
    with pytest.raises(DataError, match="ground truth of the queries, or labels"):
        RetrievalMetric().report(dict(test=near, bank=bank))


def test_ground_truth_has_to_fit_the_database() -> None:
    truth = [dict(easy=[0], hard=[], junk=[2])]
    assert relation_matrix(truth, 3).tolist() == [[1, 0, 3]]
    with pytest.raises(DataError, match="names image 2, but the database has 2"):
        relation_matrix(truth, 2)


def test_whitening_gives_unit_variance_about_the_mean_when_centred() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(500, 4, generator=generator) @ torch.randn(4, 4, generator=generator) + 3
    white = Whitening(features, centered=True)(features)
    assert torch.allclose(white.T @ white / 500, torch.eye(4), atol=1e-4)
    # The published way takes second moments about zero, so the variance is not one.
    published = Whitening(features)(features)
    assert not torch.allclose(published.T @ published / 500, torch.eye(4), atol=0.1)
    plain = Whitening(features, subtract_mean=False)(features)
    assert torch.allclose(plain.T @ plain / 500, torch.eye(4), atol=1e-4)
    with pytest.raises(ConfigError, match="expected 1 to 4"):
        Whitening(features, dims=5)


def test_originals_missing_among_the_first_add_nothing() -> None:
    database = torch.eye(4)
    queries = torch.tensor([[0.1, 0.9, 0.2, 0.0], [0.9, 0.1, 0.2, 0.3]])
    sets = dict(
        test=FeatureSet(
            queries, torch.tensor([1, 1]), dict(block_names=["a", "b"], block_of=[0, 1])
        ),
        bank=FeatureSet(database[:2], torch.arange(2)),
        distractor=FeatureSet(database[2:]),
    )
    found = CopyDetectionMetric(top=2, recall=True).report(sets)
    assert found == {
        "copies/mAP": 50.0,
        "copies/R@1": 50.0,
        "copies/a_mAP": 100.0,
        "copies/b_mAP": 0.0,
    }


def test_masks_by_hand() -> None:
    mask = torch.zeros(1, 5, 5, dtype=torch.bool)
    mask[0, 1:3, 1:3] = True
    edge = boundary(mask)[0].int().tolist()
    assert edge == [[1, 1, 1, 0, 0], [1, 0, 1, 0, 0], [1, 1, 1, 0, 0], [0] * 5, [0] * 5]
    whole = torch.ones(1, 5, 5, dtype=torch.bool)
    assert not boundary(whole).any(), "the border of the image is no boundary"
    point = torch.zeros(1, 7, 7, dtype=torch.bool)
    point[0, 3, 3] = True
    grown = dilate(point, 2)[0]
    assert grown.sum() == 13
    assert not grown[1, 1]
    empty = torch.zeros_like(mask)
    assert region_similarity(
        torch.cat((mask, empty, mask)), torch.cat((mask, empty, empty))
    ).tolist() == [1, 1, 0]
    pairs = (torch.cat((mask, empty, mask, empty)), torch.cat((mask, empty, empty, mask)))
    assert contour_accuracy(*pairs).tolist() == [1, 1, 0, 0]


def test_statistics_of_frames() -> None:
    mean, recall, decay = statistics(torch.tensor([1.0, 0.8, 0.5, 0.2], dtype=torch.float64))
    assert mean == pytest.approx(0.625)
    assert recall == 0.5
    # Edges of the quarters are 0, 1, 2, 2, 3: first 0 to 1, last 2 to 3.
    assert decay == pytest.approx(0.9 - 0.35)


def test_objects_that_cannot_be_scored() -> None:
    truth = torch.zeros(3, 2, 2, dtype=torch.uint8)
    with pytest.raises(DataError, match="sequence 'bear': the first frame's mask holds no object"):
        split_objects(truth, truth, "bear")
    truth[:, 0, 0] = 1
    with pytest.raises(DataError, match="object 2 is predicted, but there are only 1"):
        split_objects(truth, truth * 2, "bear")
    later = truth.clone()
    later[2, 1, 1] = 2
    with pytest.raises(DataError, match="later masks hold object 2"):
        split_objects(later, truth, "bear")
    with pytest.raises(DataError, match="has 2 frames"):
        DavisMetric().process(None, [dict(name="bear", truth=truth[:2], predicted=truth[:2])])


def test_davis_scores_objects_and_drops_first_and_last_frame() -> None:
    truth = torch.zeros(4, 8, 8, dtype=torch.uint8)
    truth[:, :4, :4], truth[:, 5:, 5:] = 1, 2
    predicted = truth.clone()
    predicted[0], predicted[3] = 0, 0
    predicted[1][truth[1] == 2] = 0
    metric = DavisMetric()
    metric.process(None, [dict(name="bear", truth=truth, predicted=predicted)])
    found = metric.evaluate(1)
    # Object 1 is perfect in both frames that count, object 2 in one of them.
    assert found["davis/J_mean"] == pytest.approx(75)
    assert found["davis/F_mean"] == pytest.approx(75)
    assert found["davis/J&F"] == pytest.approx(75)
    assert found["davis/J_recall"] == pytest.approx(75)


def test_propagation_copies_the_mask_of_equal_cells_near_by() -> None:
    features = torch.eye(16)
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:4, :4] = 1
    maps = first_map(mask, (4, 4))
    assert maps.shape == (2, 4, 4)
    assert maps[1].sum() == 4
    moved = features.view(4, 4, 16).roll(1, dims=1).reshape(16, 16)
    soft = propagate(moved, features[None], maps[None], radius=1, topk=1)
    expected = maps.roll(1, dims=2)
    # Column 0 came from the other side, out of reach: any cell near by is as good as the other.
    assert torch.equal(soft[:, :, 1:], expected[:, :, 1:])
    everywhere = propagate(moved, features[None], maps[None], radius=0, topk=1)
    assert torch.equal(everywhere, expected)


@pytest.mark.parametrize("radius", [0, 1])
def test_propagation_at_low_temperatures_is_that_of_float64(radius: int) -> None:
    features, maps = torch.randn(2, 16, 5), torch.rand(1, 2, 4, 4)
    arguments = (features[0], features[1:], maps, radius, 5)
    for temperature in (0.1, 0.01, 0.002):
        found = propagate(*arguments, temperature)
        exact = propagate(*(value.double() for value in arguments[:3]), radius, 5, temperature)
        assert (found - exact).abs().max() < 1e-3
    nearest = propagate(*arguments[:4], 1, 0.1)
    assert torch.allclose(propagate(*arguments, 1e-6), nearest)


def test_enlarged_masks_span_zero_to_one() -> None:
    soft = torch.zeros(3, 2, 2)
    soft[1] = torch.tensor([[0.2, 0.4], [0.2, 0.4]])
    soft[2] = 0.3
    large = enlarge(soft, 4)
    assert large.shape == (3, 8, 8)
    assert large[0].max() == 0
    # An object that fills the frame stays ahead of the background that is nowhere.
    assert large[2].min().item() == pytest.approx(0.3)
    assert large[1].min().item() == 0
    assert large[1].max().item() == pytest.approx(1)
