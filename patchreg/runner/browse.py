"""What the pipeline of a config feeds its model, image by image.

A method adds pictures of its own (views matched patch by patch, crops) in a module `browse` with
`strips(config, look) -> list[Strip]`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor

from patchreg.registry import MODELS, method_modules
from patchreg.runner.api import find_config
from patchreg.runner.build import EngineRunner, config_errors, load_config
from patchreg.structures import ViewGeometry
from patchreg.transforms.loading import LoadImage
from patchreg.utils.draw import save_figure
from patchreg.utils.errors import ConfigError
from patchreg.utils.random import batch_random, kept_generators, mix_seed, seed_all
from patchreg.utils.tables import text_table

SPLITS = ("train", "val", "test")


@dataclass(eq=False)
class Panel:
    """One image of the picture.

    Args:
        title: Text above it.
        image: The image.
        note: Text below it.
        draw: Draws more onto the axis of Matplotlib; the image is drawn before.
        colour: Colour of its frame, or None.
        size: Height and width that its coordinates span, by default those of the image.

    Shape:
        image [H, W, 3] uint8.
    """

    title: str
    image: np.ndarray
    note: str = ""
    draw: Callable[[Any], None] | None = None
    colour: Any = None
    size: tuple[int, int] | None = None


@dataclass(eq=False)
class Strip:
    """Panels that belong together.

    Args:
        label: What they show, for a strip on a line of its own.
        panels: At least one.
    """

    label: str
    panels: list[Panel]


@dataclass(eq=False)
class Look:
    """One image on its way from the data set into the model.

    Args:
        index: Its number in the data set.
        source: Its file, or an empty text.
        label: Its class, or an empty text.
        training: Whether it comes from the training data.
        original: The image as stored, or None where the data set does not tell.
        loaded: What the loader gives, view by view.
        fed: What the model gets, view by view, with the normalisation undone.
        target: Soft target of a mixed image, or an empty text.
        geometry: Boxes and flips of the views of this image, or None for a single view.
        source_size: Height and width that the boxes refer to.

    Shape:
        original, loaded, fed [H, W, 3] uint8.
    """

    index: int
    source: str
    label: str
    training: bool
    original: np.ndarray | None
    loaded: list[np.ndarray]
    fed: list[np.ndarray]
    target: str = ""
    geometry: ViewGeometry | None = None
    source_size: tuple[int, int] = (1, 1)


@dataclass(eq=False)
class Browsing:
    """What `browse` found.

    Args:
        config: The config.
        split: `train`, `val` or `test`.
        images: How many images the data set has.
        steps: Names of data set, transforms and preprocessor, in order.
        looks: The images.
        mean: Mean of what the model gets, after normalisation.
        std: Standard deviation of the same.
    """

    config: Config
    split: str
    images: int
    steps: list[str]
    looks: list[Look] = field(default_factory=list)
    mean: float = 0.0
    std: float = 0.0


def browse(
    path: str, split: str | None = None, count: int = 4, seed: int | None = None
) -> Browsing:
    """Run data set, pipeline and preprocessor of a config on a few images.

    Of the training data these are the first images of a training with that seed, changed as there; mixed
    images have other partners than in its larger batches. Of the other sets they are spread evenly. No
    weights are needed.

    Args:
        path: Config file, or a short name such as `pwself/quick`.
        split: `train`, `val` or `test`; by default the first of these that the config has.
        count: Images.
        seed: Seed of the run; by default that of the config.

    Raises:
        ConfigError: The config has no such data, or an option is out of its range.
        UserError: The data cannot be read; says where they are expected.
    """
    if count < 1:
        raise ConfigError(f"--count {count}: expected at least 1")
    # Checkpoints that a config names need not be here: nothing below reads them.
    path = find_config(path)
    config = load_config(path, moved={".": ".", "/": "/"})
    split = _split(config, path, split)
    init_default_scope(config.get("default_scope", "patchreg"))
    if seed is None:
        seed = int((config.get("randomness") or {}).get("seed") or 0)
    settings = copy.deepcopy(config[f"{split}_dataloader"])
    settings.update(num_workers=0, persistent_workers=False, pin_memory=False)
    settings.pop("prefetch_factor", None)
    with config_errors(f"the {split} data of '{path}' cannot be read"):
        loader = EngineRunner.build_dataloader(settings, seed=seed)
    dataset: Any = loader.dataset
    if not hasattr(dataset, "get_data_info"):
        raise ConfigError(
            f"'{path}': {type(dataset.dataset).__name__} does not give images that a pipeline changes"
        )
    training = split == "train"
    with config_errors("the preprocessor cannot be built"):
        preprocessor = _preprocessor(config)
    mixes = training and getattr(preprocessor, "batch_augment", None) is not None
    # A batch is mixed with its reverse, so it has to be even.
    indices = _indices(loader, count + count % 2 if mixes else count, training)
    samples = dataset.__getitems__(indices)
    if "inputs" not in samples[0]:
        raise ConfigError(f"'{path}': its pipeline does not pack 'inputs'; end it with PackInputs")
    batches = [list(range(len(samples)))] if training else [[k] for k in range(len(samples))]
    steps = [type(dataset.dataset).__name__]
    steps += [type(step).__name__ for step in dataset.pipeline.transforms]
    steps += [type(preprocessor).__name__] if preprocessor is not None else []
    found = Browsing(config, split, len(dataset), steps)
    values: list[Tensor] = []
    for rows in batches:
        batch = loader.collate_fn([samples[row] for row in rows])
        fed, out = _feed(preprocessor, batch, training, seed)
        values += fed
        for place, row in enumerate(rows):
            look = _look(dataset, int(indices[row]), samples[row], training)
            look.fed = [_pixels(view[place], preprocessor) for view in fed]
            if out.get("data_samples") is not None:
                look.target = _target(out["data_samples"][place], _classes(dataset))
            if out.get("geometry") is not None:
                whole = out["geometry"]
                one = slice(place, place + 1)
                look.geometry = ViewGeometry(whole.boxes[one], whole.flips[one], whole.sizes)
            found.looks.append(look)
    found.looks = found.looks[:count]
    together = torch.cat([view.flatten() for view in values])
    found.mean, found.std = float(together.mean()), float(together.std())
    return found


def _split(config: Config, path: str, split: str | None) -> str:
    if "stages" in config:
        raise ConfigError(
            f"'{path}' lists stages; give the config of one of them: {', '.join(config.stages)}"
        )
    there = [name for name in SPLITS if config.get(f"{name}_dataloader") is not None]
    if not there:
        raise ConfigError(f"'{path}' has no data: neither train_, val_ nor test_dataloader")
    if split is None:
        return there[0]
    if split not in there:
        raise ConfigError(f"--split {split}: '{path}' has {' and '.join(there)} data only")
    return split


def _preprocessor(config: Config) -> Any:
    """Build the preprocessor as the runner gives it to the model, or return None."""
    settings = config.model.get("data_preprocessor") or config.get("data_preprocessor")
    return None if settings is None else MODELS.build(copy.deepcopy(settings))


def _indices(loader: Any, count: int, training: bool) -> list[int]:
    if training:
        return list(islice(iter(loader.sampler), count))
    size = len(loader.dataset)
    count = min(count, size)
    return [number * size // count for number in range(count)]


def _feed(
    preprocessor: Any, batch: dict[str, Any], training: bool, seed: int
) -> tuple[list[Tensor], dict[str, Any]]:
    """Return what the model gets, as one batch per view, and all that the preprocessor returns."""
    out: dict[str, Any] = batch
    if preprocessor is not None:
        with kept_generators():
            seed_all(mix_seed(seed, 0, 0))
            batch_random.begin(seed, 0)
            try:
                out = preprocessor(copy.deepcopy(batch), training)
            finally:
                batch_random.end()
    inputs = out["inputs"]
    several = "views" in batch
    if not several and not isinstance(inputs, Tensor):
        inputs = torch.stack(list(inputs))
    return [view.float() for view in inputs] if several else [inputs.float()], out


def _look(dataset: Any, index: int, sample: dict[str, Any], training: bool) -> Look:
    """Describe an image up to what the loader gives."""
    info = dataset.get_data_info(index)
    original = None
    if "img" in info:
        # The pipeline may write into the stored image.
        original = np.array(info["img"])
    elif info.get("img_path"):
        steps = dataset.pipeline.transforms
        loading = next((step for step in steps if isinstance(step, LoadImage)), LoadImage())
        original = loading.read(info["img_path"])
    views = sample["inputs"] if "views" in sample else [sample["inputs"]]
    look = Look(
        index=index,
        source=str(info.get("img_path") or ""),
        label=_name(info.get("gt_label"), _classes(dataset)),
        training=training,
        original=original,
        loaded=[_pixels(view, None) for view in views],
        fed=[],
    )
    if original is not None:
        look.source_size = original.shape[:2]
    for step in dataset.pipeline.transforms:
        side = getattr(step, "source_size", None)
        if side is not None:
            look.source_size = (side, side)
    return look


def _classes(dataset: Any) -> list[str]:
    return list(getattr(dataset, "metainfo", {}).get("classes") or ())


def _name(label: Any, classes: Sequence[str]) -> str:
    """Return the name of a label, or of several."""
    if label is None:
        return ""
    numbers = np.atleast_1d(np.asarray(label)).astype(int).tolist()
    names = [classes[k] if k < len(classes) else f"class {k}" for k in numbers]
    return ", ".join(name.split(",")[0] for name in names)


def _target(sample: Any, classes: Sequence[str]) -> str:
    """Return the classes of a soft target with their shares, without the floor of the smoothing."""
    if "gt_score" not in sample:
        return ""
    score = sample.gt_score.cpu()
    floor = 1.5 * float(score.min())
    best = score.topk(min(3, len(score)))
    return "\n".join(
        f"{value:.2f} {_name(label, classes)}"
        for value, label in zip(best.values.tolist(), best.indices.tolist())
        if value > floor
    )


def _pixels(image: Tensor, preprocessor: Any) -> np.ndarray:
    """Return an image as 8-bit pixels, with the normalisation undone.

    Shape:
        image [3, H, W] or [1, H, W]; returns [H, W, 3] uint8.
    """
    image = image.detach().float().cpu()
    mean, std = (getattr(preprocessor, name, None) for name in ("mean", "std"))
    if isinstance(mean, Tensor) and isinstance(std, Tensor):
        image = image * std.view(-1, 1, 1).float() + mean.view(-1, 1, 1).float()
    image = image.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return image.expand(-1, -1, 3).numpy() if image.shape[2] == 1 else image.numpy()


def describe(found: Browsing) -> str:
    """Return what was read and what the model gets, as text.

    Args:
        found: What `browse` returned.
    """
    rows = []
    for look in found.looks:
        sizes = dict.fromkeys(f"{view.shape[1]} x {view.shape[0]}" for view in look.fed)
        stored = "-" if look.original is None else "{1} x {0}".format(*look.original.shape)
        rows.append(
            (
                look.source or f"image {look.index}",
                look.label or "-",
                stored,
                ", ".join(sizes),
                look.target.replace("\n", ", ") or "-",
            )
        )
    header = ("image", "class", "stored px", "model gets px", "soft target")
    views = len(found.looks[0].fed)
    return "\n".join(
        [
            f"{found.split} data, {found.images} images: {' > '.join(found.steps)}",
            text_table(header, rows, left=5),
            f"{views} view{'s' * (views != 1)} per image; values that the model gets have mean "
            f"{found.mean:.3f} and standard deviation {found.std:.3f}",
        ]
    )


def draw(found: Browsing, path: str | Path) -> None:
    """Draw every image with what becomes of it.

    Args:
        found: What `browse` returned.
        path: Picture file to write; its folder is made.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    changed = any(_differs(look) for look in found.looks)
    blocks = [_lines(found.config, look, changed) for look in found.looks]
    lines = [line for block in blocks for line in block]
    columns = max(len(line.panels) for line in lines)
    # Images below each other share a column of text at the left.
    notes = max(
        1 + panel.note.count("\n") if panel.note else 0 for line in lines for panel in line.panels
    )
    # The first column holds text alone, so that narrow images do not move it.
    figure, axes = plt.subplots(
        len(lines),
        1 + columns,
        figsize=(1.75 * columns + 0.5, (1.85 + 0.18 * notes) * len(lines) + 0.5),
        width_ratios=[0.2] + [1.0] * columns,
        squeeze=False,
        layout=ConstrainedLayoutEngine(h_pad=0.07),
    )
    for number, (line, row) in enumerate(zip(lines, axes, strict=True)):
        for axis in row:
            axis.set_axis_off()
        weight = "bold" if number % len(blocks[0]) == 0 else "normal"
        row[0].text(
            0.5, 0.5, line.label, rotation=90, ha="center", va="center", fontsize=9, weight=weight
        )
        above = blocks[0][number % len(blocks[0])].panels
        for place, (axis, panel) in enumerate(zip(row[1:], line.panels)):
            # What stands above the first image holds for those below it.
            again = number >= len(blocks[0]) and panel.title == above[place].title
            _draw_panel(axis, panel, "" if again else panel.title)
    title = f"{found.split} data of {Path(found.config.filename).name}"
    if columns > 4:
        title += f": {' > '.join(found.steps)}"
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def _differs(look: Look) -> bool:
    """Whether the preprocessor does more than normalise."""
    return any(
        before.shape != after.shape or np.abs(before.astype(int) - after).max() > 1
        for before, after in zip(look.loaded, look.fed, strict=True)
    )


