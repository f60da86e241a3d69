"""Exporting parts of trained models to ONNX and torch.export, for use without this package.

An exported graph starts at pixels: its input `images` are RGB, float32 in 0 to 255, [B, 3, H, W] with any
B and the height and width of the config's test pipeline; the normalisation is part of it.

A method that has more to export than a classifier and its backbone has a module `export` in its package with
`exports(network)`, which returns, for a model of its own, name -> `Part`, or name -> a text that says why
it cannot be exported; for any other model it returns nothing. It goes before what is known for every model.

Letters: B images, H x W px, K classes, D width of a feature vector, N tokens, C channels.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import patchreg
from patchreg.models.base import PatchClassifier
from patchreg.registry import method_modules
from patchreg.runner.api import Model, features_of, load, pooled
from patchreg.runner.picture import TEST, ImageReader
from patchreg.utils.errors import ConfigError, UserError, did_you_mean
from patchreg.utils.files import write_through

FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
LARGEST = 1e-4
"""Difference to PyTorch, relative to the largest value of an output, above which an export is refused."""
FLIPS = 0.01
"""Share of the decisions (masks, boxes) that rounding may turn."""
_SIZES = (1, 5)
"""Images in the random batches of the check: a batch of any size has to work."""
_LARGEST_BATCH = 2**31 - 1
_REAL = 4
_ONNX_LIMIT = 2_000_000_000
"""Bytes of weights that fit into one ONNX file."""


@dataclass
class Part:
    """A part of a model that stands on its own.

    Args:
        about: What it is, in a few words.
        module: Takes normalised images and returns a tuple of tensors; in evaluation mode.
        outputs: Names of its outputs and what their dimensions are.
        reference: The same from the model's own functions, for the check.
        strict: Whether the code itself is traced first (Dynamo); False traces what runs, so that tables
            made beforehand are constants. Where one way fails the other is tried.
        decompositions: Operators of this project and what they are made of.

    Shape:
        module, reference: [B, 3, H, W] to tensors whose first dimension is B.
    """

    about: str
    module: nn.Module
    outputs: Mapping[str, str]
    reference: Callable[[Tensor], tuple[Tensor, ...]]
    strict: bool = True
    decompositions: Mapping[Any, Callable] = field(default_factory=dict)


@dataclass
class Difference:
    """How far an output of an exported graph is from PyTorch's.

    Args:
        name: The output.
        about: Its dimensions.
        dtype: Its type.
        largest: Largest absolute difference.
        scale: Largest absolute value.
        flipped: Share of the values that differ, of masks and integers.
    """

    name: str
    about: str
    dtype: str
    largest: float = 0.0
    scale: float = 0.0
    flipped: float = 0.0


class Logits(nn.Module):
    """Images to logits.

    Args:
        network: Model whose `tensor` mode gives logits.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Return the logits.

        Args:
            images: Normalised images.

        Shape:
            images [B, 3, H, W]; returns [B, K].
        """
        return (self.network(images),)


class Features(nn.Module):
    """Images to one vector each and, where the model has tokens, those.

    Args:
        network: Model that gives features.
        tokens: Whether to return the tokens too.
    """

    def __init__(self, network: Any, tokens: bool) -> None:
        super().__init__()
        self.network = network
        self.tokens = tokens

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the features.

        Args:
            images: Normalised images.

        Shape:
            images [B, 3, H, W]; returns [B, D] and [B, N, C].
        """
        if not self.tokens:
            return (features_of(self.network)(images),)
        found = self.network.extract(images)
        return pooled(self.network, found), found.tokens


class _FromPixels(nn.Module):
    """A part with the normalisation in front of it."""

    def __init__(self, network: Any, module: nn.Module) -> None:
        super().__init__()
        self.preprocessor = network.data_preprocessor
        self.module = module

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.module(normalised(self.preprocessor, images))


def normalised(preprocessor: Any, images: Tensor) -> Tensor:
    """Return images as a model takes them.

    Args:
        preprocessor: Its preprocessor; one that does not normalise passes them on.
        images: Pixels, 0 to 255.

    Shape:
        images [B, 3, H, W].
    """
    return preprocessor.normalise(images) if hasattr(preprocessor, "normalise") else images


