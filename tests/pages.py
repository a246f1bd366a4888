"""What the documentation holds: code blocks, inline code, links and anchors of pages and notebooks."""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = tuple(
    sorted(
        [
            *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tpu/README.md")),
            *(ROOT / "docs").glob("*.md"),
            *(ROOT / "results").glob("*/README.md"),
            *(ROOT / "notebooks").glob("*.ipynb"),
        ]
    )
)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_LINK = re.compile(r"(?<!!)\[((?:`[^`]*`|[^\]`])*)\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Piece:
    """A code block, inline code or a link; `kind` is a block's language or a link's target."""

    page: Path
    line: int
    text: str
    kind: str = ""

    @property
    def place(self) -> str:
        """For a test's name."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@cache
def text_of(page: Path) -> str:
    """The Markdown of a page; of a notebook that of its Markdown cells."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    cells = (cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")
    return "".join("".join(cell["source"]).rstrip("\n") + "\n\n" for cell in cells)


def blocks(page: Path, *languages: str) -> list[Piece]:
    """The fenced code blocks, of these languages if any are named."""
    text = text_of(page)
    found = [Piece(page, text.count("\n", 0, m.start()) + 1, m[2], m[1]) for m in _FENCE.finditer(text)]
    return [block for block in found if not languages or block.kind in languages]


def spans(page: Path) -> list[Piece]:
    """Inline code outside of blocks."""
    text = prose(page)
    return [Piece(page, text.count("\n", 0, m.start()) + 1, m[1]) for m in _SPAN.finditer(text)]


def links(page: Path) -> list[Piece]:
    """Links that name a file of the repository or an anchor, not an address."""
    text = prose(page)
    found = [Piece(page, text.count("\n", 0, m.start()) + 1, m[1], m[2]) for m in _LINK.finditer(text)]
    return [link for link in found if not re.match(r"\w+:", link.kind)]


@cache
def prose(page: Path) -> str:
    """The text without code blocks, line by line where it was."""
    return _FENCE.sub(lambda m: "\n" * m[0].count("\n"), text_of(page))


def anchors(page: Path) -> set[str]:
    """The anchors of the headings, as GitHub and MkDocs make them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell script without its structures: `A=1 do this && do that`."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&|;"):
                if command:
                    yield command
                command = []
            elif command or not re.match(r"\w+=", word):  # a variable of one command's environment
                command.append(word)
