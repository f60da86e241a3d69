"""Early exit of a whole data set with full batches: stages of different images share a batch.

Letters: B images or windows per batch, H x W image, K windows per image, C classes, S slots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchreg.methods.anchornet.ensemble import AnchorNetEnsembleClassifier
from patchreg.methods.anchornet.table import check_thresholds
from patchreg.utils.errors import DataError

Decide = Callable[[Sequence[int], Sequence[int], Sequence[float]], Sequence[bool]]
"""From image numbers, stages and confidences to which images stop."""


@dataclass
class Exit:
    """How an image was classified.

    Args:
        index: Number of the image, in the order in which images came.
        stage: Stage at which it stopped; 0 is the shrunk image.
        label: Predicted class.
        confidence: Largest softmax probability of the summed logits.
        cells: Windows looked at, in order.
    """

    index: int
    stage: int
    label: int
    confidence: float
    cells: list[int]


@dataclass
class _Item:
    """An image on its way: its place in the pool, how far it is, and its windows once known."""

    index: int
    slot: int
    stage: int = 0
    windows: list[int] | None = None


class _Job:
    """Outputs of a batch on their way to the host."""

    def __init__(
        self,
        kind: str,
        items: list[_Item],
        outputs: tuple[Tensor, ...],
        images: Tensor | None = None,
    ) -> None:
        self.kind, self.items, self.images = kind, items, images
        self.event: Any = None
        if outputs[0].is_cuda:
            outputs = tuple(
                torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(
                    value, non_blocking=True
                )
                for value in outputs
            )
            self.event = torch.cuda.Event()
            self.event.record()
        self.outputs = outputs

    def wait(self) -> list[list[Any]]:
        """Return the outputs of the rows that are meant."""
        if self.event is not None:
            self.event.synchronize()
        return [value[: len(self.items)].tolist() for value in self.outputs]


class EarlyExitQueue:
    """Classify many images, running each network on full batches of one size only.

    Images that are not sure wait in a pool. Whenever enough windows wait, of whatever stage and image,
    they are classified together; else enough images are localised together; else new images are looked
    at. Only the end of the data pads batches. Batches have one shape per network, so the networks can be
    compiled or captured, and an image gets the same logits, to the last bit, as in a confidence table
    made with the same batch size. On a GPU the host reads the decisions of a batch while the next one
    runs.

    Source:
        Own; the official code only simulates early exit on a table.

    Args:
        model: The three networks; its `batch_size` is used.
        thresholds: One per stage used, in [0, 1]; the last one stops always.
        decide: Replaces the comparison with the thresholds, for tests and benchmarks.
        graphs: On a GPU, capture the three networks as CUDA graphs.

    Raises:
        ConfigError: The thresholds do not fit.
    """

    def __init__(
        self,
        model: AnchorNetEnsembleClassifier,
        thresholds: Sequence[float],
        decide: Decide | None = None,
        graphs: bool = False,
    ) -> None:
        check_thresholds(thresholds, model.stages)
        self.model = model
        # Compared as a table does, in float32.
        self.thresholds = torch.tensor(list(thresholds), dtype=torch.float32).tolist()
        self.decide = decide or self._by_threshold
        self.size = model.batch_size
        self.graphs = graphs
        self.batches = {"first": 0, "find": 0, "look": 0}
        self._captured: dict[str, Any] = {}

    def _by_threshold(
        self, indices: Sequence[int], stages: Sequence[int], confidences: Sequence[float]
    ) -> list[bool]:
        limits = [self.thresholds[stage] for stage in stages]
        return [value > limit for value, limit in zip(confidences, limits)]

    @torch.inference_mode()
    def run(self, batches: Iterable[Tensor]) -> Iterator[Exit]:
        """Classify images; they come out in the order in which they are decided.

        Args:
            batches: Preprocessed images of one size, in batches of any length.

        Shape:
            batches [n, 3, H, W] each.

        Raises:
            DataError: The images differ in size.
        """
        self.batches = dict.fromkeys(self.batches, 0)
        last = len(self.thresholds) - 1
        new = _chunks(batches, self.size)
        unlocated: deque[_Item] = deque()
        waiting: deque[_Item] = deque()
        running: deque[_Job] = deque()
        depth = 0
        count, more = 0, True
        while more or unlocated or waiting or running:
            job: _Job | None = None
            if len(waiting) >= self.size:
                job = self._look(waiting)
            elif len(unlocated) >= self.size:
                job = self._find(unlocated)
            elif more:
                images = next(new, None)
                if images is None:
                    more = False
                else:
                    if count == 0:
                        depth = self._prepare(images)
                    job = self._first(images, count)
                    count += len(images)
            elif not running:
                # The end of the data: what is left has to do with padded batches.
                job = self._find(unlocated) if unlocated else self._look(waiting)
            if job is not None:
                running.append(job)
            while running and (len(running) > depth or job is None):
                yield from self._read(running.popleft(), last, unlocated, waiting)

    def _prepare(self, images: Tensor) -> int:
        """Make the pool for images of this size; return how many batches may be under way."""
        # Fewer than a batch wait for each network, one batch runs, and one is new.
        depth = int(images.is_cuda)
        self._captured = {}
        slots = self.size * (3 + depth)
        self.pool = images.new_zeros((slots + 1, *images.shape[1:]))
        classes = self.model.first_logits(images[:1]).shape[1]
        self.sums = images.new_zeros((slots + 1, classes))
        self.free = deque(range(slots))
        self.spare = slots
        found = self.model.anchor.localise(images[:1])
        self.window = found
        return depth

    def _slots(self, items: list[_Item]) -> Tensor:
        """Return the slots of a batch on the device; padding points to the spare slot."""
        numbers = [item.slot for item in items] + [self.spare] * (self.size - len(items))
        return self._to_device(numbers)

    def _to_device(self, numbers: list[int]) -> Tensor:
        tensor = torch.tensor(numbers)
        if self.pool.is_cuda:
            return tensor.pin_memory().to(self.pool.device, non_blocking=True)
        return tensor.to(self.pool.device)

    def _first(self, images: Tensor, count: int) -> _Job:
        meant = len(images)
        if images.shape[1:] != self.pool.shape[1:]:
            raise DataError(
                f"images of {tuple(images.shape[1:])} come after {tuple(self.pool.shape[1:])}; bring all to "
                "one size"
            )
        if len(images) < self.size:
            tail = images[-1:].expand(self.size - len(images), *images.shape[1:])
            images = torch.cat((images, tail))
        items = [_Item(count + number, self.free.popleft()) for number in range(meant)]
        slots = self._slots(items)
        self.batches["first"] += 1
        logits = self._call("first", self.model.first_logits, images)
        self.sums[slots] = logits.to(self.sums.dtype)
        return _Job("first", items, logits.float().softmax(1).max(1), images)

    def _find(self, queue: deque[_Item]) -> _Job:
        items = [queue.popleft() for _ in range(min(self.size, len(queue)))]
        images = self.pool[self._slots(items)]
        self.batches["find"] += 1
        cells = self._call("find", lambda batch: self.model.anchor.localise(batch).cells, images)
        return _Job("find", items, (cells.clone(),))

    def _look(self, queue: deque[_Item]) -> _Job:
        items = [queue.popleft() for _ in range(min(self.size, len(queue)))]
        slots = self._slots(items)
        cells = [item.windows[item.stage] for item in items if item.windows is not None]
        crops = self._to_device(cells + [0] * (self.size - len(items)))
        self.batches["look"] += 1
        jobs = torch.stack((slots, crops), dim=1)
        logits = self._call("look", self._windows, jobs)
        sums = self.sums[slots] + logits
        self.sums[slots] = sums
        for item in items:
            item.stage += 1
        return _Job("look", items, sums.float().softmax(1).max(1))

    def _windows(self, jobs: Tensor) -> Tensor:
        return self.model.window_logits(self.pool, jobs[:, 0], jobs[:, 1], self.window)

    def _call(self, name: str, network: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        """Run a network, or replay it from its graph."""
        if not (self.graphs and batch.is_cuda):
            return network(batch)
        if name not in self._captured:
            static = batch.clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    network(static)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = network(static)
            self._captured[name] = (graph, static, out)
        graph, static, out = self._captured[name]
        static.copy_(batch)
        graph.replay()
        return out

    def _read(
        self, job: _Job, last: int, unlocated: deque[_Item], waiting: deque[_Item]
    ) -> Iterator[Exit]:
        """Take in what a batch found: images leave, or wait for their next window."""
        if job.kind == "find":
            for item, cells in zip(job.items, job.wait()[0]):
                item.windows = [cell for cell in cells if cell >= 0]
                waiting.append(item)
            return
        confidences, labels = job.wait()
        stages = [item.stage for item in job.items]
        sure = self.decide([item.index for item in job.items], stages, confidences)
        stay: list[tuple[int, int]] = []
        for row, (item, stop, confidence, label) in enumerate(
            zip(job.items, sure, confidences, labels)
        ):
            seen = [] if item.windows is None else item.windows
            short = item.windows is not None and item.stage == len(seen)
            if stop or short or item.stage == last:
                self.free.append(item.slot)
                yield Exit(item.index, item.stage, label, confidence, seen[: item.stage])
            elif item.windows is None:
                unlocated.append(item)
                stay.append((row, item.slot))
            else:
                waiting.append(item)
        if stay and job.images is not None:
            # Only images that are looked at again are kept.
            rows, slots = self._to_device([row for row, _ in stay]), [slot for _, slot in stay]
            self.pool[self._to_device(slots)] = job.images[rows]


def _chunks(batches: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Cut batches of any length into batches of one length, but for the last."""
    kept: list[Tensor] = []
    for batch in batches:
        if kept and kept[0].shape[1:] != batch.shape[1:]:
            raise DataError(
                f"images of {tuple(batch.shape[1:])} come after {tuple(kept[0].shape[1:])}; bring all to "
                "one size"
            )
        if not len(batch):
            continue
        kept.append(batch)
        if sum(map(len, kept)) < size:
            continue
        whole = torch.cat(kept) if len(kept) > 1 else kept[0]
        full = len(whole) // size * size
        yield from whole[:full].split(size)
        kept = [whole[full:]] if full < len(whole) else []
    if kept:
        yield torch.cat(kept)
