"""Keep params.yaml in a form that DVC's reader and writer accept.

DVC reads with a different YAML parser than it writes with. `{function: package.module:name}` is valid for the one and broken for the
other, and `dvc exp run -S` drops the quotes that would help. Such a mapping is written in block style, one key a line.
"""

from __future__ import annotations

from typing import Any

from ruamel.yaml.comments import CommentedMap, CommentedSeq

from posttrain.errors import ConfigError


def survives(text: str) -> bool:
    """Return True if DVC reads the text, and reads it again with the same values after it has written it."""
    from dvc.utils.serialize import dumps_yaml, parse_yaml, parse_yaml_for_update
    from dvc.utils.serialize._yaml import YAMLError

    try:
        before = parse_yaml(text, "params.yaml")
        return bool(before == parse_yaml(dumps_yaml(parse_yaml_for_update(text, "params.yaml")), "params.yaml"))
    except YAMLError:
        return False


def require_survival(text: str, name: str) -> None:
    """Raise ConfigError if DVC cannot read the text or would damage it when it changes a value."""
    if not survives(text):
        raise ConfigError(
            f"{name}: DVC cannot read this file, or damages it in `dvc exp run -S`. Usually a value with a colon stands in braces,"
            " e.g. {function: package.module:name}. Write one key a line instead; `posttrain configure` with no arguments does so."
        )


def to_block_style(tree: Any, path: str = "") -> list[str]:
    """Rewrite each mapping or list in braces that DVC does not survive in block style; return the dotted names of the changed ones."""
    from dvc.utils.serialize import dumps_yaml

    changed: list[str] = []
    if (
        isinstance(tree, CommentedMap | CommentedSeq)
        and tree.fa.flow_style()
        and not survives(dumps_yaml({"it": tree}))
    ):
        tree.fa.set_block_style()
        changed.append(path)
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        changed += to_block_style(value, f"{path}.{key}" if path else str(key))
    return changed
