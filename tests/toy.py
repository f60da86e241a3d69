"""A method outside the tree, written into a folder: eight-dimensional points in two classes."""

from __future__ import annotations

import importlib
import shutil
import sys
import tempfile
from pathlib import Path

MODULE = "toy_method"
METHOD = '''
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from torch import nn

from patchreg.registry import DATASETS, METRICS, MODELS
from patchreg.utils.random import batch_random


@DATASETS.register_module()
class ToyDataset:
    """Points on both sides of a plane, with noise as augmentation."""

    metainfo = dict(classes=("left", "right"))

    def __init__(self, size: int = 32, noise: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(1)
        self.points = torch.randn(size, 8, generator=generator)
        self.labels = (self.points.sum(1) > 0).long()
        self.noise = noise

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        return dict(inputs=self.points[index] + self.noise * torch.randn(8), labels=self.labels[index])


@MODELS.register_module()
class ToyClassifier(BaseModel):
    """A linear classifier with keyed and unkeyed noise on its logits."""

    def __init__(
        self, width: int = 8, noise: float = 0.1, init_cfg: dict | None = None, data_preprocessor=None
    ):
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        self.fc = nn.Linear(width, 2)
        self.drop = nn.Dropout(0.1)
        self.noise = noise

    def forward(self, inputs, labels=None, mode="tensor"):
        logits = self.fc(self.drop(inputs))
        if mode == "loss":
            logits = logits + self.noise * batch_random.uniform(len(inputs), (2,), inputs.device)
            return dict(loss_cls=nn.functional.cross_entropy(logits, labels))
        if mode == "predict":
            return [dict(right=bool(r)) for r in logits.argmax(1) == labels]
        return logits


@METRICS.register_module()
class ToyMetric(BaseMetric):
    """Share of right answers."""

    def process(self, data_batch, data_samples):
        self.results += [sample["right"] for sample in data_samples]

    def compute_metrics(self, results):
        return dict(top1=100.0 * sum(results) / len(results))
'''

CONFIG = '''
"""A toy: seconds on one core."""

default_scope = "patchreg"
custom_imports = dict(imports=["{module}"])
model = dict(type="ToyClassifier")
_dataset = dict(type="ToyDataset", size=32)
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    dataset=_dataset,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    dataset=dict(type="ToyDataset", size=20, noise=0.0),
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
)
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type="ToyMetric")
train_cfg = dict(by_epoch=True, max_epochs=3)
val_cfg = test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type="AdamW", lr=0.05))
param_scheduler = dict(type="CosineAnnealingLR", T_max=12, by_epoch=False)
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=1),
    checkpoint=dict(type="CheckpointHook", interval=1, by_epoch=False),
)
visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")])
randomness = dict(seed=3)
'''


def register() -> None:
    """Make the method known to this process, once; its classes cannot be registered twice."""
    if MODULE in sys.modules:
        return
    folder = Path(tempfile.mkdtemp(prefix="patchreg-toy-"))
    (folder / f"{MODULE}.py").write_text(METHOD)
    sys.path.insert(0, str(folder))
    try:
        importlib.import_module(MODULE)
    finally:
        sys.path.remove(str(folder))
        shutil.rmtree(folder)


def write(folder: Path) -> Path:
    """Write the toy method and its config; return the config's path.

    Args:
        folder: Where to write.
    """
    (folder / f"{MODULE}.py").write_text(METHOD)
    config = folder / "configs" / "toy" / "quick.py"
    config.parent.mkdir(parents=True)
    config.write_text(CONFIG.replace("{module}", MODULE))
    return config
