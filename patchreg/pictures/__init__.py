"""Pictures: what `tools/visualize.py` draws.

A module here, or the module `picture` of a method, offers `HELP` (kind of picture -> one line),
`add_arguments(kind, parser)` and `run(kind, arguments) -> str`, which returns what to print. A module here
whose name starts with an underscore is a part of others.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

from patchreg.registry import method_modules
from patchreg.utils.errors import ConfigError

IMAGE_HELP = "image file, folder of images, or 'test' for the config's test set"
_SUFFIXES = (".png", ".pdf", ".svg", ".jpg")


def pictures() -> dict[str, ModuleType]:
    """Return the module that draws each kind of picture, by kind."""
    shared = (item.name for item in pkgutil.iter_modules(__path__))
    modules = [
        importlib.import_module(f"{__name__}.{name}") for name in shared if not name.startswith("_")
    ]
    found: dict[str, ModuleType] = {}
    for module in (*modules, *method_modules("picture").values()):
        found |= dict.fromkeys(module.HELP, module)
    return dict(sorted(found.items()))


def add_model_arguments(
    parser: argparse.ArgumentParser, out: str, count: int = 8, config_help: str | None = None
) -> None:
    """Add images, config, checkpoint, picture to write and number of images to a command line.

    Args:
        parser: Where to add them.
        out: Picture that is written unless another is named.
        count: How many images at most unless told.
        config_help: What config is expected, if not any will do.
    """
    parser.add_argument("image", help=IMAGE_HELP)
    parser.add_argument("config", help=config_help)
    add_checkpoint_argument(parser)
    parser.add_argument("--out", default=out, help="picture to write")
    parser.add_argument(
        "--count", type=int, default=count, help=f"how many images at most (default {count})"
    )


def add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint to a command line; the one that ships with the config need not be named.

    Args:
        parser: Where to add it.
    """
    parser.add_argument(
        "checkpoint",
        nargs="?",
        help="checkpoint, or folder of a run for its newest one (default: the one that ships)",
    )


def check_out(path: str, suffixes: tuple[str, ...] = _SUFFIXES) -> None:
    """Refuse a picture file that cannot be written as asked.

    Args:
        path: Picture to write.
        suffixes: Endings that are known.

    Raises:
        ConfigError: Its name has another ending.
    """
    if Path(path).suffix.lower() not in suffixes:
        known = ", ".join(suffixes[:-1]) + (" or " if len(suffixes) > 1 else "") + suffixes[-1]
        raise ConfigError(f"--out '{path}': expected a file ending in {known}")
