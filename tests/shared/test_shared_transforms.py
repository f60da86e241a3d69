"""Transforms: reading any file as RGB, the DeiT recipe against timm and torchvision, batch "
"mixing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from golden_reader import load
from PIL import Image

from patchreg.registry import TRANSFORMS
from patchreg.transforms.batch_mixup import (
    BatchMixup,
    cutmix,
    cutmix_box,
    mixup,
    smoothed_targets,
)
from patchreg.transforms.loading import LoadImage
from patchreg.utils.errors import ConfigError, DataError, MissingFileError
from patchreg.utils.random import batch_random

MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)


@pytest.fixture
def picture():
    """A smooth colour image, so that interpolation methods are comparable."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 14, 3), dtype=np.uint8))
    return np.array(coarse.resize((112, 96), Image.Resampling.BICUBIC))


def run(pipeline, image):
    results = {"img": image.copy()}
    for config in pipeline:
        results = TRANSFORMS.build(config)(results)
    return results


# --- reading ---


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("RGB", (250, 120, 3), "png", (250, 120, 3)),
        ("L", 77, "png", (77, 77, 77)),
        ("1", 1, "png", (255, 255, 255)),
        ("RGBA", (250, 120, 3, 10), "png", (250, 120, 3)),
        ("LA", (60, 5), "png", (60, 60, 60)),
        ("CMYK", (0, 255, 255, 0), "tif", (255, 0, 0)),
        ("I;16", 0x80FF, "png", (128, 128, 128)),
        ("I", 90, "tif", (90, 90, 90)),
    ],
)
def test_load_image_gives_rgb(mode, colour, suffix, expected, tmp_path):
    path = tmp_path / f"x.{suffix}"
    Image.new(mode, (5, 4), colour).save(path)
    results = LoadImage()({"img_path": str(path)})
    assert results["img"].dtype == np.uint8
    assert results["img"].shape == (4, 5, 3)
    assert results["img_shape"] == results["ori_shape"] == (4, 5)
    assert results["img"][2, 3].tolist() == list(expected)
    results["img"][0] = 0  # writable


def test_load_image_palette_with_transparency(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 9, 200, 40])
    image.save(tmp_path / "x.png", transparency=b"\x00\x80")
    assert LoadImage()({"img_path": str(tmp_path / "x.png")})["img"][0, 0].tolist() == [9, 200, 40]


def test_load_image_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4), (10, 20, 30)).save(tmp_path / "x.jpg", exif=exif)
    path = {"img_path": str(tmp_path / "x.jpg")}
    assert LoadImage()(dict(path))["img"].shape == (4, 8, 3)
    assert LoadImage(apply_orientation=True)(dict(path))["img"].shape == (8, 4, 3)
    Image.new("RGB", (8, 4)).save(tmp_path / "x.jpg", exif=b"Exif\x00\x00garbage")
    assert LoadImage(apply_orientation=True)(dict(path))["img"].shape == (4, 8, 3)


def test_load_image_errors_name_the_file(tmp_path):
    good = tmp_path / "good.jpg"
    Image.fromarray(np.random.randint(0, 256, (64, 64, 3), dtype=np.uint8)).save(good)
    half = tmp_path / "half.jpg"
    half.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    text = tmp_path / "text.jpg"
    text.write_text("not an image")
    for path in (half, text):
        with pytest.raises(DataError, match=rf"{path.name}' cannot be read .*replace or remove"):
            LoadImage()({"img_path": str(path)})
    with pytest.raises(
        DataError, match=r"good\.jpg' has 64 x 64 pixels, more than max_pixels=4000"
    ):
        LoadImage(max_pixels=4000)({"img_path": str(good)})
    with pytest.raises(MissingFileError, match=r"none\.jpg' does not exist"):
        LoadImage()({"img_path": str(tmp_path / "none.jpg")})
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(DataError, match="floating-point"):
        LoadImage()({"img_path": str(tmp_path / "f.tif")})


def test_load_image_passes_arrays(picture):
    results = LoadImage()({"img": picture})
    assert results["img"] is picture
    assert results["ori_shape"] == (96, 112)


# --- the recipe, part by part ---


