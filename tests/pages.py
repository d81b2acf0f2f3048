"""The docs' pages as tests see them: code blocks and tables, each with the comment above it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_TABLE = re.compile(r"^<!-- (?P<mark>[^\n]+) -->\n(?P<rows>(?:\|[^\n]*\n)+)", re.MULTILINE)
_INLINE = re.compile(r"(?<!`)`(tenfold [^`\n]+)`(?!`)")
_INCLUDED = re.compile(r'^--8<-- "([^":]+)"$', re.MULTILINE)
# What may stand ahead of the command: a prompt, or what starts several processes.
_COMMAND = re.compile(r"^(?:\$ |srun (?:-\S+ )*|torchrun .*?-m )?tenfold(?:\.cli)? (.+)$")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the comment above it, its language and its lines."""

    page: str
    mark: str
    language: str
    text: str


def pages() -> list[Path]:
    """Return all pages that a user reads, but the changelog."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def name(page: Path) -> str:
    """Return a page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(*languages: str) -> list[Block]:
    """Return the blocks in these languages, files that they include filled in."""
    found = []
    for page in pages():
        for match in _BLOCK.finditer(page.read_text(encoding="utf-8")):
            if match["language"] in languages:
                text = _INCLUDED.sub(lambda m: (ROOT / m[1]).read_text("utf-8"), match["text"])
                mark = match["mark"] or ""
                if mark.startswith("--8<--"):  # where an included part begins
                    mark = ""
                found.append(Block(name(page), mark, match["language"], text))
    return found


def tables() -> dict[str, list[list[str]]]:
    """Return the marked tables by mark: rows of cells, without the header."""
    found = {}
    for page in pages():
        for match in _TABLE.finditer(page.read_text(encoding="utf-8")):
            lines = match["rows"].splitlines()[2:]
            found[match["mark"]] = [
                [cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines
            ]
    return found


def names_in(cell: str) -> list[str]:
    """Return what stands in backticks, the first word of each."""
    return [text.split()[0] for text in re.findall(r"`([^`]+)`", cell)]


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yield the words after `tenfold` of every command in a block, with its page."""
    for block in blocks("", "sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            match = _COMMAND.match(line)
            if match is not None:
                yield block.page, shlex.split(match[1], comments=True)


def mentioned() -> Iterator[tuple[str, list[str]]]:
    """Yield the words of every command in running text, which may be cut short."""
    for page in pages():
        for found in _INLINE.findall(page.read_text(encoding="utf-8")):
            yield name(page), found.split()[1:]
