"""Twenty mistakes in the configs of all methods: each ends a dry run with one message that names its place."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from patchreg.utils.errors import run_tool

ROOT = Path(__file__).resolve().parent.parent
MISTAKES = {
    # Misspelt keys: the place and the nearest name.
    "key: model argument": (
        "dge/quick.py",
        "model = dict(backbone=dict(splitz=[2, 1]))",
        r"model\.backbone\.splitz: .* Did you mean 'splits'",
    ),
    "key: top level": (
        "pwself/quick.py",
        "trian_cfg = dict(max_epochs=1)",
        r"unknown top-level key 'trian_cfg'\. Did you mean 'train_cfg'",
    ),
    "key: optimiser": (
        "patchgame/quick.py",
        "optim_wrapper = dict(optimizer=dict(weight_decey=0.1))",
        r"optim_wrapper\.optimizer\.weight_decey: .* Did you mean 'weight_decay'",
    ),
    "key: hook": (
        "patchdrop/quick_pretrain.py",
        'custom_hooks = [dict(type="PatchDropBudgetHook", targets=6.0)]',
        r"custom_hooks\.0\.targets: .* Did you mean 'target'",
    ),
    "key: dataloader": (
        "anchornet/quick_resized.py",
        "train_dataloader = dict(batchsize=64)",
        r"train_dataloader\.batchsize: .* Did you mean 'batch_size'",
    ),
    # Wrong types: the place, the value and what was expected.
    "type: text for a number": (
        "dge/deit_small.py",
        'model = dict(budget_loss=dict(budget="half"))',
        r"model\.budget_loss\.budget is 'half' of type str; expected float",
    ),
    "type: list for a number": (
        "pwself/vit_small.py",
        "model = dict(loss=dict(student_temperature=[0.1]))",
        r"model\.loss\.student_temperature is \[0\.1\] of type list; expected float",
    ),
    "type: fraction for a count": (
        "patchgame/resnet18_s32.py",
        "model = dict(selector=dict(count=49.5))",
        r"model\.selector\.count is 49\.5 of type float; expected int",
    ),
    "type: number for a switch": (
        "patchdrop/cifar10_classifier_lr.py",
        "train_dataloader = dict(drop_last=1)",
        r"train_dataloader\.drop_last is 1 of type int; expected bool",
    ),
    "type: number for a part": (
        "anchornet/quick_anchornet.py",
        "model = dict(head=dict(_delete_=True, type='AnchorNetCAMHead', num_classes='10', in_channels=256))",
        r"model\.head\.num_classes is '10' of type str; expected int",
    ),
    # Unknown classes: the place and the nearest class.
    "class: model": (
        "pwself/quick.py",
        'model = dict(head=dict(type="ProjektionHead"))',
        r"model\.head\.type: 'ProjektionHead' is not in the model registry\. Did you mean 'ProjectionHead'",
    ),
    "class: metric": (
        "dge/quick.py",
        'val_evaluator = [dict(type="CostMetrik")]',
        r"val_evaluator\.0\.type: 'CostMetrik' .* Did you mean 'CostMetric'",
    ),
    "class: of another package": (
        "anchornet/quick_patch.py",
        'val_evaluator = [dict(type="mmpretrain.Acuracy")]',
        r"val_evaluator\.0\.type: 'mmpretrain\.Acuracy' .* Did you mean 'Accuracy'",
    ),
    # Parts that do not fit together: the place and the number that would fit.
    "shape: tokens into the head": (
        "dge/deit_small.py",
        "model = dict(head=dict(in_channels=192))",
        r"model\.head: .* takes 192 channels, but what comes to it has 384 .* in_channels=384",
    ),
    "shape: overview into the policy": (
        "patchdrop/quick_pretrain.py",
        "model = dict(classifier=dict(init_cfg=None), selector=dict(in_channels=64))",
        r"model\.selector: .* takes 64 channels, but what comes to it has 256 .* in_channels=256",
    ),
    "shape: trunk into the localiser": (
        "anchornet/quick_anchornet.py",
        "model = dict(backbone=dict(out_channels=128))",
        r"model\.head: .* takes 256 channels, but what comes to it has 128 .* in_channels=128",
    ),
    # Missing files: which, and how to make it.
    "file: weights of an earlier stage": (
        "patchdrop/quick_finetune.py",
        "model = dict(classifier=dict(init_cfg=None), selector=dict(init_cfg=dict("
        "checkpoint='work_dirs/patchdrop/quick_pretrain/epoch_77.pth')))",
        r"model\.selector\.init_cfg\.checkpoint: 'work_dirs/patchdrop/quick_pretrain/epoch_77\.pth' does "
        r"not exist; make it with: python tools/train\.py configs/patchdrop/quick_pretrain\.py",
    ),
    "file: base": ("patchgame/quik.py", "", r"names a base that does not exist: .*quik\.py"),
    # Helpers that nothing reads any more: the keys to set instead.
    "helper: in a file": (
        "pwself/quick.py",
        "_views = [dict(num=2, size=24, scale=(0.4, 1.0))]",
        r"sets the helper variable '_views' of its base again but does not use it",
    ),
    "helper: on the command line": (
        "patchgame/quick.py",
        "--cfg-options _vit.patch_size=8",
        r"--cfg-options _vit\.patch_size: '_vit' is a helper variable",
    ),
}
MORE_SHAPES = {
    "shape: backbone into the projection head": (
        "pwself/quick.py",
        "model = dict(head=dict(in_channels=64))",
        r"head\.in_channels=64: the backbone gives 128 channels",
    ),
    "shape: ranks and symbols": (
        "patchgame/quick.py",
        "model = dict(ranker=dict(patch_size=8))",
        r"ranker: .* cuts 32 px into 4 x 4 cells, patch_size=4 into 8 x 8; give it the same patches",
    ),
}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """The module tools/train.py."""
    spec = importlib.util.spec_from_file_location("train_tool", ROOT / "tools/train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_what_it_says() -> None:
    kinds = [name.split(":")[0] for name in MISTAKES]
    counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    assert counts == dict(key=5, type=5, shape=3, file=2, helper=2) | {"class": 3}
    assert {leaf.split("/")[0] for leaf, _, _ in MISTAKES.values()} == {
        path.name for path in (ROOT / "patchreg/methods").iterdir() if (path / "model.py").is_file()
    }


@pytest.mark.parametrize("name", [*MISTAKES, *MORE_SHAPES])
def test_mistake_is_one_message_that_names_its_place(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tool: ModuleType,
    name: str,
) -> None:
    leaf, change, expected = (MISTAKES | MORE_SHAPES)[name]
    config, options = tmp_path / "mistaken.py", []
    if change.startswith("--"):
        options, change = change.split(), ""
    config.write_text(f'_base_ = ["{ROOT}/configs/{leaf}"]\n{change}\n')
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py", str(config), "--dry-run", *options])
    code = run_tool(tool.main)
    shown = capsys.readouterr()
    assert code == 2, shown.out + shown.err
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("error: ") == 1
    assert re.search(expected, shown.err), shown.err
