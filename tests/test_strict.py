"""The check of configs: each kind of mistake is one message that names the path and the nearest name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import toy

from patchreg.runner.build import load_config
from patchreg.runner.strict import _fits
from patchreg.utils.errors import ConfigError, MissingFileError


@pytest.fixture
def config(tmp_path: Path) -> Path:
    toy.register()
    return toy.write(tmp_path)


MISTAKES: list[tuple[str, Callable[[str], str], list[str]]] = [
    (
        "misspelt top-level key",
        lambda text: text.replace("optim_wrapper =", "optim_wraper ="),
        ["unknown top-level key 'optim_wraper'", "'optim_wrapper'"],
    ),
    (
        "misspelt argument of a model",
        lambda text: text.replace('type="ToyClassifier"', 'type="ToyClassifier", widht=8'),
        ["model.widht", "no argument 'widht'", "'width'"],
    ),
    (
        "wrong type",
        lambda text: text.replace('type="ToyClassifier"', 'type="ToyClassifier", width="8"'),
        ["model.width is '8' of type str", "expected int"],
    ),
    (
        "bool for int",
        lambda text: text.replace('type="ToyClassifier"', 'type="ToyClassifier", width=True'),
        ["model.width is True of type bool"],
    ),
    (
        "unknown class",
        lambda text: text.replace("ToyClassifier", "ToyClasifier"),
        ["model.type", "'ToyClasifier' is not in the model registry", "'ToyClassifier'"],
    ),
    (
        "unknown transform of another package",
        lambda text: text.replace('"DefaultSampler", shuffle=True', '"mmpretrain.RepeatAugSamplr"'),
        ["train_dataloader.sampler.type", "registry of 'mmpretrain'", "RepeatAugSampler"],
    ),
    (
        "misspelt loader key",
        lambda text: text.replace("batch_size=8", "batchsize=8", 1),
        ["train_dataloader.batchsize", "'batch_size'"],
    ),
    (
        "misspelt optimiser argument",
        lambda text: text.replace("lr=0.05", "lrr=0.05"),
        ["optim_wrapper.optimizer.lrr", "'lr'"],
    ),
    (
        "misspelt hook argument",
        lambda text: text.replace("interval=1, by_epoch", "intervall=1, by_epoch"),
        ["default_hooks.checkpoint.intervall", "'interval'"],
    ),
    (
        "misspelt default hook",
        lambda text: text.replace("checkpoint=dict", "checkpiont=dict"),
        ["default_hooks.checkpiont", "'checkpoint'"],
    ),
    (
        "misspelt loop key",
        lambda text: text.replace("max_epochs=3", "max_epoch=3"),
        ["train_cfg.max_epoch", "'max_epochs'"],
    ),
    (
        "missing partner",
        lambda text: text.replace("train_cfg = dict(by_epoch=True, max_epochs=3)\n", ""),
        ["train_cfg is not", "belong together"],
    ),
    (
        "misspelt key of a plain dict",
        lambda text: text.replace("seed=3", "sede=3"),
        ["randomness.sede", "'seed'"],
    ),
    (
        "missing module of custom_imports",
        lambda text: text.replace('imports=["toy_method"]', 'imports=["toy_methot"]'),
        ["custom_imports", "toy_methot"],
    ),
]


@pytest.mark.parametrize(("name", "change", "expected"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_mistake_is_named(
    config: Path, name: str, change: Callable[[str], str], expected: list[str]
) -> None:
    text = config.read_text()
    changed = change(text)
    assert changed != text
    config.write_text(changed)
    with pytest.raises(ConfigError) as caught:
        load_config(config)
    for part in expected:
        assert part in str(caught.value)


def test_right_config_passes_and_reloads_from_its_dump(config: Path, tmp_path: Path) -> None:
    loaded = load_config(config)
    loaded.dump(str(tmp_path / "dump.py"))
    again = load_config(tmp_path / "dump.py")
    assert again.model == loaded.model
    assert again.train_dataloader == loaded.train_dataloader


def test_override_of_a_helper_says_what_to_override(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"override train_dataloader\.dataset\.size instead"):
        load_config(config, {"_dataset.size": 8})


def test_misspelt_override_names_the_argument(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.nois: .*'noise'"):
        load_config(config, {"model.nois": 0.2})


def test_helper_set_again_without_use_is_refused(config: Path) -> None:
    child = config.parent / "child.py"
    child.write_text('_base_ = ["quick.py"]\n_dataset = dict(type="ToyDataset", size=8)\n')
    with pytest.raises(ConfigError, match="'_dataset' of its base again but does not use it"):
        load_config(child)
    child.write_text(
        '_base_ = ["quick.py"]\n_dataset = dict(type="ToyDataset", size=8)\n'
        "train_dataloader = dict(dataset=_dataset)\n"
    )
    assert load_config(child).train_dataloader.dataset.size == 8


def test_missing_files_name_the_remedy(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(config.parent.parent.parent)
    with pytest.raises(MissingFileError, match=r"Did you mean 'quick\.py'\?"):
        load_config("configs/toy/quik.py")
    with pytest.raises(MissingFileError, match=r"python tools/train\.py configs/toy/quick\.py"):
        load_config(config, {"load_from": "work_dirs/toy/quick/epoch_1.pth"})
    with pytest.raises(MissingFileError, match=r"model\.init_cfg\.checkpoint: 'nowhere\.pth'"):
        load_config(config, {"model.init_cfg": dict(type="Pretrained", checkpoint="nowhere.pth")})


def test_syntax_error_is_one_message(config: Path) -> None:
    config.write_text("model = dict(\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(config)


@pytest.mark.parametrize(
    ("value", "hint", "fits"),
    [
        (1, float, True),
        (1.5, int, False),
        (True, float, False),
        ([1, 2], tuple[int, int], True),
        ([1, 2, 3], tuple[int, int], False),
        ([1, "2"], list[int], False),
        (None, int | None, True),
        ("a", int | str, True),
        (dict(type="X"), int, False),
        ("12", list[int], False),
        ([0.9, 0.99], tuple[float, ...], True),
    ],
)
def test_types_fit_as_a_config_author_means_them(value: object, hint: object, fits: bool) -> None:
    assert _fits(value, hint) is fits
