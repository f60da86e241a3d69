"""Broken inputs of every kind, drawn at random, and what the project may do with them.

A kind is a function `(random, folder) -> str` that draws one input, gives it to the project and returns
`accepted` or `refused`; anything else than acceptance or a message for people raises. Whatever the input
holds, no code of it may run and no file may be written outside `folder`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from PIL import Image

from patchreg.datasets.fmow import FMoWDataset
from patchreg.datasets.image_files import CSVImageDataset
from patchreg.datasets.prepare.imagenet import read_val_labels
from patchreg.models.preprocessor import ImagePreprocessor
from patchreg.registry import MODELS
from patchreg.runner.checkpoint import check_file, load_state
from patchreg.runner.run import train
from patchreg.transforms.loading import LoadImage
from patchreg.utils.errors import UserError
from patchreg.utils.weights import load_file, state_dict_of

ROOT = Path(__file__).resolve().parent.parent
SENTINEL = "CODE_OF_A_CHECKPOINT_RAN"


def outcome(call: Callable[[], Any]) -> str:
    """Accept a result or a message for people, and nothing else."""
    said = None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            call()
    except UserError as error:
        said = str(error)
    if said is None:
        return "accepted"
    assert said.strip(), "an error without a word"
    assert "Traceback" not in said
    return "refused"


ODD: list[Any] = [
    None, -1, 0, 1, 3.5, -0.1, 1e9, float("nan"), float("inf"), True, "", "x", "64", [], [1], ["a", 2], {},
    {"type": "Nothing"}, {"type": 3}, {"a": 1}, 10**30, "../../outside", "\x00",
]  # fmt: skip


@cache
def leaves() -> list[Config]:
    """Every experiment that is shipped, as a plain dict."""
    paths = sorted(
        path
        for path in (ROOT / "configs").glob("*/*.py")
        if not path.name.startswith("_") and path.parent.name != "_base_"
    )
    return [Config.fromfile(path, import_custom_modules=False) for path in paths]


def nodes(value: Any, found: list | None = None) -> list[tuple[Any, Any]]:
    """All (container, key) pairs of nested dicts and lists."""
    found = [] if found is None else found
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(pairs):
        found.append((value, key))
        if isinstance(item, (dict, list)):
            nodes(item, found)
    return found


def config(draws: random.Random, folder: Path) -> str:
    """A shipped config with one to three values replaced, removed, added or misspelt."""
    tree = copy.deepcopy(draws.choice(leaves()).to_dict())
    for _ in range(draws.randint(1, 3)):
        places = nodes(tree)
        if not places:
            break
        container, key = draws.choice(places)
        what = draws.choice(["replace", "remove", "misspell", "add", "other type"])
        if what == "replace" or not isinstance(container, dict):
            container[key] = copy.deepcopy(draws.choice(ODD))
        elif what == "remove":
            del container[key]
        elif what == "misspell":
            position = draws.randrange(len(key) + 1)
            container[key[:position] + draws.choice("aeio_xz") + key[position:]] = container.pop(
                key
            )
        elif what == "add":
            container[draws.choice(["extra", "type", "lr", "_x"])] = copy.deepcopy(
                draws.choice(ODD)
            )
        elif isinstance(container.get("type"), str):
            container["type"] = draws.choice(
                [
                    container["type"][:-1],
                    container["type"] + "s",
                    "Linear",
                    "mmpretrain.",
                    ".x",
                    "os.system",
                ]
            )
    path = folder / "config.py"
    path.write_text("\n".join(f"{key} = {_literal(value)}" for key, value in tree.items()))
    return outcome(lambda: train(str(path), work_dir=str(folder / "run"), dry_run=True))


def _literal(value: Any) -> str:
    text = repr(value)
    return text.replace("nan", "float('nan')").replace("inf,", "float('inf'),")


def config_text(draws: random.Random, folder: Path) -> str:
    """A config file whose text is damaged."""
    path = draws.choice(sorted((ROOT / "configs/dge").glob("*.py")))
    text = (
        path.read_text().replace('"./', f'"{path.parent}/').replace('"../', f'"{path.parent}/../')
    )
    for _ in range(draws.randint(1, 4)):
        position = draws.randrange(len(text))
        length = draws.choice([1, 1, 5, 80])
        text = (
            text[:position]
            + draws.choice(["", "(", '"', "\n", "\x00", "é", "=", "]"])
            + text[position + length :]
        )
    damaged = folder / "config.py"
    damaged.write_bytes(text.encode())
    return outcome(lambda: train(str(damaged), work_dir=str(folder / "run"), dry_run=True))


CELLS = ["0", "1", "61", "62", "-1", "99999999999999999999", "1.5", "nan", "", "cat", "label", "path", "a.png",
         "../b.png", "/etc/passwd", "a b", '"', "'", ";", "é", "\x00", "#", "x" * 5000]  # fmt: skip


def table(draws: random.Random, folder: Path) -> str:
    """A CSV table with odd cells, delimiters, line ends and encodings."""
    comma = draws.choice([",", ",", ",", ";", "\t"])
    end = draws.choice(["\n", "\r\n", "\r"])
    rows = [
        draws.choice([["path", "label"], ["label"], ["Path", "Label"], ["path", "label", "x"], []])
    ]
    rows += [
        [draws.choice(CELLS) for _ in range(draws.choice([2, 2, 2, 1, 3]))]
        for _ in range(draws.randint(0, 6))
    ]
    text = end.join(comma.join(row) for row in rows)
    name = draws.choice(["table.csv", "table.csv", "LOC_val_solution.csv", "labels.txt"])
    path = folder / name
    path.write_bytes(text.encode(draws.choice(["utf-8", "utf-8", "latin-1", "utf-16"])))
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    call = draws.choice(
        [
            lambda: CSVImageDataset(str(path), str(folder))[0],
            lambda: FMoWDataset(str(path), str(folder))[0],
            lambda: read_val_labels(path),
        ]
    )
    return outcome(call)


def image(draws: random.Random, folder: Path) -> str:
    """A picture file: odd modes and sizes, several frames, cut, flipped bits, a bomb, no picture."""
    kind = draws.choice(["mode", "frames", "bomb", "noise", "text"])
    form = draws.choice(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
    buffer = io.BytesIO()
    if kind == "bomb":
        side = draws.choice([20000, 65535, 2**31 - 1])
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        buffer.write(
            b"\x89PNG\r\n\x1a\n"
            + _chunk(b"IHDR", header)
            + _chunk(b"IDAT", b"x")
            + _chunk(b"IEND", b"")
        )
    elif kind == "noise":
        buffer.write(draws.randbytes(draws.choice([0, 1, 10, 1000])))
    elif kind == "text":
        buffer.write(
            draws.choice(
                [b"P6 9999999 9999999 255\n", b"GIF89a", b"<svg/>", b"BM", b"II*\x00", b"RIFF"]
            )
        )
    else:
        mode = draws.choice(
            ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F", "LAB"]
        )
        size = (draws.choice([1, 2, 7, 300]), draws.choice([1, 3, 300]))
        picture = Image.new(mode, size)
        more = [Image.new(mode, size) for _ in range(3)] if kind == "frames" else []
        try:
            picture.save(
                buffer, form, **({"save_all": True, "append_images": more} if more else {})
            )
        except (OSError, ValueError, KeyError, TypeError):  # the format does not know the mode
            Image.new("RGB", size).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    damage = draws.choice(["none", "cut", "flip"])
    if damage == "cut" and content:
        content = content[: draws.randrange(len(content))]
    elif damage == "flip" and content:
        for _ in range(draws.choice([1, 8])):
            content[draws.randrange(len(content))] = draws.randrange(256)
    path = folder / f"picture.{draws.choice(['png', 'jpg', 'gif', 'tif'])}"
    path.write_bytes(bytes(content))

    def read() -> None:
        found = LoadImage(apply_orientation=draws.choice([True, False]))({"img_path": str(path)})[
            "img"
        ]
        assert found.ndim == 3
        assert found.shape[2] == 3
        assert found.dtype == np.uint8

    return outcome(read)


def _chunk(name: bytes, data: bytes) -> bytes:
    import zlib

    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


class Payload:
    """An object whose unpickling would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@cache
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return MODELS.build(
        dict(
            type="PatchClassifier",
            backbone=dict(
                type="VisionTransformerBackbone",
                arch=dict(embed_dims=8, depth=1, num_heads=2),
                img_size=8,
                patch_size=4,
            ),
            head=dict(type="LinearHead", num_classes=3, in_channels=8),
        )
    )