def classifier_parts(network: Any, **settings: Any) -> dict[str, Part]:
    """Return a classifier as a whole and its backbone.

    Args:
        network: A dense classifier.
        settings: Further arguments of `Part`.
    """
    return {
        "model": Part(
            "images to logits",
            Logits(network),
            {"logits": "[B, classes]"},
            lambda images: (network(images),),
            **settings,
        ),
        "backbone": backbone_part(network, **settings),
    }


def backbone_part(network: Any, **settings: Any) -> Part:
    """Return what gives a model's features.

    Args:
        network: Model that gives features.
        settings: Further arguments of `Part`.
    """
    tokens = hasattr(network, "extract")
    outputs = {"feature": "[B, width]"} | ({"tokens": "[B, tokens, channels]"} if tokens else {})

    def reference(images: Tensor) -> tuple[Tensor, ...]:
        feature = features_of(network)(images)
        return (feature, network.extract(images).tokens) if tokens else (feature,)

    return Part("images to features", Features(network, tokens), outputs, reference, **settings)


def parts_of(network: Any) -> dict[str, Part | str]:
    """Return what can be exported of a model, and why the rest cannot.

    Args:
        network: The model.
    """
    found: dict[str, Part | str] = {}
    if isinstance(network, PatchClassifier):
        found |= classifier_parts(network)
    else:
        with contextlib.suppress(ConfigError):
            features_of(network)
            found["backbone"] = backbone_part(network)
    for module in method_modules("export").values():
        found |= module.exports(network)
    return found


def choose_part(network: Any, name: str | None) -> Part:
    """Return one part of a model.

    Args:
        network: The model.
        name: Its name, or None to learn which there are.

    Raises:
        ConfigError: There is none of this name, or it cannot be exported; says which can.
    """
    kind = type(network).__name__
    parts = parts_of(network)
    known = [f"{key} ({part.about})" for key, part in parts.items() if isinstance(part, Part)]
    can = f"; what can be exported: {', '.join(known)}" if known else ""
    part = parts.get(name) if name is not None else None
    if isinstance(part, str):
        raise ConfigError(f"--part {name} of {kind} cannot be exported: {part}{can}")
    if part is not None:
        return part
    if name is None:
        refused = [f"; not {key}: {why}" for key, why in parts.items() if isinstance(why, str)]
        raise ConfigError(f"name a part of {kind} with --part{can}{''.join(refused)}")
    near = did_you_mean(name, parts)
    raise ConfigError(f"{kind} has no part '{name}' to export.{near}{can}")


def export_file(
    config: str,
    checkpoint: str | None,
    part: str | None,
    out: str,
    kind: str,
    *,
    options: Mapping[str, Any] | None = None,
) -> str:
    """Export a part of a trained model and check it against PyTorch; write all or nothing.

    Args:
        config: Config file or its name.
        checkpoint: Checkpoint, folder of a run, or None for the one that ships with the config.
        part: Name of the part.
        out: File to write.
        kind: `onnx` or `torch`.
        options: Overrides by dotted key.

    Returns:
        What was written and how far it is from PyTorch.

    Raises:
        ConfigError: The part or the file cannot be as asked, a package is missing, or the graph does not
            give what PyTorch gives.
        UserError: Config or checkpoint cannot be used.
    """
    if Path(out).suffix != FORMATS[kind]:
        raise ConfigError(f"--out '{out}': a {kind} file ends in {FORMATS[kind]}")
    if not Path(out).absolute().parent.is_dir() or Path(out).is_dir():
        raise ConfigError(f"--out '{out}': expected a file in a folder that exists; make it first")
    if kind == "onnx":
        _needs("onnx", "onnxscript")
    model = load(config, checkpoint, device="cpu", options=options)
    chosen = choose_part(model.network, part)
    batches, seen = pixel_batches(model)
    with torch.no_grad():
        # Also fills what is counted and tabulated once, which does not belong into the graph.
        expected = [_reference(model.network, chosen, images) for images in batches]
        captured = capture(model.network, chosen, batches[-1])
    height, width = batches[0].shape[2:]
    facts = dict(
        part=f"{part} ({chosen.about}) of {type(model.network).__name__}",
        config=str(model.config.filename),
        checkpoint=str(model.checkpoint),
        images=f"float32 RGB, 0 to 255, [B, 3, {height}, {width}]",
        outputs=dict(chosen.outputs),
        classes=list(model.classes),
        patchreg=patchreg.__version__,
    )
    lines: list[str] = []

    def write(path: str) -> None:
        if kind == "torch":
            torch.export.save(captured, path, extra_files={"patchreg.json": json.dumps(facts)})
            run: Callable[[Tensor], Sequence[Any]] | None = _torch_runner(path)
        else:
            save_onnx(captured, chosen, facts, path)
            run = _onnx_runner(path)
        if run is None:
            lines.append("not checked: onnxruntime is not installed (pip install onnxruntime)")
            return
        found = compare_outputs(run, chosen, batches, expected)
        refuse_far(found, out)
        lines.extend(_table(found))
        lines.append(f"checked against PyTorch on {seen}, batches of 1 to {max(_SIZES)}")

    write_through(out, write)
    size = os.path.getsize(out) / 1e6
    head = f"{facts['part']} -> {out} ({size:.1f} MB); images: {facts['images']}"
    return "\n".join([head, *lines])


