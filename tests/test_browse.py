"""What the pipeline feeds the model, drawn: the same images as in a training, and nothing made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.dataset import default_collate

from patchreg.methods.pwself.browse import _colours
from patchreg.methods.pwself.matching import match_pair
from patchreg.runner import browse as module
from patchreg.runner.browse import Strip, browse, describe, draw
from patchreg.runner.build import EngineRunner, load_config
from patchreg.utils.errors import ConfigError, MissingFileError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """Make configs on the embedded data that inherit from shipped ones."""

    def make(base: str, *lines: str) -> str:
        path = tmp_path / f"{Path(base).stem}_small.py"
        data = "dict(dataset=dict(data_root='nowhere'))"
        names = ("train", "val", "test")
        parent = load_config(base, moved={".": "."})
        there = [name for name in names if parent.get(f"{name}_dataloader") is not None]
        text = [f"_base_ = ['{ROOT / base}']", *lines]
        text += [f"{name}_dataloader = {data}" for name in there]
        path.write_text("\n".join(text) + "\n")
        return str(path)

    return make


def lines_of(found: Any, number: int = 0) -> list[Strip]:
    """The lines of the picture that belong to one image."""
    return module._lines(found.config, found.looks[number], True)


def test_images_are_those_of_the_first_batch_of_a_training(config: Any) -> None:
    path = config("configs/dge/quick.py")
    found = browse(path, count=5, seed=3)
    loader = EngineRunner.build_dataloader(load_config(path).train_dataloader, seed=3)
    batch = next(iter(loader))
    for place, look in enumerate(found.looks):
        expected = batch["inputs"][place].permute(1, 2, 0).numpy()
        assert np.array_equal(look.loaded[0], expected)
        # Normalised and back: what the model gets is the same image.
        assert np.array_equal(look.fed[0], expected)
        sample = batch["data_samples"][place]
        assert look.index == sample.sample_idx
        assert look.label == loader.dataset.metainfo["classes"][int(sample.gt_label)]
        assert np.array_equal(look.original, loader.dataset.get_data_info(look.index)["img"])
    assert not all(np.array_equal(look.original, look.loaded[0]) for look in found.looks)
    assert found.steps[-3:] == ["RandomFlip", "PackInputs", "ImagePreprocessor"]
    again, other = browse(path, count=5, seed=3), browse(path, count=5, seed=4)
    assert all(np.array_equal(a.fed[0], b.fed[0]) for a, b in zip(found.looks, again.looks))
    assert [look.index for look in found.looks] != [look.index for look in other.looks]


def test_test_images_are_spread_over_the_set(config: Any) -> None:
    found = browse(config("configs/dge/quick.py"), "test", 4)
    assert [look.index for look in found.looks] == [0, 125, 250, 375]
    assert all(np.array_equal(look.original, look.fed[0]) for look in found.looks)
    assert not any(look.training for look in found.looks)
    assert len(lines_of(found)[0].panels) == 3


def test_mixed_images_and_targets_belong_together(config: Any) -> None:
    mixing = (
        "data_preprocessor = dict(batch_augment=dict(type='BatchMixup', cutmix_alpha=0.0, "
        "label_smoothing=0.0))"
    )
    state = torch.get_rng_state()
    found = browse(config("configs/dge/quick.py", mixing), count=3, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    assert len(found.looks) == 3
    first, second, third = found.looks
    shares = {}
    for line in second.target.splitlines():
        share, name = line.split(" ", 1)
        shares[name] = float(share)
    # A batch of four is mixed with its reverse, so the second image with the third.
    assert set(shares) == {second.label, third.label}
    assert sum(shares.values()) == pytest.approx(1.0)
    share = shares[second.label]
    assert 0.02 < share < 0.98
    mixed = share * second.loaded[0].astype(float) + (1 - share) * third.loaded[0]
    assert np.abs(mixed - second.fed[0]).max() <= 3
    assert first.target != ""
    panels = lines_of(found, 1)[0].panels
    assert [panel.title.split("\n")[0] for panel in panels] == [
        "stored",
        "after the pipeline",
        "model gets",
    ]
    assert panels[2].note == second.target
    assert second.target.splitlines()[0] in describe(found)


def test_views_are_drawn_with_boxes_and_matched_patches(config: Any, tmp_path: Path) -> None:
    found = browse(config("configs/pwself/quick.py"), count=2, seed=1)
    look = found.looks[0]
    assert [view.shape for view in look.loaded] == [(32, 32, 3)] * 2 + [(16, 16, 3)] * 2
    assert look.geometry is not None
    assert look.source_size == (32, 32)
    # A box of the source, scaled to the view and mirrored or not, is the view.
    for number, view in enumerate(look.loaded):
        top, left, height, width = look.geometry.boxes[0, number].tolist()
        cut = look.original[top : top + height, left : left + width].mean((0, 1))
        assert np.abs(cut - view.mean((0, 1))).max() < 16
    views, colours, matched = lines_of(found)
    assert [panel.title.split("\n")[0] for panel in views.panels[1:]] == [
        f"view {number}" for number in range(1, 5)
    ]
    assert [panel.note for panel in views.panels[1:]] == [
        "mirrored" if flip else "" for flip in look.geometry.flips[0].tolist()
    ]
    # The colours are changed on the device only.
    assert any((panel.image != view).any() for panel, view in zip(colours.panels[1:], look.loaded))
    titles = [panel.title.split("\n")[0] for panel in matched.panels[1:]]
    assert titles == [
        "view 1 (teacher)",
        "view 2 (student)",
        "view 1 (teacher)",
        "view 3 (student)",
    ]
    pairs = match_pair(look.geometry, (0, 2), ((4, 4), (2, 2)))[0]
    assert matched.panels[3].note == f"{len(pairs[0]) - 1} pairs"
    assert np.array_equal(matched.panels[4].image, look.fed[2])
    out = tmp_path / "made" / "views.png"
    draw(found, out)
    assert out.stat().st_size > 20_000


def test_many_matched_patches_have_colours_that_differ() -> None:
    tokens = torch.tensor([0, *range(30, 40), *range(58, 68)])
    colours = _colours(tokens, (28, 28), numbered=False)
    assert len(np.unique(colours.round(6), axis=0)) == 20
    assert len(_colours(tokens[:1], (28, 28), numbered=False)) == 0


def test_policy_gets_every_fourth_pixel(config: Any) -> None:
    path = config("configs/patchdrop/quick_pretrain.py")
    found = browse(path, count=1)
    (line,) = lines_of(found)
    assert line.panels[-2].title == "patches to choose\n4 x 4 of 8 px"
    assert line.panels[-1].title == "policy sees\n8 x 8 px"
    assert np.array_equal(line.panels[-1].image, found.looks[0].fed[0][::4, ::4])


def test_windows_and_crops_of_the_localiser(config: Any) -> None:
    five = "model = dict(evaluation='five_crop')"
    path = config("configs/anchornet/quick_patch.py", five)
    (line,) = lines_of(browse(path, "train", 1))
    assert line.panels[-1].title == "9 x 9 windows of 15 px\nevery 2 px"
    found = browse(path, "test", 1)
    (line,) = lines_of(found)
    image = found.looks[0].fed[0]
    crops = [panel.image for panel in line.panels[-5:]]
    assert np.array_equal(crops[0], image[:15, :15])
    assert np.array_equal(crops[3], image[17:, 17:])
    assert np.array_equal(crops[4], image[8:23, 8:23])
    (line,) = lines_of(browse(config("configs/anchornet/quick_resized.py"), "test", 1))
    assert line.panels[-1].image.shape == (16, 16, 3)


def test_wrong_inputs_are_told_in_words(config: Any) -> None:
    path = config("configs/pwself/quick.py")
    with pytest.raises(ConfigError, match=r"--split val: .* has train and test data only"):
        browse(path, "val")
    with pytest.raises(ConfigError, match="--count 0: expected at least 1"):
        browse(path, count=0)
    with pytest.raises(ConfigError, match=r"lists stages; give .* quick_classifier\.py"):
        browse("configs/patchdrop/quick.py")
    missing = Path("data/fmow")
    if not missing.exists():
        with pytest.raises(MissingFileError, match=r"data/fmow.*prepare_data\.py fmow"):
            browse("configs/patchdrop/fmow_classifier_hr.py")


def test_grey_and_normalised_images_become_pixels() -> None:
    class Made:
        mean, std = torch.tensor([100.0]).view(-1, 1, 1), torch.tensor([50.0]).view(-1, 1, 1)

    image = torch.tensor([[[0.0, 1.0], [-3.0, 9.0]]])
    assert module._pixels(image, Made())[..., 2].tolist() == [[100, 150], [0, 255]]
    assert module._pixels(image, Made()).shape == (2, 2, 3)
    batch = default_collate([dict(inputs=torch.zeros(3, 4, 4))])
    fed, _ = module._feed(None, batch, True, 0)
    assert fed[0].shape == (1, 3, 4, 4)
