"""`patchreg.load`: trained models from Python, on images of any form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import patchreg
from patchreg.runner import api
from patchreg.runner.api import Model, find_config, load
from patchreg.utils.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    InputTypeError,
    MissingFileError,
)

ROOT = Path(__file__).resolve().parent.parent
CIFAR = ["airplane", "automobile", "bird", "cat", "deer"]
CIFAR += ["dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(scope="module")
def model() -> Model:
    return load("dge/quick", device="cpu")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without configs, data and runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pixels(count: int, side: int = 32, seed: int = 0) -> np.ndarray:
    """Random images [B, H, W, 3]."""
    shape = (count, side, side, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def eager(model: Model, images: np.ndarray) -> torch.Tensor:
    """Images as the network takes them."""
    batch = dict(inputs=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())
    return model.network.data_preprocessor(batch, False)["inputs"]


def test_answers_are_those_of_the_network(model: Model) -> None:
    images = pixels(5)
    inputs = eager(model, images)
    with torch.no_grad():
        logits = model.network(inputs)
        features = model.network.extract(inputs)
    found = model.predict(images, top=3)
    assert torch.equal(torch.stack([one.score for one in found]), logits.softmax(1))
    assert [one.label for one in found] == logits.argmax(1).tolist()
    assert [one.name for one in found] == [CIFAR[label] for label in logits.argmax(1)]
    assert [len(one.record["classes"]) for one in found] == [3] * 5
    costs = model.network.cost(features)[0].tolist()
    assert [one.record["macs"] for one in found] == costs
    assert all(np.array_equal(one.image, image) for one, image in zip(found, images))
    selection, expected = model.select(images), model.network.select(inputs)
    for name in ("score", "keep", "resolution", "order", "boxes", "macs"):
        assert torch.equal(getattr(selection, name), getattr(expected, name)), name
    assert torch.equal(model.features(images), features.tokens[:, 0])
    json.dumps([one.record for one in found])


def test_batches_change_nothing_but_rounding(model: Model) -> None:
    images = pixels(5)
    whole = model.features(images)
    for size in (1, 2, 5):
        torch.testing.assert_close(
            model.features(images, batch_size=size), whole, rtol=0, atol=2e-5
        )
    assert torch.equal(torch.cat(list(model.batches(images, batch_size=2))), eager(model, images))


def test_images_of_every_form_are_the_same_images(model: Model, tmp_path: Path) -> None:
    images = pixels(3)
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    paths = sorted(tmp_path.glob("*.png"))
    pictures = [Image.fromarray(image) for image in images]
    forms: dict[str, Any] = {
        "array": images,
        "list of arrays": list(images),
        "tensor": tensor,
        "float tensor": tensor.float() / 255,
        "float64 list": list(tensor.double() / 255),
        "files": [str(path) for path in paths],
        "paths": paths,
        "folder": tmp_path,
        "PIL": pictures,
        "mixed": [images[0], pictures[1], paths[2]],
        "nested": [images[:2], [pictures[2]]],
    }
    expected = model.features(images)
    for name, form in forms.items():
        assert torch.equal(model.features(form), expected), name
    assert torch.equal(model.features(pictures[1]), model.features(images[1]))
    assert torch.equal(model.features(str(paths[1])), model.features(tensor[1]))
    assert torch.equal(model.features(tmp_path, count=2), model.features(images[:2]))
    assert model.predict(paths)[2].record["image"] == str(paths[2])
    assert model.predict(images)[2].record["image"] == ""


def test_other_sizes_are_scaled_to_the_size_of_the_model(model: Model) -> None:
    large = Image.fromarray(pixels(1, 80)[0])
    small = np.array(large.resize((32, 32), Image.Resampling.BILINEAR))
    assert torch.equal(model.features(large), model.features(small))


def test_sizes_that_stay_different_keep_their_order(elsewhere: Path) -> None:
    pipeline = [dict(type="LoadImage"), dict(type="mmpretrain.PackInputs")]
    options = {"test_dataloader.dataset.pipeline": pipeline}
    model = load("dge/quick", device="cpu", options=options)
    small, large = pixels(3, 32), pixels(2, 48, seed=1)
    mixed = [large[0], small[0], small[1], large[1], small[2]]
    found = model.predict(mixed, batch_size=2)
    assert [one.image.shape[0] for one in found] == [48, 32, 32, 48, 32]
    alone = [model.predict(image)[0].score for image in mixed]
    scores = torch.stack([one.score for one in found])
    torch.testing.assert_close(scores, torch.stack(alone), rtol=0, atol=1e-5)
    assert model.features(mixed).shape == (5, 128)
    with pytest.raises(DataError, match=r"different sizes .*\(32, 32\), \(48, 48\)"):
        model.select(mixed)


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "nothing": (None, InputTypeError, "NoneType is no image; expected a file, a folder"),
    "grey": (np.zeros((8, 8), np.uint8), InputTypeError, r"uint8 with shape \(8, 8\)"),
    "channels first": (np.zeros((3, 8, 8), np.uint8), InputTypeError, r"shape \(3, 8, 8\)"),
    "four channels": (np.zeros((8, 8, 4), np.uint8), InputTypeError, r"shape \(8, 8, 4\)"),
    "channels last": (
        torch.zeros(8, 8, 3),
        InputTypeError,
        r"Tensor of torch.float32 .*\(8, 8, 3\)",
    ),
    "int64": (torch.zeros(3, 8, 8, dtype=torch.int64), InputTypeError, "torch.int64"),
    "normalised": (
        torch.randn(3, 8, 8),
        DataError,
        r"expected colours in \[0, 1\], not normalised",
    ),
    "NaN": (torch.full((3, 8, 8), torch.nan), DataError, "from nan to nan"),
    "bytes as floats": (torch.full((3, 8, 8), 255.0), DataError, "divide by 255"),
    "floats": (np.zeros((8, 8, 3)), InputTypeError, "float64"),
    "empty list": ([], DataError, "an empty list holds no image"),
    "empty batch": (np.zeros((0, 8, 8, 3), np.uint8), DataError, "are empty"),
    "missing file": ("gone.jpg", MissingFileError, "'gone.jpg' does not exist"),
    "number in a list": ([3], InputTypeError, "int is no image"),
    "float picture": (Image.new("F", (8, 8)), DataError, "floating-point numbers"),
}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_wrong_images_are_refused_in_words(model: Model, name: str) -> None:
    images, kind, text = WRONG[name]
    with pytest.raises(kind, match=text):
        model.features(images)


def test_a_folder_without_images_and_a_broken_one(model: Model, elsewhere: Path) -> None:
    (elsewhere / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match="holds no image"):
        model.predict(str(elsewhere))
    (elsewhere / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0half")
    with pytest.raises(DataError, match=r"broken\.jpg' cannot be read"):
        model.predict(elsewhere)
    for values in (dict(top=0), dict(count=0), dict(batch_size=0)):
        with pytest.raises(ConfigError, match=f"{next(iter(values))}=0: expected at least 1"):
            model.predict(pixels(1), **values)


def test_names_are_found_anywhere(elsewhere: Path) -> None:
    assert find_config("dge/quick") == str(ROOT / "configs/dge/quick.py")
    for name in ("dge/quick.py", "configs/dge/quick.py", "configs/dge/quick"):
        assert find_config(name) == str(ROOT / "configs/dge/quick.py")
    (elsewhere / "configs/dge").mkdir(parents=True)
    (elsewhere / "configs/dge/quick.py").write_text("")
    assert find_config("dge/quick") == "configs/dge/quick.py"
    with pytest.raises(
        MissingFileError, match=r"'dge/quikc' does not exist\. Did you mean 'dge/quick'"
    ):
        find_config("dge/quikc")
    with pytest.raises(MissingFileError, match="does not exist"):
        find_config("/nowhere/quick.py")


def test_configs_of_an_installed_package_are_found(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (elsewhere / "site/patchreg/configs/dge").mkdir(parents=True)
    config = elsewhere / "site/patchreg/configs/dge/quick.py"
    config.write_text("")
    monkeypatch.setattr(patchreg, "__file__", str(elsewhere / "site/patchreg/__init__.py"))
    assert find_config("dge/quick") == str(config)
    text = (ROOT / "setup.py").read_text()
    assert '"patchreg.configs": "configs"' in text
    for ending in {file.suffix for file in (ROOT / "configs").glob("*/checkpoints/*")}:
        assert f'"**/*{ending}"' in text or ending == ".md"


def test_classes_come_from_the_checkpoint_not_from_the_data_at_hand(elsewhere: Path) -> None:
    for name in ("dge/dense_quick", "patchdrop/quick_finetune", "anchornet/quick_dynamic"):
        model = load(name, device="cpu")
        assert model.classes == CIFAR
        with pytest.raises(DataError, match=r"trained for airplane.* found here has T-shirt/top"):
            model.predict("test", count=1)
        # Where it looks does not depend on names.
        assert len(model.select("test", count=3)) == 3


def test_models_that_classify_nothing_say_so(elsewhere: Path) -> None:
    images = pixels(2, 32)
    for name, width, cells in (("pwself/quick", 128, 16), ("patchgame/quick", 96, 64)):
        model = load(name, device="cpu")
        inputs = eager(model, images)
        assert torch.equal(model.features(images), model.network.features(inputs))
        assert model.features(images).shape == (2, width)
        assert torch.equal(model.select(images).score, model.network.select(inputs).score)
        assert model.select("test", count=2).score.shape == (2, cells)
        with pytest.raises(ConfigError, match="gives features, not classes"):
            model.predict(images)
    with pytest.raises(ConfigError, match="PatchDropClassifier gives no features"):
        load("patchdrop/quick_finetune", device="cpu").features(images)


def test_features_can_be_trained_on(model: Model) -> None:
    features = model.features(pixels(4))
    layer = torch.nn.Linear(128, 2)
    layer(features).sum().backward()
    assert layer.weight.grad is not None


def test_early_exit_is_per_image_and_takes_a_budget(elsewhere: Path) -> None:
    images = pixels(6)
    whole = load("anchornet/quick_dynamic", device="cpu")
    assert [one.record["stage"] for one in whole.predict(images)] == [3] * 6
    lowest = whole.network.costs((3, 32, 32))[0]
    model = load("anchornet/quick_dynamic", device="cpu", budget=lowest)
    found = model.predict(images, batch_size=4)
    assert [one.record["macs"] for one in found] == [lowest] * 6
    middle = load("anchornet/quick_dynamic", device="cpu", budget=28e6)
    for one, image in zip(middle.predict(images), images):
        sums, stage, _ = middle.network.exit_early(eager(middle, image[None]))
        assert torch.equal(one.score, sums[0].softmax(0))
        assert one.record["stage"] == stage.item()
    with pytest.raises(ConfigError, match=r"no budget .* model\.budget=0\.5"):
        load("dge/quick", device="cpu", budget=1e6)


def test_without_a_checkpoint_the_command_that_makes_one_is_named(elsewhere: Path) -> None:
    with pytest.raises(
        MissingFileError, match=r"train one with: python tools/train\.py .*tiny\.py"
    ):
        load("dge/deit_tiny")
    with pytest.raises(MissingFileError, match="trains nothing; pass the checkpoint it evaluates"):
        load("pwself/knn_cifar10")
    (elsewhere / "configs").symlink_to(ROOT / "configs")
    with pytest.raises(MissingFileError, match=r"quick_finetune/last\.pth'; make it with"):
        load("patchdrop/quick_sweep")
    run = elsewhere / "work_dirs/dge/deit_tiny"
    run.mkdir(parents=True)
    torch.save({}, run / "epoch_1.pth")
    with pytest.raises(MissingFileError, match=r"a run of yours in 'work_dirs/dge/deit_tiny'"):
        load("dge/deit_tiny")
    with pytest.raises(MissingFileError, match=r"'gone\.pth' does not exist"):
        load("dge/deit_tiny", "gone.pth")
    with pytest.raises(CheckpointError, match="deit_tiny|another model|does not fit|missing"):
        load("dge/deit_tiny", ROOT / "configs/dge/checkpoints/quick.pth")
    with pytest.raises(ConfigError, match=r"no model of its own but 5 stages.*quick_dynamic\.py"):
        load("anchornet/quick")
    with pytest.raises(ConfigError, match=r"model\.hed"):
        load("dge/quick", options={"model.hed": 1})


def test_a_model_without_weights_needs_no_checkpoint(elsewhere: Path) -> None:
    model = load("pwself/photo_retrieval_pixels", device="cpu")
    assert model.checkpoint is None
    assert model.features(pixels(2, 20)).shape == (2, 3 * 16 * 16)


def test_parts_with_weights_of_their_own_replace_a_checkpoint(elsewhere: Path) -> None:
    state = torch.load(ROOT / "configs/dge/checkpoints/dense_quick.pth", weights_only=True)
    torch.save(state, "whole.pth")
    config = elsewhere / "mine.py"
    base = ROOT / "configs/dge/dense_quick.py"
    part = dict(type="Pretrained", checkpoint="whole.pth", prefix="backbone")
    config.write_text(f"_base_ = ['{base}']\nmodel = dict(backbone=dict(init_cfg={part}))\n")
    with pytest.raises(MissingFileError, match="none ships"):
        load(config)  # The head has no weights.
    head = dict(part, prefix="head")
    text = f"model = dict(backbone=dict(init_cfg={part}), head=dict(init_cfg={head}))\n"
    config.write_text(f"_base_ = ['{base}']\n{text}")
    images = pixels(2)
    expected = load("dge/dense_quick", device="cpu").features(images)
    assert torch.equal(load(config, device="cpu").features(images), expected)
    # A whole checkpoint makes the files of the parts needless.
    missing = text.replace("whole.pth", "work_dirs/gone/last.pth")
    config.write_text(f"_base_ = ['{base}']\n{missing}")
    assert torch.equal(load(config, "whole.pth", device="cpu").features(images), expected)


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, patchreg; before = set(sys.modules);"
        "assert not {'torch', 'mmengine', 'mmpretrain', 'timm'} & before, before;"
        "assert callable(patchreg.load);"
        "assert not {'mmpretrain', 'timm', 'torchvision'} & set(sys.modules);"
        "from patchreg import load"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert patchreg.load is api.load
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = patchreg.lod  # type: ignore[attr-defined]


def test_a_model_says_what_it_is(model: Model) -> None:
    text = repr(model)
    assert text.startswith("Model(DGEClassifier, config='")
    assert "dge/checkpoints/quick.pth" in text
    assert "device='cpu'" in text


def test_the_tool_takes_a_name_and_no_checkpoint(elsewhere: Path) -> None:
    Image.fromarray(pixels(1, 50)[0]).save("photo.png")
    command = [sys.executable, str(ROOT / "tools/predict.py"), "photo.png", "dge/quick"]
    done = subprocess.run(
        [*command, "--top", "2"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(Path("work_dirs/predict/predictions.json").read_text())
    expected = load("dge/quick", device="cpu").predict("photo.png", top=2)[0].record
    assert record["classes"] == expected["classes"]
    assert record["boxes"] == expected["boxes"]
    assert Path("work_dirs/predict/predictions.png").stat().st_size > 5000
