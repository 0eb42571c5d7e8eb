"""The targets of links, anchors and paths in README.md and docs/ exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.service import ROOT

PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("app", "benchmarks", "deploy", "docs", "models_store", "tests", "training")


def anchor(heading: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    characters = "".join(character for character in heading.lower() if character.isalnum() or character in " -_")
    return characters.replace(" ", "-")


def text_of(page: Path) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    return {anchor(re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading))
            for heading in re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)}  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_relative_links_and_anchors_exist(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (fragment and fragment not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_files_that_a_page_names_exist(page: Path) -> None:
    paths = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", text_of(page))
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        targets = {(page.parent / link).resolve() for link in re.findall(r"\]\(([^)#\s]+\.md)", text_of(page))}
        waiting += targets - reached
    assert not {page.name for page in PAGES} - {page.name for page in reached}
