"""What there is to choose from: every config with its cost and figures, every class with its arguments."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import init_default_scope

from patchreg import registry
from patchreg.registry import MODELS, StageRegistry
from patchreg.runner.build import load_config
from patchreg.runner.rehearsal import model_spec, without_data
from patchreg.runner.strict import INJECTED, accepted
from patchreg.utils.errors import ConfigError, MissingFileError, UserError
from patchreg.utils.files import write_safely

PUBLISHED = "published, not reproduced"
MEASURED = "measured"
_REMEDY = "run python tools/zoo.py and commit what it writes"
_ROLES = (
    ("Preprocessors", ("Preprocessor",)),
    ("Backbones", ("Backbone",)),
    ("Heads", ("Head",)),
    ("Selectors", ("Selector",)),
    ("Losses", ("Loss",)),
    ("Models", ("",)),
)
_TITLES: dict[str, str] = {
    "DATASETS": "Data sets",
    "DATA_SAMPLERS": "Samplers: the order of images",
    "TRANSFORMS": "Transforms",
    "MODELS": "",
    "MODEL_WRAPPERS": "Wrappers of models",
    "OPTIMIZERS": "Optimisers",
    "OPTIM_WRAPPERS": "Wrappers of optimisers",
    "OPTIM_WRAPPER_CONSTRUCTORS": "Who makes optimisers from a config",
    "PARAM_SCHEDULERS": "Schedules",
    "LOOPS": "Loops",
    "HOOKS": "Hooks",
    "METRICS": "Metrics",
    "VISUALIZERS": "Visualizers",
    "VISBACKENDS": "Backends of visualizers",
}
"""Registries in the order in which data flows, with their headings."""


def pages() -> dict[str, str]:
    """Return the generated pages by their path: `docs/zoo.md` and `docs/configs.md`.

    Raises:
        UserError: A metafile is wrong.
    """
    return {"docs/zoo.md": zoo(), "docs/configs.md": reference()}


def write() -> list[str]:
    """Write the generated pages and return their paths.

    Raises:
        UserError: A metafile is wrong.
    """
    found = pages()
    Path("docs").mkdir(exist_ok=True)
    for path, text in found.items():
        write_safely(path, text.encode())
    return list(found)


def check() -> None:
    """Check metafiles against configs and models, and the generated pages against both.

    Raises:
        UserError: Something differs; says what.
    """
    check_metafiles()
    for path, text in pages().items():
        if not os.path.isfile(path):
            raise MissingFileError(f"'{path}' does not exist; {_REMEDY}")
        if Path(path).read_text(encoding="utf-8") != text:
            raise ConfigError(f"'{path}' is older than the configs and classes it lists; {_REMEDY}")


def leaves() -> list[str]:
    """Return the configs that can be run, by folder and name."""
    found = Path("configs").glob("*/*.py")
    return sorted(
        path.as_posix()
        for path in found
        if not path.parts[1].startswith("_") and path.name[0] != "_"
    )


def metafiles() -> dict[str, dict[str, Any]]:
    """Return the entry of each config in the metafiles, by config.

    Raises:
        ConfigError: A metafile cannot be read, or two entries name one config.
    """
    import yaml

    found: dict[str, dict[str, Any]] = {}
    for path in sorted(Path("configs").glob("*/metafile.yml")):
        try:
            entries = yaml.safe_load(path.read_text(encoding="utf-8"))["Models"]
            named = {entry["Config"]: dict(entry, file=path.as_posix()) for entry in entries}
        except (yaml.YAMLError, KeyError, TypeError) as error:
            raise ConfigError(
                f"'{path}' is no list of Models, each with a Config: {error!r}"
            ) from error
        if len(named) < len(entries) or set(named) & set(found):
            raise ConfigError(f"'{path}' names a config twice")
        found |= named
    return found


def check_metafiles() -> None:
    """Check that the metafiles name every config once, and the numbers of parameters that its model has.

    Raises:
        MissingFileError: A metafile names a config or weights that do not exist.
        ConfigError: A config is in no metafile, or has another number of parameters.
    """
    entries = metafiles()
    for config, entry in entries.items():
        for file in (config, entry.get("Weights")):
            if file and not os.path.isfile(file):
                raise MissingFileError(f"{entry['file']}: '{file}' does not exist")
    for config in leaves():
        if config not in entries:
            file = Path(config).parent / "metafile.yml"
            raise ConfigError(f"'{config}' is in no metafile; add it to {file}")
        told = (entries[config].get("Metadata") or {}).get("Parameters")
        count = parameters(config)
        if told != count:
            right = "no Parameters (it has stages)" if count is None else f"Parameters: {count}"
            raise ConfigError(
                f"{entries[config]['file']}: '{config}' says Parameters: {told}, but its model has {right}"
            )


def parameters(path: str) -> int | None:
    """Return how many parameters the model of a config has, all its parts together; None for stages.

    Args:
        path: Config file.

    Raises:
        UserError: The config is wrong.
    """
    config = load_config(path, moved={"work_dirs": "work_dirs"})
    if "stages" in config:
        return None
    return sum(value.numel() for value in _model(config).parameters())


def _model(config: Config) -> Any:
    init_default_scope(config.get("default_scope", "patchreg"))
    spec = model_spec(config)
    try:
        with without_data():
            return MODELS.build(spec)
    except UserError:
        raise
    except Exception:
        return MODELS.build(spec)


def zoo() -> str:
    """Return the table of all configs, with links from `docs/`.

    Raises:
        ConfigError: A metafile cannot be read.
    """
    lines = [
        "# All configs",
        "",
        "Written by `python tools/zoo.py` from `configs/*/metafile.yml`; `--check` counts parameters again.",
        f'"{PUBLISHED}": a figure of the authors, of a training that was not repeated here.',
        f'"{MEASURED}": by this project, with the command at the head of the config; the page of the',
        "method tells machine and seeds. Parameters are those of all parts of the model (student and teacher,",
        "policy and classifiers); MACs are multiply-accumulates of one image at the config's size, of the",
        "dense twin where patches are chosen.",
    ]
    entries = metafiles()
    groups: dict[str, list[dict[str, Any]]] = {}
    for config in sorted(entries):
        groups.setdefault(Path(config).parts[1], []).append(entries[config])
    for method, rows in groups.items():
        page = f"../configs/{method}/README.md"
        title = f"[{method}]({page})" if os.path.isfile(f"configs/{method}/README.md") else method
        lines += [
            "",
            f"## {title}",
            "",
            "| config | parameters | MACs | weights | figures |",
            "|---|---|---|---|---|",
        ]
        for entry in rows:
            facts, weights = entry.get("Metadata") or {}, entry.get("Weights")
            cells = [
                f"[{Path(entry['Config']).stem}](../{entry['Config']})",
                _count(facts.get("Parameters")),
                _count(facts.get("Dense MACs", facts.get("MACs"))),
                f"[{Path(weights).name}](../{weights})" if weights else "",
                "; ".join(_result(result) for result in entry.get("Results") or []),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _count(number: Any) -> str:
    if not isinstance(number, (int, float)):
        return ""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _result(result: Mapping[str, Any]) -> str:
    figures = ", ".join(f"{name} {value}" for name, value in result["Metrics"].items())
    source = str(result.get("Source", ""))
    label = source if source.startswith(MEASURED) else f"{PUBLISHED}: {source}"
    return f"{figures} on {result['Dataset']} ({label})"


def classes() -> Iterator[tuple[str, type]]:
    """Yield every class of this project that a config can name, with the heading it belongs under."""
    registry.discover()
    for name, title in _TITLES.items():
        kind: StageRegistry = getattr(registry, name)
        found = [
            built
            for _, built in sorted(kind.module_dict.items())
            if inspect.isclass(built) and _is_ours(built.__module__)
        ]
        if name != "MODELS":
            yield from ((title, built) for built in found)
            continue
        for role, endings in _ROLES:
            mine = [built for built in found if built.__name__.endswith(endings)]
            found = [built for built in found if built not in mine]
            yield from ((role, built) for built in mine)


def _is_ours(module: str) -> bool:
    return module.startswith("patchreg.") and not module.startswith("patchreg.benchmarks")


def reference() -> str:
    """Return the page of all classes with their arguments, types, defaults and meaning, for `docs/`."""
    lines = [
        "# What a config can name",
        "",
        "Written by `python tools/zoo.py` from the registries, in the order in which data flows. `type` is the",
        "name of a class; the other keys are its arguments. Classes of other packages are named with their",
        "scope: `mmpretrain.RandAugment`.",
        "",
    ]
    body: list[str] = []
    titles: list[str] = []
    for title, built in classes():
        if title not in titles:
            titles.append(title)
            body += ["", f"## {title}"]
        body += ["", *_entry(built)]
    lines += [f"* [{title}](#{anchor(title)})" for title in titles]
    return "\n".join([*lines, *body]) + "\n"


def anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading.

    Args:
        heading: Text of the heading.
    """
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")


