"""Every method, interrupted ten times at random places, ends as a run that was left alone.

Minutes, so run by hand: `pytest -m slow tests/soak/test_soak_kills.py -s`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import launches
import pytest
from test_resume import same

from patchreg.runner.build import latest_checkpoint
from patchreg.utils.weights import load_file

HERE = Path(__file__).resolve().parent

COMMON = """
custom_imports = dict(imports=["kill_parts"])
custom_hooks = [{hooks}dict(type="InterruptHook", plan="{folder}/plan.json", stage="{stage}")]
default_hooks = dict(
    logger=dict(interval=1), checkpoint=dict(by_epoch=False, interval=3, max_keep_ckpts=2)
)
train_dataloader = dict(batch_size=8, num_workers=1, dataset=dict(subset=80))
train_cfg = dict(max_epochs=4{validation})
"""
VALIDATION = """
val_dataloader = dict(batch_size=8, num_workers=1, dataset=dict(subset=24))
test_dataloader = val_dataloader
"""
DGE = 'dict(type="DGEBudgetHook"), dict(type="ModelEMAHook", momentum=0.05), '
PWSELF = (
    'dict(type="FreezeLastLayerHook", epochs=1), dict(type="PWSelfTeacherHook", momentum=0.99), '
)
PATCHGAME = (
    'dict(type="FreezeLastLayerHook", epochs=1), '
    'dict(type="PatchGameTemperatureHook", start=5.0, final=1.0), '
)
POLICY = 'dict(type="PatchDropStatsHook"), dict(type="PatchDropBudgetHook", target=6.0), '
FIRST = 'init_cfg=dict(checkpoint="work_dirs/classifier/last.pth")'
SECOND = 'init_cfg=dict(checkpoint="work_dirs/pretrain/last.pth")'
ANCHOR = 'init_cfg=dict(checkpoint="work_dirs/localiser/last.pth")'
# Stage: quick config, hooks, what else is set.
METHODS: dict[str, dict[str, tuple[str, str, str]]] = {
    "dge": {
        "dge": (
            "dge/quick",
            DGE,
            "model = dict(backbone=dict(drop_path_rate=0.2))\n"
            'data_preprocessor = dict(batch_augment=dict(type="BatchMixup"))',
        )
    },
    "pwself": {"pwself": ("pwself/quick", PWSELF, "")},
    "patchgame": {"patchgame": ("patchgame/quick", PATCHGAME, "")},
    "patchdrop": {
        "classifier": ("patchdrop/quick_classifier", "", ""),
        "pretrain": (
            "patchdrop/quick_pretrain",
            POLICY,
            f"model = dict(classifier=dict({FIRST}))\nparam_scheduler = dict(T_max=4)",
        ),
        "finetune": (
            "patchdrop/quick_finetune",
            POLICY,
            f"model = dict(classifier=dict({FIRST}), selector=dict({SECOND}))\n"
            "param_scheduler = dict(T_max=4)",
        ),
    },
    "anchornet": {
        "localiser": ("anchornet/quick_anchornet", "", ""),
        "resized": ("anchornet/quick_resized", "", ""),
        "patch": ("anchornet/quick_patch", "", f"model = dict(anchor=dict({ANCHOR}))"),
    },
}
STEPS = 40
KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
KINDS = [
    (KILL, "iteration", None),
    (KILL, "iteration", None),
    (KILL, "validation", None),
    (KILL, "write", None),
    (KILL, "rename", None),
    (KILL, "pointer", None),
    (TERM, "iteration", None),
    (TERM, "write", None),
    (INT, "iteration", None),
    # As SLURM ends a job that takes too long to save.
    (TERM, "iteration", "write"),
]
CODES = {KILL: -9, TERM: 143, INT: 130}


def write_config(method: str, folder: Path) -> Path:
    """Write the shortened stages of a method and return what runs them."""
    for stage, (base, hooks, more) in METHODS[method].items():
        text = f'_base_ = ["{launches.ROOT}/configs/{base}.py"]\n{more}\n'
        validated = method != "pwself"
        text += COMMON.format(
            hooks=hooks,
            folder=folder,
            stage=stage,
            validation=", val_interval=1" if validated else "",
        )
        (folder / f"{stage}.py").write_text(text + (VALIDATION if validated else ""))
    stages = [f"{stage}.py" for stage in METHODS[method]]
    if len(stages) == 1:
        return folder / stages[0]
    (folder / "all.py").write_text(f"stages = {stages}\n")
    return folder / "all.py"


def run(config: Path, work_dir: Path, *flags: str) -> int:
    """Train in a process group of its own, on CIFAR-10 where it was prepared."""
    paths = os.pathsep.join((str(HERE), os.environ.get("PYTHONPATH", "")))
    with open(work_dir.with_suffix(".out"), "a") as output:
        process = subprocess.Popen(
            [sys.executable, str(launches.ROOT / "tools/train.py"), str(config)]
            + ["--work-dir", str(work_dir), *flags],
            cwd=launches.ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
            start_new_session=True,
        )
    return launches.finish(process, 600)


def points(method: str) -> list[dict]:
    """Draw where a method is interrupted, in the order of its stages and iterations."""
    draws = random.Random(method)
    stages = list(METHODS[method])
    # Early enough for a checkpoint or a validation to come after it.
    places = [place for place in range(len(stages) * STEPS) if 2 <= place % STEPS < STEPS - 12]
    places = sorted(draws.sample(places, len(KINDS)))
    kinds = draws.sample(KINDS, len(KINDS))
    found = []
    for place, (number, moment, then) in zip(places, kinds, strict=True):
        if method == "pwself" and moment == "validation":
            moment = "iteration"  # it is evaluated by its own command
        stage, step = stages[place // STEPS], place % STEPS
        point = dict(stage=stage, at=step, signal=int(number), moment=moment)
        found.append({**point, "delay": draws.random(), **({"then": then} if then else {})})
    return found


def name_of(point: dict) -> str:
    """The kind of an interruption in words."""
    name = signal.Signals(point["signal"]).name
    if "then" in point:
        return f"{name}, then SIGKILL in its write"
    return f"{name} in {point['moment']}"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_ten_interruptions_change_nothing(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = write_config(method, tmp_path)
    whole, parts, plan = tmp_path / "whole", tmp_path / "parts", tmp_path / "plan.json"
    assert run(config, whole) == 0, whole.with_suffix(".out").read_text()[-3000:]
    counted, told = Counter(), []
    for point in points(method):
        plan.write_text(json.dumps(point))
        plan.with_suffix(".done").unlink(missing_ok=True)
        code = run(config, parts, "--resume")
        said = parts.with_suffix(".out").read_text()[-3000:]
        assert plan.with_suffix(".done").is_file(), f"{point}: code {code}, {said}"
        assert code == (-9 if "then" in point else CODES[point["signal"]]), said
        counted[name_of(point)] += 1
        done = plan.with_suffix(".done").read_text()
        told.append(f"{point['stage']} {done} {name_of(point)}")
    plan.unlink()
    assert run(config, parts, "--resume") == 0, parts.with_suffix(".out").read_text()[-3000:]
    assert "Traceback" not in parts.with_suffix(".out").read_text()
    for stage in METHODS[method]:
        folders = [
            folder / stage if len(METHODS[method]) > 1 else folder for folder in (parts, whole)
        ]
        ours, theirs = (load_file(latest_checkpoint(folder)) for folder in folders)
        assert ours.keys() == theirs.keys()
        for key in theirs.keys() - {"meta", "message_hub"}:
            same(ours[key], theirs[key], f"{stage}: {key}")
        for key in ("iter", "epoch", "seed"):
            assert ours["meta"][key] == theirs["meta"][key]
        assert theirs["meta"]["iter"] == STEPS
        logged, known = (launches.scalars(folder) for folder in folders)
        assert sum(kind == "train" for kind, _ in known) == STEPS
        assert logged == known
        assert not list(folders[0].glob(".*"))
    with capsys.disabled():
        print(f"\n{method}: {sum(counted.values())} of {len(KINDS)}: {'; '.join(told)}")
        for name, count in sorted(counted.items()):
            print(f"| {method} | {name} | {count} |")
