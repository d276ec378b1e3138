"""Fill the tables of the reference pages from the code when the site is built.

A page asks for a table with a marker such as `<!-- params -->`. MkDocs calls `on_page_markdown`.
"""

from __future__ import annotations

import ast
import re
import types
import typing
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]
MEANINGS = "docs/reference/meanings.yaml"
MARKER = re.compile(r"<!-- (params|errors) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace every marker of a page with its table."""
    return MARKER.sub(lambda found: {"params": params, "errors": errors}[found[1]](), markdown)


def params() -> str:
    """Return one table for each section of params.yaml: path, value, type and meaning of every parameter."""
    from pipelines.config.params import Params

    values = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
    lines: list[str] = []
    for name in Params.model_fields:
        lines += [f"\n## {name}\n", "| parameter | in params.yaml | type | meaning |", "|---|---|---|---|"]
        lines += [
            f"| `{path}` | {_shown(_value(values, path, default))} | {_cell(kind)} | {meaning} |"
            for path, default, kind, meaning in fields(name, Params.model_fields[name].annotation)
        ]
    return "\n".join(lines)


def fields(prefix: str, annotation: Any) -> list[tuple[str, Any, str, str]]:
    """Return path, default, type and meaning of every parameter below a section, in the order of the schema."""
    found = []
    section = _section(annotation)
    if section is None:
        raise TypeError(f"{prefix}: {annotation} is no section")
    if typing.get_origin(annotation) is dict:
        prefix += ".NAME"
    about = documented(section)
    for name, field in section.model_fields.items():
        path = f"{prefix}.{name}"
        inner = _section(field.annotation)
        if inner is not None and typing.get_origin(field.annotation) is not dict:
            found += fields(path, field.annotation)
        else:
            kind, doc = about.get(name, ("", ""))
            found.append((path, field.get_default(), kind, _cell(doc or meanings().get(_key(path), "—"), code=False)))
    return found


def meanings() -> dict[str, str]:
    """Return the meanings of parameters whose schema has no docstring for them, by section and name."""
    loaded: dict[str, str] = YAML(typ="safe", pure=True).load(ROOT / MEANINGS)
    return loaded


def documented(section: type) -> dict[str, tuple[str, str]]:
    """Return type and docstring of each field of a section, base classes included."""
    found: dict[str, tuple[str, str]] = {}
    for name, node in _classes().items():
        if name in {base.__name__ for base in section.__mro__}:
            for at, line in enumerate(node.body):
                if isinstance(line, ast.AnnAssign):
                    after = node.body[at + 1] if at + 1 < len(node.body) else None
                    doc = ast.literal_eval(after.value) if _is_text(after) else ""
                    found[ast.unparse(line.target)] = (ast.unparse(line.annotation), " ".join(doc.split()))
    return found


def errors() -> str:
    """Return the table of exceptions with their exit status and parents."""
    from posttrain.errors import PosttrainError

    lines = ["| exception | parent | exit status |", "|---|---|---|"]
    waiting: list[type[PosttrainError]] = [PosttrainError]
    while waiting:
        kind = waiting.pop(0)
        lines.append(f"| `{kind.__name__}` | `{kind.__bases__[0].__name__}` | {kind.exit_code} |")
        waiting = [c for c in kind.__subclasses__() if c.__module__ == "posttrain.errors"] + waiting
    return "\n".join(lines)


def _classes() -> dict[str, ast.ClassDef]:
    """Return the classes of the parameters' schema by name."""
    files = sorted((ROOT / "pipelines" / "config").glob("*schema.py"))
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def _is_text(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _section(annotation: Any) -> Any:
    """Return the section class in an annotation: itself, optional, or the value of a mapping."""
    from pipelines.config.types import Section

    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, Section) else None
    return next((found for arg in typing.get_args(annotation) if (found := _section(arg)) is not None), None)


def _value(tree: Any, path: str, default: Any) -> Any:
    for part in path.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return default
        tree = tree[part]
    return tree


def _key(path: str) -> str:
    return ".".join(path.split(".")[-2:])


def _shown(value: Any) -> str:
    if value is None or str(value) == "PydanticUndefined":
        return "—"
    text = str(value)
    return _cell(text if len(text) < 60 else "see params.yaml")


def _cell(text: str, code: bool = True) -> str:
    text = text.replace("|", "\\|").replace("\n", " ")
    return f"`{text}`" if code and text else text