def checkpoint(draws: random.Random, folder: Path) -> str:
    """A weight file: wrong values, missing keys, code in a pickle, absurd headers, damaged bytes."""
    state: dict[str, Any] = {key: value.clone() for key, value in network().state_dict().items()}
    for _ in range(draws.randint(0, 3)):
        key = draws.choice(sorted(state))
        odd = [torch.zeros(1), torch.zeros(0), None, "text", 3, [1, 2], {"a": torch.ones(2)}]
        odd += [torch.ones(2, dtype=torch.bool), torch.full((3, 8), float("nan"))]
        state[key] = draws.choice(odd)
        if draws.random() < 0.3:
            state[draws.choice([key + "x", "", "\x00", "a" * 500])] = state.pop(key)
        if draws.random() < 0.3 and len(state) > 1:
            del state[draws.choice(sorted(state))]
    kind = draws.choice(
        ["plain", "wrapped", "code", "pickle", "zip", "safetensors", "header", "other"]
    )
    path = folder / ("weights.safetensors" if kind in ("safetensors", "header") else "weights.pth")
    trap = folder / SENTINEL
    if kind in ("plain", "wrapped"):
        torch.save(
            state if kind == "plain" else {"state_dict": state, "meta": draws.choice(ODD)}, path
        )
    elif kind == "code":
        torch.save({"state_dict": state, "args": Payload(trap)}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Payload(trap)}, protocol=draws.randint(0, 5)))
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(
                draws.choice(["archive/data.pkl", "../data.pkl", "x"]), pickle.dumps(Payload(trap))
            )
            archive.writestr("archive/version", "3")
    elif kind == "safetensors":
        from safetensors.torch import save_file

        save_file(
            {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}, path
        )
    elif kind == "header":
        entry = {
            "dtype": draws.choice(["F32", "F999", 3]),
            "shape": draws.choice([[2], [-1], [2**62, 2**62], "x"]),
            "data_offsets": draws.choice([[0, 8], [8, 0], [0, 2**63], [-1, 8]]),
        }
        header = json.dumps({draws.choice(["a", "__metadata__"]): entry}).encode()
        length = draws.choice([len(header), 2**60, 2**63, 0, 10**8])
        path.write_bytes(struct.pack("<Q", length) + header + bytes(8))
    else:
        torch.save(
            draws.choice([[1, 2], torch.zeros(3), None, "text", 5, {}, {"state_dict": None}]), path
        )
    content = bytearray(path.read_bytes())
    damage = draws.choice(["none", "none", "cut", "flip"])
    if damage == "cut":
        content = content[: draws.randrange(len(content))]
    elif damage == "flip":
        content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
    path.write_bytes(bytes(content))

    def read() -> None:
        check_file(path)
        found = state_dict_of(load_file(path), str(path))
        load_state(copy.deepcopy(network()), found, str(path), strict=draws.choice([True, False]))

    return outcome(read)