def _lines(config: Config, look: Look, changed: bool) -> list[Strip]:
    """Return the lines of the picture that belong to one image."""
    more = [
        strip
        for module in method_modules("browse").values()
        for strip in module.strips(config, look)
    ]
    name = "\n".join(part for part in (f"image {look.index}", look.label) if part)
    if look.geometry is not None:
        return _many_views(look, name, changed, more)
    line = [] if look.original is None else [Panel(_sized("stored", look.original), look.original)]
    line.append(Panel(_sized("after the pipeline", look.loaded[0]), look.loaded[0]))
    if changed:
        line.append(Panel(_sized("model gets", look.fed[0]), look.fed[0], note=look.target))
    else:
        line[-1].title = _sized("model gets", look.loaded[0])
        line[-1].note = look.target
    return [Strip(name, line + [panel for strip in more for panel in strip.panels])]


def _many_views(look: Look, name: str, changed: bool, more: list[Strip]) -> list[Strip]:
    """Return a line with source, boxes and views; one with their last colours; those of the method."""
    assert look.geometry is not None
    colours = view_colours(look.geometry.num_views)
    blank = Panel("", np.full((1, 1, 3), 255, dtype=np.uint8))
    first = blank
    if look.original is not None:
        height, width = look.source_size
        first = Panel(
            f"source {width} x {height}",
            look.original,
            draw=lambda axis: _boxes(axis, look, colours),
            size=look.source_size,
        )
    flips = look.geometry.flips[0].tolist()
    notes = ["mirrored" if flip else "" for flip in flips]
    panels = [
        Panel(_sized(f"view {number}", view), view, note, colour=colour)
        for number, (view, note, colour) in enumerate(zip(look.loaded, notes, colours), 1)
    ]
    lines = [Strip(name, [first, *panels])]
    if changed:
        panels = [Panel("", view, colour=colour) for view, colour in zip(look.fed, colours)]
        lines.append(Strip("after the\npreprocessor", [blank, *panels]))
    return lines + [Strip(strip.label, [blank, *strip.panels]) for strip in more]


