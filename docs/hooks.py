"""What `mkdocs build` does beside Markdown: the table of fields, pages of source code, formulas as MathML.

The pages of `docs/` are written for GitHub too, where they link to source files as they lie. Here these
become pages of their own, and a link from a function's name leads to its line.
"""

import ast
import html
import json
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fields import data_fields, table_of_fields
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<!!)\[((?:`[^`]*`|[^\]`])*)\]\(([^)\s#]+)((?:#[^)\s]*)?)\)")
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s:]+)\)")
CODE = re.compile(r"^(`{3,}).*?^\1$", re.DOTALL | re.MULTILINE)
TABLES: dict[str, Callable[[], str]] = {
    "<!-- fields -->": table_of_fields,
    "<!-- data config -->": data_fields,
}
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".json": "json"}


# ---------------------------------------------------------------------- events of MkDocs


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for every file outside of `docs/` that a page links, and that those link; and pictures."""
    todo = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    known = set(todo)
    while todo:
        here = todo.pop()
        for target in sorted(outside(here, IMAGE) - known):
            known.add(target)
            files.append(File.generated(config, page_of(target), abs_src_path=str(ROOT / target)))
        for target in sorted(outside(here, LINK) - known):
            known.add(target)
            files.append(File.generated(config, page_of(target), content=as_page(target)))
            todo.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads links to the pages of the site, and fills in the table of fields."""
    here = page.file.src_uri
    markdown = outside_code(markdown, lambda text: relinked(text, here))
    for mark, table in TABLES.items():
        if mark in markdown:
            markdown = markdown.replace(mark, table())
    return markdown


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML, which needs no script; and lines of listings as anchors that links may name."""
    page.present_anchor_ids = {*(page.present_anchor_ids or ()), *re.findall(r'id="(L-0-\d+)"', content)}

    def formula(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return str(convert(html.unescape(match[2])[2:-2].strip(), display=display))

    return re.sub(r'<(div|span) class="arithmatex">(.*?)</\1>', formula, content, flags=re.DOTALL)


# ---------------------------------------------------------------------- links and pages of source


def page_of(path: str) -> str:
    """The page that shows a file of the repository: `docs/` as it is, anything else under `source/`."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}" if path.endswith((".md", ".png")) else f"source/{path}.md"


def file_of(page: str) -> str:
    """The file of the repository that a page shows."""
    if not page.startswith("source/"):
        return f"docs/{page}"
    path = page.removeprefix("source/")
    return path if (ROOT / path).is_file() else path.removesuffix(".md")


def outside(here: str, pattern: re.Pattern[str]) -> set[str]:
    """The files outside of `docs/`, all of which is copied, that a Markdown file or a notebook names."""
    if not here.endswith((".md", ".ipynb")):
        return set()
    text = CODE.sub("", as_page(here))
    targets = (resolved(here, match[2]) for match in pattern.finditer(text) if ":" not in match[2])
    return {target for target in targets if not target.startswith("docs/") and (ROOT / target).is_file()}


def resolved(here: str, target: str) -> str:
    """A relative link of a file of the repository, from the root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(here), target))


def relinked(text: str, page: str) -> str:
    """The same text with each link to a file of the repository as one to its page."""
    here = file_of(page)

    def link(match: re.Match[str]) -> str:
        label, target, anchor = match.groups()
        path = resolved(here, target)
        if ":" in target or not (ROOT / path).is_file():
            return match[0]  # an address; or MkDocs says what is missing
        place = posixpath.relpath(page_of(path), posixpath.dirname(page) or ".")
        return f"[{label}]({place}{anchor or line_of(path, label)})"

    def image(match: re.Match[str]) -> str:
        place = page_of(resolved(here, match[2]))
        return f"![{match[1]}]({posixpath.relpath(place, posixpath.dirname(page) or '.')})"

    return IMAGE.sub(image, LINK.sub(link, text))


def outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """Applies `change` to all but the fenced blocks."""
    at, changed = 0, ""
    for block in CODE.finditer(markdown):
        changed += change(markdown[at : block.start()]) + block[0]
        at = block.end()
    return changed + change(markdown[at:])


def line_of(path: str, label: str) -> str:
    """`#L-0-LINE` of the function or class that a label names in code; empty where it names none."""
    name = label.strip("`").rpartition(".")[2]
    if not path.endswith(".py") or not label.startswith("`"):
        return ""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return f"#L-0-{node.lineno}"
    return ""


def as_page(path: str) -> str:
    """A file as a page: Markdown as it is, a notebook's cells, all else as a listing that no search finds."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    if path.endswith(".ipynb"):
        return "\n\n".join(map(as_markdown, json.loads(text)["cells"])) + "\n"
    language = LANGUAGES.get(Path(path).suffix, "text")
    return f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n````{language}\n{text.rstrip()}\n````\n"


def as_markdown(cell: dict[str, Any]) -> str:
    """A notebook's cell: text as it is, code as a block."""
    source = "".join(cell["source"]).rstrip()
    return source if cell["cell_type"] == "markdown" else f"````python\n{source}\n````"