def _entry(built: type) -> list[str]:
    file = built.__module__.replace(".", "/") + ".py"
    purpose = (inspect.getdoc(built) or "").split("\n\n", 1)[0].replace("\n", " ")
    lines = [f"### {built.__name__}", "", f"{purpose} [{file}](../{file})"]
    kinds = [kind for kind in vars(registry).values() if isinstance(kind, StageRegistry)]
    injected: set[str] = set()
    for kind in kinds:
        if kind.module_dict.get(built.__name__) is built:
            injected |= INJECTED.get(kind.name, set())
    meaning = _meanings(built)
    rows = []
    for name, parameter in accepted(built)[0].items():
        if name in injected or parameter.kind is parameter.VAR_POSITIONAL:
            continue
        needed = parameter.default is parameter.empty
        cells = (
            f"`{name}`",
            "" if parameter.annotation is parameter.empty else f"`{_type(parameter.annotation)}`",
            "needed" if needed else f"`{parameter.default!r}`",
            meaning.get(name, ""),
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    if rows:
        lines += ["", "| argument | type | default | meaning |", "|---|---|---|---|", *rows]
    return lines


def _type(annotation: Any) -> str:
    if isinstance(annotation, str):
        return annotation
    return getattr(annotation, "__name__", None) or str(annotation)


def _meanings(built: type) -> dict[str, str]:
    """Return what the docstrings of a class and its bases say about each argument."""
    found: dict[str, str] = {}
    for base in built.__mro__:
        for source in (base.__doc__, getattr(base.__dict__.get("__init__"), "__doc__", None)):
            for name, text in arguments_of(source or "").items():
                found.setdefault(name, text)
    return found


def arguments_of(docstring: str) -> dict[str, str]:
    """Return the entries of the section `Args:` of a Google-style docstring.

    Args:
        docstring: As written in the file.
    """
    lines = inspect.cleandoc(docstring).splitlines()
    if "Args:" not in lines:
        return {}
    found: dict[str, str] = {}
    name = ""
    for line in lines[lines.index("Args:") + 1 :]:
        if line and not line.startswith(" "):
            break
        entry = re.match(r" {4}\*{0,2}(\w+)(?: \(.*?\))?: (.*)", line)
        if entry:
            name = entry[1]
            found[name] = entry[2]
        elif name and line.strip():
            found[name] += " " + line.strip()
    return found