def test_evaluation_pipeline_is_that_of_the_golden_data():
    golden = load("dge", "metrics_transforms")
    pipeline = [
        # 73 = int(64 / 0.875)
        dict(
            type="mmpretrain.ResizeEdge",
            scale=73,
            edge="short",
            interpolation="bicubic",
            backend="pillow",
        ),
        dict(type="mmpretrain.CenterCrop", crop_size=64),
        dict(type="mmpretrain.PackInputs"),
    ]
    for name, steps in (("eval64", pipeline), ("eval32", pipeline[-1:])):
        inputs = run(steps, golden[f"{name}/image"].numpy())["inputs"]
        assert inputs.dtype == torch.uint8
        expected = golden[f"{name}/out"]
        # Pixels are equal; dividing by 255 before the mean or after it rounds differently.
        assert (((inputs.float() - MEAN) / STD) - expected).abs().max() < 1e-6
        assert torch.equal((expected * STD + MEAN).round().to(torch.uint8), inputs)


def test_random_resized_crop_resamples_like_torchvision(picture):
    from torchvision.transforms.functional import InterpolationMode, resized_crop

    transform = TRANSFORMS.build(
        dict(
            type="mmpretrain.RandomResizedCrop",
            scale=40,
            interpolation="bicubic",
            backend="pillow",
        )
    )
    for seed in range(10):
        np.random.seed(seed)
        box = transform.rand_crop_params(picture)
        np.random.seed(seed)
        found = transform({"img": picture})["img"]
        image = Image.fromarray(picture)
        expected = resized_crop(image, *box, [40, 40], InterpolationMode.BICUBIC)
        assert np.array_equal(found, np.asarray(expected))


OPERATIONS = [
    # timm function and arguments, place in mmpretrain's list, its magnitude, allowed difference
    ("auto_contrast", (), 0, None, 0.0),
    ("equalize", (), 1, None, 0.0),
    ("invert", (), 2, None, 0.0),
    # OpenCV and Pillow interpolate differently at edges and at half pixels.
    ("rotate", (27.0,), 3, -27.0, 2.5),
    ("posterize", (1,), 4, 1, 0.0),
    ("solarize", (26,), 5, 26, 0.0),
    ("solarize_add", (99,), 6, 99, 0.0),
    ("color", (1.81,), 7, 0.81, 0.6),
    ("color", (0.19,), 7, -0.81, 0.6),
    ("contrast", (1.81,), 8, 0.81, 0.1),
    ("brightness", (0.19,), 9, -0.81, 0.0),
    ("sharpness", (1.81,), 10, 0.81, 0.3),
    ("shear_x", (0.27,), 11, -0.27, 2.5),
    ("shear_y", (0.27,), 12, -0.27, 2.5),
    ("translate_x_rel", (0.4,), 13, -0.4, 2.5),
    ("translate_y_rel", (0.4,), 14, -0.4, 2.5),
]


@pytest.mark.parametrize(("name", "args", "index", "magnitude", "tolerance"), OPERATIONS)
def test_rand_augment_operations_agree_with_timm(name, args, index, magnitude, tolerance, picture):
    from timm.data import auto_augment

    augment = TRANSFORMS.build(dict(type="RGBRandAugment", fill=(124, 116, 104)))
    operation = augment.augment.transforms[index]
    operation.prob, operation.random_negative_prob = 1.0, 0.0
    operation.random_magnitude = lambda: magnitude
    augment.augment.transforms = [operation]
    augment.augment.num_policies = 1
    augment.augment.policies = [None]
    found = augment({"img": picture.copy()})["img"]
    reference = getattr(auto_augment, name)(
        Image.fromarray(picture),
        *args,
        fillcolor=(124, 116, 104),
        resample=Image.Resampling.BICUBIC,
    )
    difference = np.abs(found.astype(int) - np.asarray(reference).astype(int))
    assert difference.mean() <= tolerance
    assert found.flags.c_contiguous


