"""Every stage of every method: two processes compute what one does, and shards what whole copies do.

DGE has tests of its own, with more forms: `test_distributed.py`, `test_sharding.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ddp_parts
import pytest
from test_sharding import needs_shards, pairs_of

from patchreg.runner.build import latest_checkpoint
from patchreg.runner.sharding import SHARDS_ON_CPUS
from patchreg.utils.weights import load_file

pytestmark = pytest.mark.ddp

CONFIG = """
_base_ = ["{root}/configs/{base}.py"]
custom_imports = dict(imports=["ddp_parts"])
train_dataloader = dict(batch_size=8, dataset=dict({data}))
val_dataloader = None
val_evaluator = None
val_cfg = None
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    clip_grad=dict({clip}max_norm=0.3),
)
param_scheduler = None
train_cfg = dict(max_epochs=2, val_interval=9)
model = dict(type="Double{model}", {parts})
custom_hooks = [{hooks}dict(type="FixedNormHook"), dict(type="RecordLossHook")]
"""
EMBEDDED = 'data_root="nowhere", subset=16'
TINY = "arch=dict(embed_dims=24, depth=2, num_heads=2)"
NO_FILE = "init_cfg=None"
POLICY = 'dict(type="PatchDropStatsHook"), dict(type="PatchDropBudgetHook", target=6.0), '
THIN = f"backbone=dict(depth=8), {NO_FILE}"
TRUNK = "backbone=dict(blocks=[(1, 8, 1), (2, 8, 1), (2, 8, 1)], out_channels=16)"
CAM = "head=dict(in_channels=16)"
NET = "backbone=dict(base_channels=4), head=dict(in_channels=32)"
LOW = (
    'lr_classifier=dict(type="PatchClassifier", '
    'backbone=dict(type="ThinCIFARResNetBackbone", depth=8), '
    'head=dict(type="LinearHead", num_classes=10, in_channels=64, pool="mean"))'
)
# Config, model, its parts, hooks, clipping by tensor.
RUNS: dict[str, tuple[str, str, str, str]] = {
    "pwself": (
        "pwself/quick",
        "PWSelfPretrainer",
        f"backbone=dict({TINY}, patch_size=8, drop_path_rate=0.2), "
        "head=dict(in_channels=24, out_dim=40, hidden_dim=24, bottleneck_dim=12)",
        'dict(type="FreezeLastLayerHook", epochs=1), dict(type="PWSelfTeacherHook", momentum=0.9), ',
    ),
    "patchgame": (
        "patchgame/quick",
        "PatchGamePretrainer",
        f"backbone=dict({TINY}), ranker=dict({TINY}), symbol=dict({TINY}, drop_path_rate=0.2), "
        "head=dict(out_dim=64, hidden_dim=24, bottleneck_dim=12), drop_rate=0.1",
        'dict(type="FreezeLastLayerHook", epochs=1), dict(type="PatchGameTemperatureHook", '
        "start=5.0, final=1.0), ",
    ),
    "patchdrop classifier": ("patchdrop/quick_classifier", "PatchClassifier", THIN, ""),
    "patchdrop tokens": (
        "patchdrop/cifar10_tokens_classifier",
        "PatchDropTokenClassifier",
        f"backbone=dict({TINY}), head=dict(in_channels=24)",
        "",
    ),
    "patchdrop pretrain": (
        "patchdrop/quick_pretrain",
        "PatchDropClassifier",
        f"classifier=dict({THIN}), random_parts=True",
        POLICY,
    ),
    "patchdrop finetune": (
        "patchdrop/quick_finetune",
        "PatchDropClassifier",
        f"classifier=dict({THIN}), selector=dict({NO_FILE}), random_parts=True",
        POLICY,
    ),
    "patchdrop twostream": (
        "patchdrop/quick_finetune",
        "PatchDropClassifier",
        f"classifier=dict({THIN}), selector=dict({NO_FILE}), random_parts=True, "
        f'stage="twostream", {LOW}',
        POLICY,
    ),
    "anchornet localiser": (
        "anchornet/quick_anchornet",
        "AnchorNetClassifier",
        f"{TRUNK}, {CAM}",
        "",
    ),
    "anchornet resized": ("anchornet/quick_resized", "AnchorNetResizedClassifier", NET, ""),
    "anchornet patch": (
        "anchornet/quick_patch",
        "AnchorNetPatchClassifier",
        f"{NET}, anchor=dict({TRUNK}, {CAM}, {NO_FILE})",
        "",
    ),
}
SHARDED = {
    "pwself": ["student.backbone.blocks", "teacher.backbone.blocks"],
    "patchgame": [
        "sender.patch_rank.blocks",
        "sender.patch_symbol.blocks",
        "receiver.vision.blocks",
        "receiver.encoder.layers",
    ],
    "patchdrop tokens": ["backbone.blocks"],
}


def write(folder: Path, name: str) -> str:
    """Write the config of a run and return its path."""
    base, model, parts, hooks = RUNS[name]
    data = EMBEDDED
    if name == "patchdrop tokens":
        data += ', type="QuickStartDataset"'
    text = CONFIG.format(
        root=ddp_parts.ROOT,
        base=base,
        model=model,
        parts=parts,
        hooks=hooks,
        data=data,
        clip='type="per_tensor", ' if name == "pwself" else "",
    )
    path = folder / f"{name.replace(' ', '_')}.py"
    path.write_text(text)
    return str(path)


def wrapper_of(name: str) -> dict[str, Any]:
    """What shards a model."""
    return dict(type="FullyShardedWrapper", blocks=SHARDED[name])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the runs `one/NAME`, `two/NAME`, `shards/NAME`: four steps of a global batch of 8.

    `again/patchgame` continues in shards what was stopped in shards.
    """
    folder = tmp_path_factory.mktemp("methods")
    paths = {name: write(folder, name) for name in RUNS}

    def job(form: str, name: str, **options: Any) -> dict[str, Any]:
        options = {"train_dataloader.batch_size": 8 if form == "one" else 4, **options}
        return dict(path=paths[name], work_dir=str(folder / form / name), options=options)

    two = [job("two", name) for name in RUNS]
    if SHARDS_ON_CPUS:
        for name in SHARDED:
            two.append(job("shards", name, model_wrapper_cfg=wrapper_of(name)))
        again = job("again", "patchgame", model_wrapper_cfg=wrapper_of("patchgame"))
        two.append({**again, "resume": str(folder / "shards/patchgame/epoch_1.pth")})
    one = [job("one", name) for name in RUNS]
    assert set(ddp_parts.run_two(folder, two, lambda: ddp_parts.run(one))) == {0}
    return folder