def pixel_batches(model: Model) -> tuple[list[Tensor], str]:
    """Return batches of images as exported graphs take them: random ones, and real ones where there are.

    Args:
        model: Model whose test pipeline says how large they are.

    Returns:
        The batches, the largest random one last, and what they are.

    Shape:
        Batches [B, 3, H, W] float32 in 0 to 255.
    """
    reader = ImageReader(model.config, getattr(model.network, "img_size", None))
    generator = np.random.default_rng(0)
    probe = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    _, height, width = next(reader.read(probe))["inputs"].shape
    batches = []
    for count in _SIZES:
        # Noise at two scales: pixels alone would look the same to every network.
        coarse = torch.from_numpy(generator.random((count, 3, 5, 5), dtype=np.float32))
        coarse = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
        fine = torch.from_numpy(generator.random((count, 3, height, width), dtype=np.float32))
        batches.append((255 * (0.7 * coarse + 0.3 * fine)).round())
    seen = f"{sum(_SIZES)} random images"
    with contextlib.suppress(UserError):
        real = torch.stack([item["inputs"] for item in reader.read(TEST, _REAL)]).float()
        if real.shape[1:] == batches[0].shape[1:]:
            batches.insert(0, real)
            seen += f" and {len(real)} of the test set"
    return batches, seen


def _reference(network: Any, part: Part, images: Tensor) -> tuple[Tensor, ...]:
    return part.reference(normalised(network.data_preprocessor, images))


def capture(network: Any, part: Part, images: Tensor) -> torch.export.ExportedProgram:
    """Capture a part, from pixels to its outputs, with any number of images.

    Args:
        network: The model it belongs to.
        part: The part.
        images: Pixels, more than one image.

    Shape:
        images [B, 3, H, W].

    Raises:
        ConfigError: torch.export cannot capture it.
    """
    module = _FromPixels(network, part.module).eval()
    # Without a largest size, torch 2.6 holds the batch against the largest integer and refuses it.
    dynamic = {"images": {0: torch.export.Dim("batch", max=_LARGEST_BATCH)}}
    with _told_briefly(part.about, "torch.export"), torch.no_grad():
        try:
            captured = torch.export.export(
                module, (images,), dynamic_shapes=dynamic, strict=part.strict
            )
        except Exception:
            # Dynamo does not know all of Python, and what runs may turn the batch into a number.
            captured = torch.export.export(
                module, (images,), dynamic_shapes=dynamic, strict=not part.strict
            )
        if part.decompositions:
            captured = captured.run_decompositions(dict(part.decompositions))
    return captured


def save_onnx(
    captured: torch.export.ExportedProgram, part: Part, facts: Mapping[str, Any], path: str
) -> None:
    """Write a captured part as one ONNX file.

    Args:
        captured: What `capture` returned.
        part: The part.
        facts: Goes into the file's metadata.
        path: File to write.

    Raises:
        ConfigError: It is too large for one file, or ONNX has no operator for a step of it.
    """
    weights = sum(value.numel() * value.element_size() for value in captured.state_dict.values())
    if weights > _ONNX_LIMIT:
        raise ConfigError(
            f"{weights / 1e9:.1f} GB of weights do not fit into one ONNX file; use --format torch"
        )
    with _told_briefly(part.about, "ONNX"):
        program: Any = torch.onnx.export(
            captured,
            (),
            input_names=["images"],
            output_names=list(part.outputs),
            dynamo=True,
            verbose=False,
        )
        if hasattr(program, "rename_axes"):
            program.rename_axes({program.model.graph.inputs[0].shape[0]: "batch"})
        for key, value in facts.items():
            text = value if isinstance(value, str) else json.dumps(value)
            program.model.metadata_props[key] = text
        program.save(path, external_data=False)


