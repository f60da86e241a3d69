"""The pages: every link leads somewhere, every command is understood."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from doc_commands import PAGES, ROOT, commands_of, parse

from patchreg.runner.zoo import anchor

MARKDOWN = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {"work_dirs", "data", "build", "node_modules", "site-packages"}
    & set(path.relative_to(ROOT).parts)
    and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
NEW = "configs/vivid/"
"""Files that docs/add_a_method.md makes."""


def headings(path: Path) -> list[str]:
    """Anchors of a page, as GitHub makes them."""
    text = re.sub(r"^ *```.*?^ *```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: list[str] = []
    for line in re.findall(r"^#+ +(.+)$", text, flags=re.MULTILINE):
        name = anchor(line)
        count = sum(
            re.fullmatch(rf"{re.escape(name)}(-\d+)?", other) is not None for other in found
        )
        found.append(f"{name}-{count}" if count else name)
    return found


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`]*`", "", text)
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            continue
        name, _, place = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (place and place not in headings(target)):
            wrong.append(link)
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for command in commands_of(page.read_text()):
        if NEW not in command:
            parse(command, monkeypatch)


def test_the_search_finds_commands_and_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    page = "Run `python tools/zoo.py --chekc`.\n\n```\ntools/dist_train.sh configs/dge/{quick,quik}.py 8\n```\n"
    block, other, code = commands_of(page)
    assert block == "tools/dist_train.sh configs/dge/quick.py 8"
    assert parse(block, monkeypatch).config == "configs/dge/quick.py"
    with pytest.raises(AssertionError, match="quik.py does not exist"):
        parse(other, monkeypatch)
    with pytest.raises(AssertionError, match="not understood"):
        parse(code, monkeypatch)
    assert len([c for path in PAGES for c in commands_of(path.read_text())]) > 100