def difference(found: Path, expected: Path) -> float:
    """Largest difference of losses, weights and the optimiser's averages."""
    losses = [ddp_parts.losses(folder) for folder in (found, expected)]
    assert len(losses[1]) == 4
    assert losses[1].std() > 0
    losses[1] = losses[1][-len(losses[0]) :]  # a resumed run has the last ones only
    ours, theirs = (load_file(latest_checkpoint(folder)) for folder in (found, expected))
    pairs = [tuple(losses), *pairs_of(ours, theirs)]
    return max(float((one - other).abs().max()) for one, other in pairs)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_compute_what_one_does(runs: Path, name: str) -> None:
    assert difference(runs / "two" / name, runs / "one" / name) < 1e-8


@needs_shards
@pytest.mark.parametrize("name", SHARDED)
def test_shards_compute_what_whole_copies_do(runs: Path, name: str) -> None:
    assert difference(runs / "shards" / name, runs / "two" / name) < 1e-8


@needs_shards
def test_a_parameter_without_dimensions_is_resumed(runs: Path, tmp_path: Path) -> None:
    """The scale of PatchGame's logits: whole in the checkpoint, whoever continues it."""
    start = runs / "shards/patchgame/epoch_1.pth"
    assert load_file(start)["state_dict"]["logit_scale"].shape == ()
    assert difference(runs / "again/patchgame", runs / "shards/patchgame") == 0.0
    ddp_parts.run(
        [dict(path=str(runs / "patchgame.py"), work_dir=str(tmp_path / "one"), resume=str(start))]
    )
    assert difference(tmp_path / "one", runs / "two/patchgame") < 1e-8