def _torch_runner(path: str) -> Callable[[Tensor], Sequence[Any]]:
    graph = torch.export.load(path).module()
    return lambda images: [value.detach().numpy() for value in graph(images)]


def _onnx_runner(path: str) -> Callable[[Tensor], Sequence[Any]] | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})


def compare_outputs(
    run: Callable[[Tensor], Sequence[Any]],
    part: Part,
    batches: Sequence[Tensor],
    expected: Sequence[tuple[Tensor, ...]],
) -> list[Difference]:
    """Compare an exported graph with PyTorch.

    Args:
        run: Runs the graph; returns arrays.
        part: The part.
        batches: Pixels.
        expected: What PyTorch gives for each batch.

    Returns:
        One entry per output.
    """
    found = [
        Difference(name, about, str(value.dtype).removeprefix("torch."))
        for (name, about), value in zip(part.outputs.items(), expected[0], strict=True)
    ]
    different, values = [0] * len(found), [0] * len(found)
    for images, wanted in zip(batches, expected, strict=True):
        for number, (got, want) in enumerate(zip(run(images), wanted, strict=True)):
            one, right = found[number], want.detach().double()
            if tuple(got.shape) != tuple(want.shape):
                raise ConfigError(
                    f"the exported graph gives {one.name} of shape {tuple(got.shape)}, PyTorch "
                    f"{tuple(want.shape)}"
                )
            gap = (torch.from_numpy(np.asarray(got)).double() - right).abs()
            # NumPy's maximum, unlike Python's, does not pass over NaN.
            one.largest = float(np.maximum(one.largest, gap.max().item()))
            one.scale = float(np.maximum(one.scale, right.abs().max().item()))
            different[number] += int((gap != 0).sum())
            values[number] += gap.numel()
    for one, count, total in zip(found, different, values):
        one.flipped = count / total
    return found


def _decides(one: Difference) -> bool:
    # Boxes are whole numbers that follow from the windows chosen.
    return one.dtype.startswith(("bool", "int")) or one.name == "boxes"


def refuse_far(found: Sequence[Difference], out: str) -> None:
    """Refuse an export that is too far from PyTorch.

    Args:
        found: What `compare_outputs` returned.
        out: The file, for the message.

    Raises:
        ConfigError: Names the output and how far it is.
    """
    for one in found:
        if _decides(one):
            far = not one.flipped <= FLIPS
            text = f"{one.flipped:.1%} of its values differ"
        else:
            far = not one.largest <= LARGEST * one.scale
            text = f"it differs by {one.largest:.3g}, its largest value being {one.scale:.3g}"
        if far:
            raise ConfigError(
                f"'{out}' was not written: its output '{one.name}' is not what PyTorch gives, {text}"
            )


def _table(found: Sequence[Difference]) -> list[str]:
    rows = []
    for one in found:
        text = f"largest difference {one.largest:.1e}, of the largest value "
        text += f"{one.largest / one.scale if one.scale else 0.0:.1e}"
        if _decides(one):
            text = f"{one.flipped:.2%} of the values differ"
        rows.append((one.name, one.about, one.dtype, text))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)) + f"  {row[3]}"
        for row in rows
    ]


def _needs(*packages: str) -> None:
    import importlib.util

    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"ONNX files need {' and '.join(missing)}: pip install onnx onnxscript onnxruntime (or "
            "'patchreg[export]'); or write a file for PyTorch with --format torch"
        )


@contextlib.contextmanager
def _told_briefly(about: str, what: str) -> Iterator[None]:
    """Turn the pages that exporters print on a failure into one message, and keep their chatter quiet."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:
        if os.environ.get("PATCHREG_TRACEBACK") == "1":
            raise
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ConfigError(
            f"this part ({about}) cannot be captured by {what}: {type(error).__name__}: {reason[:300]} "
            "(PATCHREG_TRACEBACK=1 shows where)"
        ) from error
    finally:
        logger.setLevel(level)