def test_rand_augment_has_timms_magnitudes():
    augment = TRANSFORMS.build(dict(type="RGBRandAugment")).augment
    assert augment.num_policies == 2
    ranges = {str(i): getattr(t, "magnitude_range", None) for i, t in enumerate(augment.transforms)}
    assert [ranges[str(i)] for i in range(15)] == (
        [None] * 3
        + [(0, 30), (4, 0), (256, 0), (0, 110)]
        + [(0, 0.9)] * 4
        + [(0, 0.3)] * 2
        + [(0, 0.45)] * 2
    )
    for transform in augment.transforms:
        assert transform.prob == 0.5
        if transform.magnitude_range:
            assert (transform.magnitude_level, transform.magnitude_std) == (9, 0.5)


def test_random_erasing_noise_is_unit_normal_after_normalising():
    transform = TRANSFORMS.build(
        dict(
            type="mmpretrain.RandomErasing",
            erase_prob=1.0,
            mode="rand",
            min_area_ratio=0.3,
            max_area_ratio=1.0 / 3.0,
            aspect_range=(0.3, 1.0 / 0.3),
            fill_color=MEAN.flatten().tolist(),
            fill_std=STD.flatten().tolist(),
        )
    )
    np.random.seed(1)
    grey = np.full((256, 256, 3), 255, np.uint8)
    erased = torch.from_numpy(transform({"img": grey.copy()})["img"]).permute(2, 0, 1)
    inside = (erased != 255).any(0)
    values = ((erased.float() - MEAN) / STD)[:, inside]
    assert 0.28 < inside.float().mean() < 0.35
    # Cutting off at black and white, 2 standard deviations away, costs 2 to 4 % of the spread.
    assert values.mean().abs() < 0.02
    assert 0.94 < values.std() < 1.0


# --- mixing ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixing_against_golden(name, dtype):
    golden = load("dge", "metrics_transforms").group(name)
    x, lam = golden["x"].to(dtype), float(golden["lam"])
    if name == "mixup":
        assert lam == float(golden["lam_drawn"])
        mixed = mixup(x, x.flip(0), lam)
    else:
        y0, y1, x0, x1 = golden["box"].tolist()
        mixed = cutmix(x, x.flip(0), (y0, y1, x0, x1))
        assert lam == pytest.approx(1 - (y1 - y0) * (x1 - x0) / 144, abs=1e-12)
        ratio = (1 - float(golden["lam_drawn"])) ** 0.5
        assert (y1 - y0) <= 2 * (int(12 * ratio) // 2)
    targets = smoothed_targets(golden["y"], golden["y_out"].shape[1], 0.1)
    targets = mixup(targets, targets.flip(0), lam)
    # The golden outputs are float32.
    assert (mixed - golden["x_out"]).abs().max() < 1e-6
    assert (targets - golden["y_out"]).abs().max() < 1e-6


class FixedCentre:
    def __init__(self, *values):
        self.values = list(values)

    def integers(self, high):
        value = self.values.pop(0)
        assert value < high
        return value


def test_cutmix_box_is_clipped_and_lambda_corrected():
    box, lam = cutmix_box(20, 40, 0.75, FixedCentre(10, 30))
    assert box == (5, 15, 20, 40)  # half the height and width
    assert lam == pytest.approx(0.75)
    box, lam = cutmix_box(20, 40, 0.75, FixedCentre(0, 39))
    assert box == (0, 5, 29, 40)
    assert lam == pytest.approx(1 - 5 * 11 / 800)
    # Odd extents lose a pixel to the integer half, as upstream.
    assert cutmix_box(12, 12, 1 - (7 / 12 + 0.01) ** 2, FixedCentre(6, 6))[0] == (3, 9, 3, 9)


def test_draws_have_the_recipes_distribution():
    counts = {True: 0, False: 0}
    lams = {True: [], False: []}
    augment = BatchMixup(mixup_alpha=0.8, cutmix_alpha=1.0, switch_prob=0.5)
    for step in range(4000):
        batch_random.begin(seed=1, step=step)
        use_cutmix, lam, _ = augment._draw()
        counts[use_cutmix] += 1
        lams[use_cutmix].append(lam)
    assert 0.47 < counts[True] / 4000 < 0.53
    # Var Beta(a, a) = 1 / (4 (2 a + 1)).
    assert np.var(lams[True]) == pytest.approx(1 / 12, rel=0.08)
    assert np.var(lams[False]) == pytest.approx(1 / (4 * 2.6), rel=0.08)


def test_mixing_is_off_where_configured_but_labels_are_smoothed():
    x, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 3, 1, 1])
    expected = torch.full((4, 4), 0.025)
    expected[torch.arange(4), labels] = 0.925
    for arguments in (dict(mixup_alpha=0.0, cutmix_alpha=0.0), dict(prob=0.0)):
        mixed, targets = BatchMixup(**arguments)(x, labels, 4)
        assert mixed is x
        assert torch.allclose(targets, expected)
    # Without mixing an odd batch is fine.
    assert BatchMixup(prob=0.0)(x[:3], labels[:3], 4)[0].shape[0] == 3


