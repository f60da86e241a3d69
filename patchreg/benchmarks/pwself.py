"""Training step and loss memory of PW-Self beside a plain implementation, pair of views by pair of views.

The plain one does what the formula says, as published code of this family does it: the head works on all
tokens of all views, log-probabilities are computed anew for each of the 18 pairs of views, matched rows are
copied out of both sides, and clipping, optimiser and moving average are loops over the parameters.
"""

from __future__ import annotations

import importlib
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import init_default_scope
from torch import Tensor

from patchreg.benchmarks import figure, interleave
from patchreg.registry import LOSSES, MODELS, discover
from patchreg.runner.optim import clip_each_gradient
from patchreg.structures import ViewGeometry
from patchreg.transforms.multi_view import MultiView

VIEWS = [
    dict(num=2, size=224, scale=(0.4, 1.0), blur=0.5),
    dict(num=8, size=96, scale=(0.05, 0.4), blur=0.5),
]
PATCH = 16
PROTOTYPES = 65_536
# (images, type, rounds) of the step; images of the memory figure
STEP = {"cpu": (1, torch.bfloat16, 5), "cuda": (32, torch.bfloat16, 9)}
MEMORY = {"cpu": 2, "cuda": 16}


def geometry_of(images: int) -> ViewGeometry:
    """Draw the views of some images, each on its own.

    Args:
        images: How many.
    """
    random.seed(0)
    torch.manual_seed(0)
    kinds = MultiView(VIEWS).kinds
    drawn = [[kind.draw(256, 256) for kind in kinds] for _ in range(images)]
    return ViewGeometry(
        torch.tensor([[draw[0] for draw in views] for views in drawn]),
        torch.tensor([[draw[1] for draw in views] for views in drawn]),
        tuple((kind.size, kind.size) for kind in kinds),
    )


