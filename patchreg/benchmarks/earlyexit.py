"""Early exit for real, against running all stages: how much of the saved computation is saved time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from patchreg.benchmarks import figure
from patchreg.methods.anchornet.ensemble import AnchorNetEnsembleClassifier
from patchreg.methods.anchornet.queue import EarlyExitQueue
from patchreg.registry import MODELS

SHARES = (0.45, 0.20, 0.12, 0.10, 0.13)
"""Images that stop after the shrunk image, after one window, two, three, four."""

CPU = dict(images=512, batch=16, rounds=3)
CUDA = dict(images=8192, batch=128, rounds=3)


def ensemble(batch: int) -> AnchorNetEnsembleClassifier:
    """Return the published localiser with two ResNet-50, random weights.

    Args:
        batch: Images or windows per call of a network.
    """
    net = dict(type="TorchvisionBackbone", model_name="resnet50", num_classes=1000)
    config = dict(
        type="AnchorNetEnsembleClassifier",
        anchor=dict(
            type="AnchorNetClassifier",
            backbone=dict(type="AnchorNetBackbone"),
            head=dict(type="AnchorNetCAMHead", num_classes=1000),
            selector=dict(type="CAMPatchSelector", num_patches=4, iou_limits=0.3),
        ),
        resized=dict(type="AnchorNetResizedClassifier", backbone=net),
        patch=dict(type="AnchorNetViewClassifier", backbone=net),
        batch_size=batch,
    )
    return MODELS.build(config).eval().to(memory_format=torch.channels_last)


def plan(images: int) -> list[int]:
    """Return the stage at which each image stops, in the given shares and a fixed shuffled order.

    Args:
        images: How many.
    """
    stages: list[int] = []
    for stage, share in enumerate(SHARES):
        stages += [stage] * round(share * images)
    stages = (stages + [len(SHARES) - 1] * images)[:images]
    order = torch.randperm(images, generator=torch.Generator().manual_seed(0)).tolist()
    return [stages[place] for place in order]


def run(device: str) -> list[dict[str, Any]]:
    """Time early exit, all stages on everything, and each network alone, in turn.

    The ideal follows from the times of the single networks on full batches: what all stages cost divided
    by what the images need.

    Args:
        device: `cpu` or `cuda`.
    """
    size = CPU if device == "cpu" else CUDA
    if device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ensemble(size["batch"]).to(device)
    images = torch.randn(size["images"], 3, 224, 224, device=device)
    batches = images.split(size["batch"])
    stops = plan(len(images))

    def early(indices: Sequence[int], stages: Sequence[int], _: Sequence[float]) -> list[bool]:
        return [stage >= stops[index] for index, stage in zip(indices, stages)]

    def never(indices: Sequence[int], _: Sequence[int], __: Sequence[float]) -> list[bool]:
        return [False] * len(indices)

    thresholds = [0.0] * len(SHARES)
    on_gpu = device == "cuda"
    queues = [EarlyExitQueue(model, thresholds, rule, graphs=on_gpu) for rule in (early, never)]
    found = model.anchor.localise(batches[0])
    rows = torch.arange(size["batch"], device=device)

    def clock() -> float:
        if on_gpu:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def timed(call: Any, repeats: int = 1) -> float:
        start = clock()
        for _ in range(repeats):
            call()
        return (clock() - start) / repeats

    networks = [
        lambda: model.first_logits(batches[0]),
        lambda: model.anchor.localise(batches[0]),
        lambda: model.window_logits(images, rows, found.cells[:, 0], found),
    ]
    if on_gpu:
        networks = [_captured(call) for call in networks]
    stage = torch.tensor(stops)
    gains, ideals = [], []
    with torch.inference_mode():
        for number in range(size["rounds"] + 1):
            alone = [timed(call, 4 if on_gpu else 2) / size["batch"] for call in networks]
            spent = [timed(partial(_drain, queue, batches, stops)) for queue in queues]
            if number == 0:
                continue
            first, find, look = alone
            whole = first + find + (len(SHARES) - 1) * look
            needed = first + (stage > 0).double().mean() * find + stage.double().mean() * look
            gains.append(spent[1] / spent[0])
            ideals.append(float(whole / needed))
    gain, ideal = statistics.median(gains), statistics.median(ideals)
    share = statistics.median(one / other for one, other in zip(gains, ideals))
    return [
        figure(
            f"early exit of {len(images)} images, ResNet-50 at 95 px, five stages: speed-up over all stages, "
            "ideal",
            gain,
            "x",
            baseline=ideal,
            ratio=share,
            goal=0.95 if not on_gpu else 0.85,
            at_most=False,
        ),
        figure("images/s with early exit", len(images) / spent[0], "images/s"),
        figure("images/s, all stages", len(images) / spent[1], "images/s"),
    ]


def _captured(call: Any) -> Any:
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    return graph.replay


def _drain(queue: EarlyExitQueue, batches: Sequence[Tensor], stops: list[int]) -> None:
    found = list(queue.run(batches))
    if len(found) != len(stops):
        raise AssertionError(f"{len(found)} of {len(stops)} images came out")
    if queue.decide.__name__ == "early" and any(one.stage != stops[one.index] for one in found):
        raise AssertionError("an image stopped at another stage than planned")