def test_same_step_same_mix_and_input_untouched():
    x, labels = torch.rand(6, 3, 8, 8), torch.arange(6)
    kept = x.clone()
    results = []
    for step in (5, 5, 6):
        batch_random.begin(seed=3, step=step)
        results.append(BatchMixup()(x, labels, 6))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][1], results[2][1])
    assert torch.equal(x, kept)
    for _, targets in results:
        assert torch.allclose(targets.sum(1), torch.ones(6))


def test_mixing_argument_errors():
    with pytest.raises(ValueError, match=r"a batch of 3 images .*drop_last=True"):
        BatchMixup()(torch.rand(3, 3, 8, 8), torch.arange(3), 3)
    with pytest.raises(ConfigError, match="scope='all'"):
        BatchMixup(scope="all")
    with pytest.raises(ConfigError, match="prob=1.5"):
        BatchMixup(prob=1.5)
    with pytest.raises(ConfigError, match="label_smoothing=1.0"):
        BatchMixup(label_smoothing=1.0)
    with pytest.raises(ConfigError, match="mixup_alpha=-1"):
        BatchMixup(mixup_alpha=-1)


STEPS = (0, 2)  # one mixup and one CutMix step of seed 2


def _mix_rows(rank, world, scope, folder):
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
        )
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(12, 3, 8, 8, generator=generator)[rank::world].contiguous()
    labels = torch.arange(12)[rank::world]
    for step in STEPS:
        batch_random.begin(seed=2, step=step, rank=rank, world=world)
        torch.save(BatchMixup(scope=scope)(x, labels, 12), f"{folder}/{rank}-{step}.pt")
    batch_random.end()
    if world > 1:
        dist.destroy_process_group()


def _mixed_rows(world, scope, folder):
    """Return {step: [(images, targets) of each process]}."""
    folder.mkdir()
    if world == 1:
        _mix_rows(0, 1, scope, str(folder))
    else:
        mp.spawn(_mix_rows, (world, scope, str(folder)), nprocs=world)
    return {
        step: [torch.load(folder / f"{rank}-{step}.pt", weights_only=True) for rank in range(world)]
        for step in STEPS
    }


def test_the_steps_below_cover_mixup_and_cutmix():
    kinds = set()
    for step in STEPS:
        batch_random.begin(seed=2, step=step)
        kinds.add(BatchMixup(scope="global")._draw()[0])
    assert kinds == {True, False}


@pytest.mark.ddp
@pytest.mark.parametrize("world", [2, 3])
def test_global_scope_does_not_depend_on_the_number_of_processes(world, tmp_path):
    whole = _mixed_rows(1, "global", tmp_path / "one")
    parts = _mixed_rows(world, "global", tmp_path / "many")
    for step in STEPS:
        for rank, found in enumerate(parts[step]):
            for one, many in zip(whole[step][0], found, strict=True):
                assert torch.equal(one[rank::world], many)


@pytest.mark.ddp
def test_process_scope_mixes_own_rows_with_own_lambda(tmp_path):
    first, second = (targets for _, targets in _mixed_rows(2, "process", tmp_path / "p")[STEPS[0]])
    # Process 0 holds the labels 0, 2, 4, ...: no other label gains weight there.
    assert (first[:, 1::2] < 0.01).all()
    assert (second[:, ::2] < 0.01).all()
    assert first.max(1).values.std() < 1e-6
    assert abs(float(first[0].max() - second[0].max())) > 1e-3