class PlainLoss:
    """The loss of PW-Self as its formula reads, for logits that are stored whole.

    Args:
        center: Center per token and prototype.
        match: `match_pair` of the method: matched tokens of two views, image by image.
        geometry: Boxes and flips.

    Shape:
        center [1, T, K].
    """

    def __init__(self, center: Tensor, match: Callable[..., Any], geometry: ViewGeometry) -> None:
        self.center = center
        self.images = len(geometry)
        self.pairs = []
        for u in range(2):
            for v in range(geometry.num_views):
                if u != v:
                    grids = tuple((geometry.sizes[n][0] // PATCH,) * 2 for n in (u, v))
                    found = match(geometry, (u, v), grids)
                    rows = [(a.to(center.device), b.to(center.device)) for a, b in found]
                    self.pairs.append((u, v, rows))

    def __call__(self, student: list[Tensor], teacher: Tensor) -> Tensor:
        """Return the loss and move the center.

        Args:
            student: Logits of the global and of the local views.
            teacher: Logits of the teacher's views.

        Shape:
            student [2 B, T, K] and [8 B, t, K]; teacher [2 B, T, K].
        """
        views = [*(student[0] / 0.1).chunk(2), *(student[1] / 0.1).chunk(8)]
        target = ((teacher - self.center) / 0.04).softmax(-1).detach().chunk(2)
        total = teacher.new_zeros((), dtype=torch.float32)
        for u, v, rows in self.pairs:
            for image, (first, second) in enumerate(rows):
                part = views[v][image, second].float().log_softmax(-1)
                total = total - (target[u][image, first] * part).sum(-1).mean() / self.images
        self.center.lerp_(teacher.float().mean(0, keepdim=True), 0.1)
        return total / len(self.pairs)


def plain_step(model: Any, loss: PlainLoss, optimizer: Any, views: list[Tensor]) -> None:
    """Make one training step without any of the savings.

    Args:
        model: The model; only its parts are used.
        loss: The plain loss.
        optimizer: AdamW that loops over the parameters.
        views: Normalised views.
    """
    with torch.autocast(views[0].device.type, torch.bfloat16):
        with torch.no_grad():
            branch = model.teacher
            teacher = branch.head(branch.backbone(torch.cat(views[:2])).tokens)
        student = [
            model.student.head(model.student.backbone(torch.cat(group)).tokens)
            for group in (views[:2], views[2:])
        ]
        value = loss(student, teacher)
    optimizer.zero_grad()
    value.backward()
    for parameter in model.student.parameters():
        if parameter.grad is not None:
            scale = 3.0 / (parameter.grad.norm(2).item() + 1e-6)
            if scale < 1:
                parameter.grad.mul_(scale)
    optimizer.step()
    with torch.no_grad():
        for own, other in zip(model.teacher.parameters(), model.student.parameters()):
            own.mul_(0.996).add_(other, alpha=0.004)


def own_step(model: Any, geometry: ViewGeometry, optimizer: Any, views: list[Tensor]) -> None:
    """Make one training step of this project.

    Args:
        model: The model.
        geometry: Boxes and flips of the views.
        optimizer: Fused AdamW.
        views: Normalised views.
    """
    with torch.autocast(views[0].device.type, torch.bfloat16):
        value = model(views, mode="loss", geometry=geometry)["loss_pwself"]
    optimizer.zero_grad()
    value.backward()
    clip_each_gradient([item for item in model.student.parameters() if item.grad is not None], 3.0)
    optimizer.step()
    model.update_teacher(0.996)


def build(device: str) -> Any:
    """Build ViT-S/16 with student and teacher.

    Args:
        device: `cpu` or `cuda`.
    """
    init_default_scope("patchreg")
    discover()
    torch.manual_seed(0)
    cfg = dict(
        type="PWSelfPretrainer",
        backbone=dict(
            type="VisionTransformerBackbone", arch="small", patch_size=PATCH, pos_resize="dino"
        ),
        head=dict(type="ProjectionHead", in_channels=384, out_dim=PROTOTYPES),
        loss=dict(type="PWSelfLoss"),
    )
    return MODELS.build(cfg).to(device).train()


def run(device: str) -> list[dict[str, Any]]:
    """Measure a training step, and the peak memory of loss and gradients by the student's logits or features.

    Args:
        device: `cpu` (one thread, CPU time) or `cuda` (wall clock).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_step_figure(device, *STEP[device]), _memory_figure(device, MEMORY[device])]
    finally:
        torch.set_num_threads(threads)


def _step_figure(device: str, images: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    geometry = geometry_of(images)
    views = [torch.randn(images, 3, *size, device=device) for size in geometry.sizes]
    # Both steps train the same weights in turn, which need not exist twice.
    model = build(device)
    loss = PlainLoss(torch.zeros_like(model.criterion.center), _matching(model)[1], geometry)

    def optimizer(**kwargs: Any) -> Any:
        trained = [value for value in model.student.parameters() if value.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.04, **kwargs)

    steps = optimizer(fused=True), optimizer(foreach=False)

    def wait(call: Callable[[], None]) -> Callable[[], None]:
        def done() -> None:
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        return done

    calls = [
        wait(lambda: own_step(model, geometry, steps[0], views)),
        wait(lambda: plain_step(model, loss, steps[1], views)),
    ]
    clock = time.process_time if device == "cpu" else time.perf_counter
    ours, theirs = interleave(calls, rounds, clock)
    kind = "CPU time" if device == "cpu" else "wall clock"
    return figure(
        f"images/s, step of ViT-S/{PATCH}, 2 x 224 + 8 x 96 px, {PROTOTYPES} outputs, {images} "
        f"images, bfloat16 ({kind})",
        images / statistics.median(ours),
        "images/s",
        images / statistics.median(theirs),
        statistics.median(b / a for a, b in zip(ours, theirs)),
        goal=1.3,
        at_most=False,
    )


def _memory_figure(device: str, images: int) -> dict[str, Any]:
    peaks = []
    for kind in ("own", "plain"):
        # A process of its own: the peak of a process cannot be set back.
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        worker = context.Process(target=_peak, args=(kind, device, images, queue))
        worker.start()
        peaks.append(queue.get())
        worker.join()
    own, plain = peaks
    return figure(
        f"peak memory of the loss, {PROTOTYPES} outputs, {images} images, float32",
        own / 2**20,
        "MiB",
        plain / 2**20,
        plain / own,
        goal=4.0,
        at_most=False,
    )


def _peak(kind: str, device: str, images: int, queue: Any) -> None:
    """Put the bytes that one loss with its gradients takes on top of its inputs into a queue."""
    torch.set_num_threads(1)
    init_default_scope("patchreg")
    discover()
    geometry = geometry_of(images)
    tokens = [1 + (size[0] // PATCH) ** 2 for size in geometry.sizes]
    criterion: Any = LOSSES.build(dict(type="PWSelfLoss", out_dim=PROTOTYPES, tokens=tokens[0]))
    criterion.to(device).train()
    match_batch, match_pair = _matching(criterion)
    generator = torch.Generator().manual_seed(1)

    def unit(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, 256, generator=generator)
        return torch.nn.functional.normalize(drawn, dim=-1).to(device)

    weight = unit(PROTOTYPES).requires_grad_()
    teacher = unit(2 * images, tokens[0])
    student = [unit(2 * images, tokens[0]), unit(8 * images, tokens[2])]
    for part in student:
        part.requires_grad_()

    def loss() -> Tensor:
        if kind == "plain":
            plain = PlainLoss(criterion.center, match_pair, geometry)
            logits = [part @ weight.t() for part in student]
            return plain(logits, (teacher @ weight.t()).detach())
        matches = match_batch(geometry, PATCH)
        flat = torch.cat([part.flatten(0, 1) for part in student])
        found = criterion(flat[matches.rows], weight, teacher, weight.detach(), matches)
        return found["loss_pwself"]

    # What libraries allocate once does not count.
    (torch.zeros(64, 64, device=device, requires_grad=True) @ unit(64)[:, :64]).sum().backward()
    start = _peak_bytes(device, reset=True)
    loss().backward()
    queue.put(max(_peak_bytes(device) - start, 1))


def _peak_bytes(device: str, reset: bool = False) -> int:
    """Return the peak so far; `reset` sets it back to what is in use first."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.max_memory_allocated())
    if reset:
        # A process inherits the peak of the one that started it.
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _matching(part: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the method's matching, found from one of its parts: benchmarks know registries only."""
    package = type(part).__module__.rpartition(".")[0]
    module = importlib.import_module(f"{package}.matching")
    return module.match_batch, module.match_pair
