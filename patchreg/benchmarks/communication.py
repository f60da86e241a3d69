"""Bytes that processes exchange and read per iteration, for the trainings of the papers, and what follows.

Two processes take one real training step of each published configuration, and every collective is counted, the
gradients of data parallel training by a communication hook. Bytes depend on the batch in a straight line, so
two small batches are enough. What follows for many GPUs is arithmetic with the assumptions of `Cluster`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from patchreg.benchmarks import figure

PROCESSES = 2
PHOTOS = 8
LOADED = 24
PHOTO_SIZE = (500, 375)
"""Width and height of the usual photo of ImageNet in px."""
ON_DISK = 110_000
"""Bytes of ImageNet's mean file: 138 GB for 1.28 million images."""


@dataclass(frozen=True)
class Training:
    """A training of a paper.

    Args:
        name: What it is called in the table.
        config: Its leaf.
        batch: Images per GPU.
        share: Assumed part of a GPU's peak that its step reaches.
        options: Overrides, such as those that load no weights.
        sizes: Images per process of the measured steps.
    """

    name: str
    config: str
    batch: int
    share: float
    options: tuple[tuple[str, Any], ...] = ()
    sizes: tuple[int, ...] = (2, 4)


_NO_WEIGHTS = (("model.classifier.init_cfg", None), ("model.random_parts", True))
TRAININGS = (
    Training("DGE, DeiT-S", "dge/deit_small", 128, 0.2),
    # Its bytes do not depend on the batch, and one image has ten views.
    Training("PW-Self, ViT-S/8", "pwself/vit_small", 6, 0.3, sizes=(1,)),
    Training("PatchGame, 32-px patches", "patchgame/resnet18_s32", 128, 0.2),
    Training(
        "the same, sending embeddings",
        "patchgame/resnet18_s32",
        128,
        0.2,
        (("model.loss.bottleneck", False),),
    ),
    Training("PatchDrop, classifier", "patchdrop/imagenet_classifier_hr", 128, 0.2),
    Training("PatchDrop, policy", "patchdrop/imagenet_pretrain", 1024, 0.2, _NO_WEIGHTS),
    Training(
        "PatchDrop, both",
        "patchdrop/imagenet_finetune",
        128,
        0.2,
        (*_NO_WEIGHTS, ("model.selector.init_cfg", None)),
    ),
    # Depthwise convolutions of a few channels wait for memory.
    Training("AnchorNet, localiser", "anchornet/anchornet", 32, 0.02),
    Training(
        "AnchorNet, shrunk image",
        "anchornet/resnet50_resized",
        32,
        0.1,
        (("model.init_cfg", None),),
    ),
    Training(
        "AnchorNet, windows",
        "anchornet/resnet50_patch",
        32,
        0.2,
        (("model.init_cfg", None), ("model.anchor.init_cfg", None)),
    ),
)


@dataclass(frozen=True)
class Cluster:
    """What is assumed, not measured.

    Args:
        peak: Dense bfloat16 operations per second of a GPU (H100 SXM: 990e12).
        per_node: GPUs per node.
        inside: Bytes per second and GPU of a ring within a node.
        between: Bytes per second and GPU of a ring through the network (a port of 400 Gbit/s per GPU).
        latency: Seconds of one collective per doubling of the processes.
        overlap: Part of the step during which gradients travel unseen (the backward pass).
        jitter: Standard deviation of a step's time, as a part of it; a step lasts as long as its slowest GPU.
    """

    peak: float = 990e12
    per_node: int = 8
    inside: float = 300e9
    between: float = 40e9
    latency: float = 10e-6
    overlap: float = 0.6
    jitter: float = 0.01


@dataclass(frozen=True)
class Measured:
    """What a process of a training exchanges and reads.

    Args:
        gradients: Bytes of gradients per step.
        reduced: Other bytes per step that are summed over the processes.
        gathered: Bytes per step and image that every process sends to every other.
        collectives: Calls per step.
        operations: Floating point operations per image, forward and backward.
        loaded: Bytes per image from loader to GPU.
        seconds: CPU seconds per image in the loader, reading a JPEG of 500 x 375 px.
    """

    gradients: float
    reduced: float
    gathered: float
    collectives: float
    operations: float
    loaded: float
    seconds: float


def step_seconds(found: Measured, training: Training, cluster: Cluster) -> float:
    """Return the assumed duration of a step on one GPU.

    Args:
        found: What was measured.
        training: The training.
        cluster: Assumptions.
    """
    return found.operations * training.batch / (cluster.peak * training.share)


