"""Where the code says `spec/NAME.md section N`, docs/spec/NAME.md has that section."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SPEC = ROOT / "docs/spec"
NUMBER = r"\d+(?:\.\d+)*"
ANCHOR = re.compile(
    rf"spec/(?P<page>[\w-]+)\.md(?:\s+sections?\s+(?P<numbers>{NUMBER}(?:(?:,| and)\s+{NUMBER})*))?"
)
FOLDERS = ("bench", "methods", "tests")


def headings(page: str) -> set[str]:
    """Numbers of the sections of a page."""
    path = SPEC / f"{page}.md"
    return (
        set(re.findall(rf"^#+ ({NUMBER})\.? ", path.read_text(), re.MULTILINE)) if path.is_file() else set()
    )


def anchors() -> list[tuple[str, str, str]]:
    """(where, page, number) of each section that the code names; an empty number where it names none."""
    found = []
    for path in [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*")) if p != Path(__file__)]:
        if path.suffix not in (".py", ".toml"):
            continue
        text = re.sub(r"\n[ #]*", " ", path.read_text(encoding="utf-8"))
        for match in ANCHOR.finditer(text):
            numbers = re.findall(NUMBER, match["numbers"] or "") or [""]
            found += [(str(path.relative_to(ROOT)), match["page"], number) for number in numbers]
    return found


def test_every_section_that_the_code_names_is_there() -> None:
    lost = [anchor for anchor in anchors() if anchor[2] not in headings(anchor[1])]
    assert lost == []


def test_the_code_names_its_sources() -> None:
    named = anchors()
    assert len(named) >= 58
    assert {page for _, page, _ in named} >= {"protocol", "mib-family", "plop", "ssul", "nest", "mbs", "eir"}


def test_every_page_says_what_was_read() -> None:
    for path in SPEC.glob("*.md"):
        if path.stem == "index":
            continue
        text = path.read_text()
        for row in ("| Paper |", "| Released code |", "| Where in it |"):
            assert row in text, f"{path.name}: {row}"
        assert f"({path.name})" in (SPEC / "index.md").read_text()


def test_sections_that_pages_name_of_each_other_are_there() -> None:
    for path in SPEC.glob("*.md"):
        for page, number in re.findall(rf"`([\w-]+)\.md` §({NUMBER})", path.read_text()):
            assert number in headings(page), f"{path.name}: {page}.md §{number}"
