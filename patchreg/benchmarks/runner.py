"""Cost of the engine per iteration, beside MMEngine's own Runner and a bare loop."""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from patchreg.benchmarks import figure
from patchreg.datasets.keyed import KeyedDataset
from patchreg.datasets.samplers import DefaultSampler
from patchreg.runner.build import EngineRunner

ITERATIONS = 300
ROUNDS = 7


class _Batches:
    """Ready batches in memory: one sample is one batch."""

    metainfo = dict(classes=("a", "b"))

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(8, 32, 64, generator=generator)
        self.labels = torch.randint(0, 10, (8, 32), generator=generator)

    def __len__(self) -> int:
        return ITERATIONS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return dict(inputs=self.inputs[int(index) % 8], labels=self.labels[int(index) % 8])


def _first(samples: list[Any]) -> Any:
    return samples[0]


class _Perceptron(BaseModel):
    """Three small layers: an iteration that costs next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
        )

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "loss") -> dict[str, Tensor]:
        return dict(loss_cls=nn.functional.cross_entropy(self.layers(inputs), labels))


def _runner(kind: type[Runner], folder: str, name: str) -> Runner:
    torch.manual_seed(0)
    model = _Perceptron()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    dataset: Any = _Batches()
    ours = kind is EngineRunner
    if ours:
        dataset = KeyedDataset(dataset, seed=0)
        sampler: Any = DefaultSampler(dataset, shuffle=True, seed=0)
    else:
        from mmengine.dataset import DefaultSampler as TheirSampler

        sampler = TheirSampler(dataset, shuffle=True, seed=0)
    return kind(
        model=model,
        work_dir=folder,
        train_dataloader=DataLoader(dataset, batch_size=1, sampler=sampler, collate_fn=_first),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=OptimWrapper(optimizer),
        param_scheduler=dict(type="CosineAnnealingLR", T_max=ITERATIONS, by_epoch=False),
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=-1)),
        visualizer=dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")]),
        default_scope="patchreg" if ours else "mmengine",
        randomness=dict(seed=0),
        env_cfg=dict(),
        experiment_name=name,
        log_level="ERROR",
    )


def _clocked(runner: Runner) -> float:
    """CPU seconds per iteration of a run, without building it and without its last hooks."""
    marks: list[float] = []
    loop = runner.build_train_loop(runner._train_loop)
    runner._train_loop = loop
    run_epoch = loop.run_epoch

    def timed() -> None:
        marks.append(time.process_time())
        run_epoch()
        marks.append(time.process_time())

    loop.run_epoch = timed
    runner.train()
    return (marks[1] - marks[0]) / ITERATIONS


def _bare() -> float:
    """CPU seconds per iteration of a loop with nothing around it."""
    torch.manual_seed(0)
    model = _Perceptron()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ITERATIONS)

    def batches() -> Iterator[Any]:
        yield from DataLoader(_Batches(), batch_size=1, shuffle=True, collate_fn=_first)  # type: ignore[arg-type]

    start = time.process_time()
    for batch in batches():
        loss = model(**batch)["loss_cls"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return (time.process_time() - start) / ITERATIONS


def run(device: str) -> list[dict[str, Any]]:
    """Measure the time per iteration of three loops in turn.

    Args:
        device: `cpu`; the overhead of the loops is on the host anyway.
    """
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    times: dict[str, list[float]] = {"engine": [], "mmengine": [], "bare": []}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for number in range(ROUNDS + 1):
                found = {
                    "engine": _clocked(
                        _runner(EngineRunner, str(Path(folder, "a")), f"engine{number}")
                    ),
                    "mmengine": _clocked(
                        _runner(Runner, str(Path(folder, "b")), f"mmengine{number}")
                    ),
                    "bare": _bare(),
                }
                if number:
                    for key, value in found.items():
                        times[key].append(value)
    finally:
        logging.disable(logging.NOTSET)
        DefaultScope._instance_dict.clear()

    def ratio(other: str) -> float:
        return statistics.median(a / b for a, b in zip(times["engine"], times[other]))

    middle = {key: 1e3 * statistics.median(values) for key, values in times.items()}
    return [
        figure(
            "iteration, engine against MMEngine's Runner (CPU time)",
            middle["engine"],
            "ms",
            middle["mmengine"],
            ratio("mmengine"),
            goal=1.05,
        ),
        figure(
            "iteration, engine against a bare loop (CPU time)",
            middle["engine"],
            "ms",
            middle["bare"],
            ratio("bare"),
        ),
    ]