def efficiency(found: Measured, training: Training, world: int, cluster: Cluster) -> float:
    """Return the throughput per GPU of many GPUs as a part of that of one; the loader is left out.

    Args:
        found: What was measured.
        training: The training.
        world: GPUs.
        cluster: Assumptions.
    """
    compute = step_seconds(found, training, cluster)
    speed = cluster.inside if world <= cluster.per_node else cluster.between
    ring = (world - 1) / world
    wait = max(0.0, 2 * ring * found.gradients / speed - cluster.overlap * compute)
    wait += 2 * ring * found.reduced / speed
    wait += (world - 1) * training.batch * found.gathered / speed
    wait += found.collectives * cluster.latency * math.log2(world)
    # The expected largest of n normal values, to first order.
    wait += compute * cluster.jitter * math.sqrt(2 * math.log(world))
    return compute / (compute + wait)


def cores_per_gpu(found: Measured, training: Training, cluster: Cluster) -> float:
    """Return how many CPU cores feed one GPU.

    Args:
        found: What was measured.
        training: The training.
        cluster: Assumptions.
    """
    return found.seconds * training.batch / step_seconds(found, training, cluster)


@contextmanager
def counted(calls: list[tuple[str, int]]) -> Iterator[None]:
    """Note the name and bytes of every collective that Python code starts.

    Args:
        calls: Filled in.
    """

    def noting(name: str, call: Callable) -> Callable:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            # The tensor that is sent stands first or, after the place for the result, second.
            place = 1 if name.startswith("all_gather") else 0
            calls.append((name, arguments[place].nbytes))
            return call(*arguments, **options)

        return wrapped

    names = (
        "all_reduce",
        "all_gather",
        "all_gather_into_tensor",
        "broadcast",
        "reduce_scatter_tensor",
    )
    before = {name: getattr(dist, name) for name in names}
    for name, call in before.items():
        setattr(dist, name, noting(name, call))
    try:
        yield
    finally:
        for name, call in before.items():
            setattr(dist, name, call)


def _photos(folder: Path) -> None:
    """Write photos with the size in px and about the bytes of ImageNet's; what they show does not matter."""
    from PIL import Image

    (folder / "class").mkdir()
    noise = torch.Generator().manual_seed(0)
    for number in range(PHOTOS):
        small = torch.randint(0, 256, (150, 200, 3), dtype=torch.uint8, generator=noise).numpy()
        picture = Image.fromarray(small).resize(PHOTO_SIZE, Image.Resampling.BICUBIC)
        picture.save(folder / f"class/{number}.jpg", quality=80)


def _parts(training: Training, folder: str) -> tuple[Any, Any, Any, Any]:
    """Return config, data set, model and optimiser wrapper."""
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import init_default_scope

    from patchreg.registry import DATASETS, MODELS
    from patchreg.runner.api import find_config
    from patchreg.runner.build import load_config

    config = load_config(find_config(training.config), dict(training.options))
    init_default_scope("patchreg")
    data = dict(
        config.train_dataloader.dataset, type="ImageFolderDataset", data_root=folder, split=""
    )
    model = MODELS.build(dict(config.model, data_preprocessor=config.data_preprocessor))
    model.init_weights()
    # What is exchanged are float32 gradients in mixed precision too.
    settings = dict(config.optim_wrapper, type="OptimWrapper")
    for key in ("dtype", "loss_scale"):
        settings.pop(key, None)
    return config, DATASETS.build(data), model, build_optim_wrapper(model, settings)


def _bytes(batch: Any) -> int:
    if isinstance(batch, torch.Tensor):
        return batch.nbytes
    if isinstance(batch, Mapping):
        return sum(_bytes(value) for value in batch.values())
    return sum(_bytes(value) for value in batch) if isinstance(batch, (list, tuple)) else 0