def labels(draws: random.Random, folder: Path) -> str:
    """A table whose labels lie outside the classes of the model, or are no numbers, up to the loss."""
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    cells = draws.choice(
        [
            ["0", "1", "2"],
            ["0", "1", "2", "3"],
            ["0", "2", "-1"],
            ["1", "1.5"],
            ["7"],
            ["cat", "dog"],
        ]
    )
    path = folder / "table.csv"
    rows = "".join(f"a.png,{draws.choice(cells)}\n" for _ in range(draws.randint(1, 6)))
    path.write_text("path,label\n" + rows)
    classes = draws.choice([None, None, ["a", "b"], ["cat", "dog", "cow"], list("abcdefgh")])

    def read() -> None:
        data = CSVImageDataset(
            str(path), str(folder), classes=classes, pipeline=[dict(type="LoadImage")]
        )
        prepared = ImagePreprocessor(mean=(0, 0, 0), std=(255, 255, 255), num_classes=3)
        samples = [data[index] for index in range(len(data))]
        batch = prepared(
            dict(
                inputs=[torch.as_tensor(sample["img"]).permute(2, 0, 1) for sample in samples],
                data_samples=[_sample(int(sample["gt_label"])) for sample in samples],
            ),
            training=True,
        )
        loss = network()(**batch, mode="loss")["loss_cls"]
        assert torch.isfinite(loss)

    return outcome(read)


def _sample(label: int) -> Any:
    from mmpretrain.structures import DataSample

    return DataSample().set_gt_label(label)


KINDS: dict[str, Callable[[random.Random, Path], str]] = {
    "config": config,
    "config text": config_text,
    "CSV table": table,
    "image": image,
    "checkpoint": checkpoint,
    "labels": labels,
}
