"""Pictures of attention: files, sizes, cells, thresholds, videos and their errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope
from PIL import Image

from patchreg.pictures.attention import (
    AttentionModel,
    attention_mask,
    coloured,
    enlarged,
    whole_patches,
)
from patchreg.registry import MODELS
from patchreg.utils.errors import ConfigError

CONFIG = """
default_scope = "patchreg"
model = dict(
    type="FeatureExtractor",
    backbone=dict(
        type="VisionTransformerBackbone",
        arch=dict(embed_dims=24, depth=2, num_heads=3),
        img_size=32,
        patch_size=8,
        pos_resize="dino",
    ),
)
data_preprocessor = dict(type="ImagePreprocessor")
"""


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Path]:
    """A config and a checkpoint of a teacher."""
    init_default_scope("patchreg")
    config = tmp_path / "tiny.py"
    config.write_text(CONFIG)
    torch.manual_seed(3)
    backbone = MODELS.build(
        dict(
            type="VisionTransformerBackbone",
            arch=dict(embed_dims=24, depth=2, num_heads=3),
            img_size=32,
            patch_size=8,
        )
    )
    state = {f"teacher.backbone.{key}": 5 * value for key, value in backbone.state_dict().items()}
    torch.save(dict(state_dict=state), tmp_path / "tiny.pth")
    return config, tmp_path / "tiny.pth"


def visualize(root: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Call the tool."""
    command = [sys.executable, str(root / "tools/visualize.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)


def picture(path: Path, height: int, width: int) -> None:
    """Write a picture of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_mask_keeps_the_largest_cells_that_hold_the_share() -> None:
    attention = torch.tensor([[[0.1, 0.2], [0.3, 0.4]]])
    # From below: 0.1, 0.3, 0.6, 1.0; kept where the sum exceeds 1 - threshold.
    assert attention_mask(attention, 0.65).int().tolist() == [[[0, 0], [1, 1]]]
    assert attention_mask(attention, 0.45).int().tolist() == [[[0, 0], [1, 1]]]
    assert attention_mask(attention, 0.35).int().tolist() == [[[0, 0], [0, 1]]]
    assert attention_mask(attention, 0.75).int().tolist() == [[[0, 1], [1, 1]]]


def test_cells_become_squares_and_colours() -> None:
    large = enlarged(torch.tensor([[0.0, 1.0]]), 3)
    assert large.tolist() == [[0, 0, 0, 1, 1, 1]] * 3
    colours = coloured(large, "inferno")
    assert colours[0, 0].max() <= 5
    assert colours[0, 5].tolist() == [252, 254, 164]
    assert coloured(np.ones((2, 2))).shape == (2, 2, 3)


def test_remainders_are_cut_off() -> None:
    assert whole_patches(np.zeros((33, 47, 3)), 8).shape == (32, 40, 3)
    with pytest.raises(ConfigError, match="smaller than a patch of 8 px"):
        whole_patches(np.zeros((7, 47, 3)), 8)


def test_pictures_of_an_image(run: tuple[Path, Path], tmp_path: Path, project_root: Path) -> None:
    picture(tmp_path / "photo.png", 50, 70)
    done = visualize(
        project_root,
        *("attention", tmp_path / "photo.png", *run, "--out", tmp_path / "out"),
        *("--image-size", 44, 60, "--threshold", 0.6),
    )
    assert done.returncode == 0, done.stderr
    names = {item.name for item in (tmp_path / "out").iterdir()}
    heads = range(3)
    assert names == {"img.png", "heads.png"} | {f"attn-head{h}.png" for h in heads} | {
        f"mask_th0.6_head{h}.png" for h in heads
    }
    drawn = np.array(Image.open(tmp_path / "out/attn-head1.png"))
    assert drawn.shape == (40, 56, 3)
    model = AttentionModel(str(run[0]), str(run[1]))
    attention = model(np.array(Image.open(tmp_path / "out/img.png")))
    assert attention.shape == (3, 5, 7)
    assert (attention.sum(dim=(1, 2)) < 1).all(), "the class token's own share is left out"
    brightest = int(attention[1].argmax())
    place = drawn.sum(axis=2)[::8, ::8].reshape(-1)
    assert int(place.argmax()) == brightest


def test_video_of_a_folder(run: tuple[Path, Path], tmp_path: Path, project_root: Path) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in range(3):
        picture(frames / f"frame-{number:04d}.png", 40, 48)
    out = tmp_path / "out"
    command = ("attention-video", frames, *run, "--out", out, "--video-format", "avi")
    done = visualize(project_root, *command)
    assert done.returncode == 0, done.stderr
    assert len(list((out / "attention").glob("attn-frame-*.jpg"))) == 3
    import cv2

    video = cv2.VideoCapture(str(out / "video.avi"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert video.get(cv2.CAP_PROP_FPS) == 30
    again = visualize(
        project_root, "attention-video", out / "video.avi", *run, "--out", tmp_path / "second"
    )
    assert again.returncode == 0, again.stderr
    assert len(list((tmp_path / "second/frames").glob("frame-*.jpg"))) == 3
    joined = visualize(
        project_root,
        *("attention-video", out / "attention", "--video-only", "--fps", 5),
        *("--out", tmp_path / "third"),
    )
    assert joined.returncode == 0, joined.stderr
    assert cv2.VideoCapture(str(tmp_path / "third/video.mp4")).get(cv2.CAP_PROP_FPS) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("attention", "none.png", "CONFIG", "WEIGHTS"), "does not exist"),
        (("attention-video", "none.mp4"), "'none.mp4' does not exist"),
        (("attention", "none.png", "CONFIG", "WEIGHTS", "--threshold", 2), "share from 0 to 1"),
        (("attention", "none.png", "configs/pwself/knn_cifar10_pixels.py", "x"), "no class token"),
    ],
)
def test_errors(arguments: tuple, message: str, run: tuple[Path, Path], project_root: Path) -> None:
    names = {"CONFIG": run[0], "WEIGHTS": run[1]}
    done = visualize(project_root, *(names.get(item, item) for item in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