def _convolution_backward(grad_shape: Any, images: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """Operations for the gradients of images and weights; torch counts those of grouped ones too high."""
    output_mask = rest[7]
    return 2 * math.prod(grad_shape) * math.prod(weight[1:]) * sum(output_mask[:2])


def _step(training: Training, folder: str) -> list[dict[str, float]]:
    """Take one step per size and return what was exchanged."""
    from mmengine.model import MMDistributedDataParallel
    from mmengine.registry import FUNCTIONS
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config, dataset, model, optim_wrapper = _parts(training, folder)
    collate = FUNCTIONS.get(config.train_dataloader.collate_fn.type)
    calls: list[tuple[str, int]] = []

    def sum_up(bucket: dist.GradBucket) -> torch.futures.Future:
        calls.append(("gradients", bucket.buffer().nbytes))
        work = plain_all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda done: done.value()[0] / PROCESSES)

    plain_all_reduce = dist.all_reduce
    wrapped = MMDistributedDataParallel(module=model, broadcast_buffers=False)
    wrapped.register_comm_hook(None, lambda _, bucket: sum_up(bucket))
    wrapped.train()
    found = []
    for size in training.sizes:
        batch = collate([dataset[number % len(dataset)] for number in range(size)])
        start = time.process_time()
        for number in range(LOADED):
            dataset[number % len(dataset)]
        seconds = (time.process_time() - start) / LOADED
        calls.clear()
        # Other kernels of attention are not counted.
        operations = FlopCounterMode(
            display=False,
            custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward},
        )
        with counted(calls), operations, sdpa_kernel(SDPBackend.MATH):
            wrapped.train_step(batch, optim_wrapper)
        kinds = dict(gradients=0, reduced=0, gathered=0)
        for name, size_ in calls:
            kind = "gathered" if name.startswith("all_gather") else "reduced"
            kinds["gradients" if name == "gradients" else kind] += size_
        found.append(
            dict(
                images=size,
                **kinds,
                collectives=len(calls),
                operations=operations.get_total_flops() / size,
                loaded=_bytes(batch) / size,
                seconds=seconds,
            )
        )
    return found


def _process(rank: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=PROCESSES
    )
    for number, training in enumerate(TRAININGS):
        if training.name in names:
            found = _step(training, f"{folder}/photos")
            if rank == 0:
                Path(folder, f"{number}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def line(rows: list[dict[str, float]]) -> Measured:
    """Turn the steps of some batches into what does and what does not depend on the batch.

    Args:
        rows: One dict per batch size, as the processes write them.

    Raises:
        ValueError: Gradients depend on the batch, or what is gathered does not follow a line through zero.
    """
    first, last = rows[0], rows[-1]
    per_image = [row["gathered"] / row["images"] for row in rows]
    if first["gradients"] != last["gradients"] or per_image[0] != per_image[-1]:
        raise ValueError(f"not a line: {rows}")
    return Measured(
        gradients=last["gradients"],
        reduced=last["reduced"],
        gathered=per_image[-1],
        collectives=last["collectives"],
        operations=last["operations"],
        loaded=last["loaded"],
        seconds=last["seconds"],
    )


def measure(names: list[str]) -> dict[str, Measured]:
    """Measure trainings in two processes on CPUs.

    Args:
        names: Names out of `TRAININGS`.
    """
    before = os.environ.get("PATCHREG_OPS")
    # The kernels of DGE are not counted; the plain operations that they stand for are.
    os.environ["PATCHREG_OPS"] = "reference"
    try:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "photos").mkdir()
            _photos(Path(folder, "photos"))
            mp.spawn(_process, args=(folder, names), nprocs=PROCESSES)
            return {
                training.name: line(json.loads(Path(folder, f"{number}.json").read_text()))
                for number, training in enumerate(TRAININGS)
                if training.name in names
            }
    finally:
        os.environ.pop("PATCHREG_OPS")
        if before is not None:
            os.environ["PATCHREG_OPS"] = before


def run(device: str) -> list[dict[str, Any]]:
    """Measure every training and compute what follows.

    Args:
        device: `cpu`; bytes do not depend on it.
    """
    rows = []
    cluster = Cluster()
    found = measure([training.name for training in TRAININGS])
    for training in TRAININGS:
        name, one = training.name, found[training.name]
        step = step_seconds(one, training, cluster)
        values = [
            ("gradients per step", one.gradients / 1e6, "MB"),
            ("other sums per step", one.reduced / 1e6, "MB"),
            ("sent to every process per image", one.gathered / 1e3, "kB"),
            ("collectives per step", one.collectives, "calls"),
            ("loader to GPU per image", one.loaded / 1e3, "kB"),
            ("CPU time of the loader per image", 1e3 * one.seconds, "ms"),
            ("operations per image", one.operations / 1e9, "GFLOP"),
            ("step on one GPU, assumed", 1e3 * step, "ms"),
            ("cores that feed one GPU, computed", cores_per_gpu(one, training, cluster), "cores"),
            (
                "read from disk per GPU, computed",
                ON_DISK * training.batch / step / 1e6,
                "MB/s",
            ),
        ]
        values += [
            (
                f"efficiency on {world} GPUs, computed",
                100 * efficiency(one, training, world, cluster),
                "%",
            )
            for world in (8, 64, 512)
        ]
        rows += [figure(f"{name}: {what}", value, unit) for what, value, unit in values]
    return rows