def view_colours(views: int) -> list[Any]:
    """Return the colour of each view.

    Args:
        views: How many.
    """
    import matplotlib

    palette = matplotlib.colormaps["tab10"]
    return [palette(number % 10) for number in range(views)]


def _boxes(axis: Any, look: Look, colours: Sequence[Any]) -> None:
    from matplotlib.patches import Rectangle

    assert look.geometry is not None
    for number, box in enumerate(look.geometry.boxes[0].tolist()):
        top, left, height, width = box
        place = Rectangle(
            (left, top),
            width,
            height,
            fill=False,
            edgecolor=colours[number],
            linewidth=2,
            clip_on=False,
        )
        axis.add_patch(place)


def _sized(text: str, image: np.ndarray) -> str:
    return f"{text}\n{image.shape[1]} x {image.shape[0]} px"


def _draw_panel(axis: Any, panel: Panel, title: str) -> None:
    height, width = panel.size or panel.image.shape[:2]
    if panel.image.shape[:2] != (1, 1):
        axis.imshow(panel.image, extent=(0, width, height, 0), interpolation="nearest")
    if panel.draw is not None:
        panel.draw(axis)
    axis.set_axis_on()
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(panel.colour is not None)
        spine.set(edgecolor=panel.colour or "none", linewidth=2.5)
    axis.set_title(title, fontsize=8)
    axis.set_xlabel(panel.note, fontsize=8)
