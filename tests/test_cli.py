"""The command lines: frozen flags, one message per mistake, exit codes, nothing left behind."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy

ROOT = Path(__file__).resolve().parent.parent
FLAGS = {
    "train.py": [
        "--amp",
        "--auto-scale-lr",
        "--cfg-options",
        "--dry-run",
        "--help",
        "--launcher",
        "--resume",
        "--seed",
        "--work-dir",
    ],
    "test.py": ["--cfg-options", "--dry-run", "--help", "--launcher", "--seed", "--work-dir"],
}


def call(cwd: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a program in a folder."""
    return subprocess.run(
        list(arguments),
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ".", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def free_port() -> str:
    """A port that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def tool(cwd: Path, name: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run one of the tools in a folder."""
    return call(cwd, sys.executable, str(ROOT / "tools" / name), *arguments)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    toy.write(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", sorted(FLAGS))
def test_flags_are_frozen(name: str) -> None:
    text = tool(ROOT, name, "--help").stdout
    assert sorted(set(re.findall(r"--[a-z-]+", text.split("options:")[1]))) == FLAGS[name]


def mistaken(project: Path, expected: str, name: str, *arguments: str) -> None:
    """Check that a call ends with one message, exit code 2 and an untouched folder."""
    before = sorted(project.rglob("*"))
    done = tool(project, name, *arguments)
    shown = done.stderr + done.stdout
    assert done.returncode == 2, shown
    assert "Traceback" not in shown
    assert shown.count("error: ") == 1
    assert re.search(expected, shown), shown
    after = [item for item in sorted(project.rglob("*")) if "__pycache__" not in item.parts]
    assert after == [item for item in before if "__pycache__" not in item.parts]


CONFIG = "configs/toy/quick.py"
CONFIG_MISTAKES = {
    "missing config": (
        r"'configs/toy/quik\.py' does not exist.*'quick\.py'",
        ["configs/toy/quik.py"],
    ),
    "top-level key": (
        r"unknown top-level key 'trian_cfg'.*'train_cfg'",
        [CONFIG, "--cfg-options", "trian_cfg.max_epochs=1"],
    ),
    "argument": (r"model\.widht.*'width'", [CONFIG, "--cfg-options", "model.widht=8"]),
    "type": (
        r"model\.width is 'eight' of type str; expected int",
        [CONFIG, "--cfg-options", "model.width=eight"],
    ),
    "class": (
        r"'ToyClasifier' is not in the model registry.*'ToyClassifier'",
        [CONFIG, "--cfg-options", "model.type=ToyClasifier"],
    ),
    "helper": (
        r"override train_dataloader\.dataset\.size instead",
        [CONFIG, "--cfg-options", "_dataset.size=8"],
    ),
    "resume file": (
        r"checkpoint 'nowhere\.pth' does not exist",
        [CONFIG, "--resume", "nowhere.pth"],
    ),
    "constructor": (
        r"the config cannot be built: .*negative",
        [CONFIG, "--cfg-options", "model.width=-1"],
    ),
    "scale": (r"auto_scale_lr=dict\(base_batch_size", [CONFIG, "--auto-scale-lr"]),
}


@pytest.mark.parametrize("name", sorted(CONFIG_MISTAKES))
def test_mistakes_of_a_config_are_one_message(project: Path, name: str) -> None:
    expected, arguments = CONFIG_MISTAKES[name]
    mistaken(project, expected, "train.py", *arguments)


def test_mistakes_of_a_checkpoint_are_one_message(project: Path) -> None:
    mistaken(
        project,
        r"'work_dirs/toy/quick/last\.pth' does not exist; make it with: python tools/train\.py "
        r"configs/toy/quick\.py",
        "test.py",
        CONFIG,
        "work_dirs/toy/quick/last.pth",
    )
    torch.save(dict(state_dict={"encoder.weight": torch.zeros(2)}), project / "other.pth")
    mistaken(project, r"does not belong to this model", "test.py", CONFIG, "other.pth")
    torch.save(dict(state_dict=Path("x")), project / "pickle.pth")
    mistaken(project, r"unpickling can run code", "test.py", CONFIG, "pickle.pth")
    (project / "text.pth").write_text("not a checkpoint")
    mistaken(project, r"'text\.pth'", "test.py", CONFIG, "text.pth")


def test_dry_run_prints_the_flow_and_writes_nothing(project: Path) -> None:
    done = tool(project, "train.py", CONFIG, "--dry-run")
    assert done.returncode == 0, done.stderr
    for part in (
        "ToyClassifier",
        "toy_method.py:",
        "ToyDataset",
        "DefaultSampler",
        "AdamW",
        "EpochLoop",
    ):
        assert part in done.stdout
    assert re.search(r"before_train_iter +RuntimeInfoHook > IterTimerHook", done.stdout)
    assert re.search(
        r"after_train_iter .*LoggerHook > ParamSchedulerHook > CheckpointHook", done.stdout
    )
    assert not (project / "work_dirs").exists()


def test_train_resume_test_round_trip(project: Path) -> None:
    done = tool(project, "train.py", CONFIG, "--cfg-options", "train_cfg.max_epochs=1")
    assert done.returncode == 0, done.stderr
    assert (project / "work_dirs/toy/quick/iter_4.pth").is_file()
    done = tool(project, "train.py", CONFIG, "--resume")
    assert "resumed at epoch 0, iteration 4" in done.stdout + done.stderr
    assert (project / "work_dirs/toy/quick/iter_12.pth").is_file()
    done = tool(project, "test.py", CONFIG, "work_dirs/toy/quick/last.pth")
    assert done.returncode == 0, done.stderr
    score = float(re.findall(r"top1: ([0-9.]+)", done.stdout + done.stderr)[-1])
    assert score >= 80.0
    untrained = tool(project, "test.py", CONFIG)
    assert "evaluated as it was initialised" in untrained.stdout + untrained.stderr
    dumped = tool(project, "train.py", "work_dirs/toy/quick/quick.py", "--dry-run")
    assert dumped.returncode == 0, dumped.stderr


@pytest.mark.ddp
def test_two_gloo_processes_train_and_continue_like_one(project: Path) -> None:
    exact = ["--cfg-options", "model.noise=0.5"]
    one = tool(project, "train.py", CONFIG, "--work-dir", "one", *exact)
    assert one.returncode == 0, one.stderr
    command = ["bash", str(ROOT / "tools/dist_train.sh"), CONFIG, "2", "--work-dir", "two"]
    halves = [*exact, "train_dataloader.batch_size=4"]
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    first = call(project, *command, *halves, "train_cfg.max_epochs=2", PORT=free_port(), **path)
    assert first.returncode == 0, first.stderr
    second = call(project, *command, "--resume", *halves, PORT=free_port(), **path)
    assert second.returncode == 0, second.stderr
    assert "resumed at epoch 1, iteration 8" in second.stdout + second.stderr
    assert (project / "two/iter_12.pth").is_file()


def test_a_crash_with_loader_workers_ends_the_process(project: Path) -> None:
    (project / "crash.py").write_text(
        "from mmengine.hooks import Hook\nfrom patchreg.registry import HOOKS\n\n\n"
        "@HOOKS.register_module()\nclass CrashHook(Hook):\n"
        "    def after_train_iter(self, runner, **kwargs):\n"
        "        raise RuntimeError('out of luck')\n"
    )
    config = project / "configs/toy/crash.py"
    config.write_text(
        '_base_ = ["quick.py"]\ncustom_imports = dict(imports=["toy_method", "crash"])\n'
        'custom_hooks = [dict(type="CrashHook")]\ntrain_dataloader = dict(num_workers=2)\n'
    )
    # A process that waits for its workers for ever fails by the time limit of the call.
    done = tool(project, "train.py", "configs/toy/crash.py")
    assert done.returncode == 1
    assert "RuntimeError: out of luck" in done.stderr


def test_shell_tools_say_how_they_are_called() -> None:
    for name in ("dist_train.sh", "dist_test.sh", "slurm_train.sh", "slurm_test.sh"):
        done = call(ROOT, "bash", f"tools/{name}")
        assert done.returncode == 2
        assert f"usage: tools/{name}" in done.stderr


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A project with a folder of images in two classes and a small DGE config that reads it."""
    from PIL import Image

    for number in range(8):
        folder = tmp_path / "photos" / "train" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (30 * number, 0, 0)).save(folder / f"{number}.png")
    config = tmp_path / "configs/dge/photos.py"
    config.parent.mkdir(parents=True)
    config.write_text(
        f'_base_ = ["{ROOT}/configs/dge/quick.py"]\n'
        "model = dict(backbone=dict(arch=dict(embed_dims=16, depth=1, num_heads=2)), "
        "head=dict(in_channels=16))\n"
        '_pipeline = [dict(type="LoadImage"), dict(type="mmpretrain.PackInputs")]\n'
        '_photos = dict(_delete_=True, type="ImageFolderDataset", data_root="photos", split="train", '
        "pipeline=_pipeline)\n"
        "train_dataloader = dict(batch_size=4, num_workers=2, dataset=_photos)\n"
        "val_dataloader = dict(batch_size=4, dataset=_photos)\n"
        "test_dataloader = val_dataloader\n"
        "train_cfg = dict(max_epochs=1)\n"
    )
    return tmp_path


def test_unreadable_image_is_named_or_skipped(photos: Path) -> None:
    broken = photos / "photos/train/class0/4.png"
    broken.write_bytes(broken.read_bytes()[:40])
    done = tool(photos, "train.py", "configs/dge/photos.py")
    shown = done.stderr + done.stdout
    assert done.returncode == 2, shown
    assert shown.count("error: ") == 1
    assert re.search(r"error: image '\S*class0/4\.png' cannot be read", shown)
    assert "Traceback" not in shown.split("error: image")[1]
    skipping = tool(
        photos,
        "train.py",
        "configs/dge/photos.py",
        "--cfg-options",
        "train_dataloader.bad_samples=skip",
        "val_dataloader.bad_samples=skip",
    )
    assert skipping.returncode == 0, skipping.stderr
    assert (photos / "work_dirs/dge/photos/epoch_1.pth").is_file()


def test_empty_and_missing_folders_are_one_message(photos: Path) -> None:
    (photos / "empty/train").mkdir(parents=True)
    name = "train_dataloader.dataset.data_root"
    for root in ("empty", "nowhere"):
        mistaken(
            photos, root, "train.py", "configs/dge/photos.py", "--cfg-options", f"{name}={root}"
        )
