"""The fields of a config as Markdown, made from `step_grpo/config.py` itself: `python docs/fields.py`."""

import ast
import html
import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from step_grpo.config import base_config, data_config

Comments = dict[int, tuple[bool, str]]
"""Line -> whether the comment stands alone on it, and its text."""


def table_of_fields() -> str:
    """Every field of `base_config` with its default and the comment beside it, a table for each group."""
    notes = comments_of_fields()
    return "\n".join(_group(base_config(), "", notes))


def _group(group: ConfigDict, prefix: str, notes: dict[str, str]) -> Iterator[str]:
    title = f"config.{prefix}".removesuffix(".")
    yield from (f"\n### `{title}`\n", notes.get(prefix.removesuffix("."), ""), "")
    if is_data(group):
        yield from ("A [data config](#a-data-config).", "")
    leaves = {name: value for name, value in _ordered(group, prefix, notes) if not _is_group(value)}
    yield from ("| field | default | |", "| --- | --- | --- |")
    for name, value in leaves.items():
        yield f"| `{name}` | {_cell(value)} | {notes.get(prefix + name, '').replace('|', chr(92) + '|')} |"
    for name, value in _ordered(group, prefix, notes):
        if _is_group(value):
            yield from _group(value, f"{prefix}{name}.", notes)


def _is_group(value: Any) -> bool:
    return isinstance(value, ConfigDict) and len(value) > 0


def is_data(group: ConfigDict) -> bool:
    """Whether a group was made by `data_config`."""
    return set(group) == set(data_config())


def _ordered(group: ConfigDict, prefix: str, notes: dict[str, str]) -> list[tuple[str, Any]]:
    """The fields in the order of the source; a `ConfigDict` sorts them by name."""
    order = {path: place for place, path in enumerate(notes)}
    return sorted(group.items(), key=lambda item: order.get(prefix + item[0], len(order)))


def _cell(value: Any) -> str:
    plain = value.to_dict() if isinstance(value, ConfigDict) else value
    return f"<code>{html.escape(repr(plain), quote=False).replace('|', '&#124;')}</code>"


def comments_of_fields() -> dict[str, str]:
    """Dotted path -> the comment beside or above it in the source of `base_config`; groups have theirs too.

    A group is a variable that holds a dict; its path is that of the group with the same fields.
    """
    source = inspect.getsource(base_config)
    comments = _comments(source)
    notes: dict[str, str] = {}
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.FunctionDef)
    for node in body.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            names = {str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)}
            path = _path_of(names)
            if path is not None:
                notes[path] = _note(node, comments)
                notes |= dict(_fields(node.value, path, comments))
    return notes


def _path_of(names: set[str]) -> str | None:
    """The group whose fields these are; the run's own fields lie at the top."""
    base = base_config()
    groups = {name: set(value) for name, value in base.items() if isinstance(value, ConfigDict)}
    if names == set(base) - set(groups):
        return ""
    return next((group for group, fields in groups.items() if fields == names), None)


def _fields(node: ast.Dict, path: str, comments: Comments) -> Iterator[tuple[str, str]]:
    last = {value.end_lineno: key for key, value in zip(node.keys, node.values, strict=True)}
    for key, value in zip(node.keys, node.values, strict=True):
        if isinstance(key, ast.Constant):
            name = f"{path}.{key.value!s}".lstrip(".")
            alone = last[value.end_lineno] is key and len(node.keys) > 1 and node.lineno != key.lineno
            yield name, _note(key, comments, value.end_lineno) if alone else ""
            if isinstance(value, ast.Dict):
                yield from _fields(value, name, comments)


def _note(node: Any, comments: Comments, end: int | None = None) -> str:
    """The comment lines right above a node, then those behind its first and its last line."""
    above: list[str] = []
    line = node.lineno - 1
    while line in comments and comments[line][0]:
        above.insert(0, comments[line][1])
        line -= 1
    lines = dict.fromkeys((node.lineno, end or node.end_lineno))
    return " ".join([*above, *(comments[n][1] for n in lines if n in comments and not comments[n][0])])


def _comments(source: str) -> Comments:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = [token for token in tokens if token.type == tokenize.COMMENT]
    return {t.start[0]: (t.line.lstrip().startswith("#"), t.string.lstrip("# ")) for t in found}


def data_fields() -> str:
    """The fields of a `data_config`, a list item each, as its docstring explains them."""
    text = " ".join((inspect.getdoc(data_config) or "").partition("\n\n")[2].split())
    name = f"(?:{'|'.join(data_config())})"
    items = re.split(rf"; (?={name}(?: and {name} take)?\b)", text)
    return "\n".join("- " + re.sub(rf"^({name})(?: and ({name}))?", _in_code, item) for item in items)


def _in_code(match: re.Match[str]) -> str:
    return " and ".join(f"`{name}`" for name in match.groups() if name)


if __name__ == "__main__":
    print(data_fields(), table_of_fields(), sep="\n")
