"""Read YAML files as DVC reads them, with errors that name the file, the line and what to do."""

from __future__ import annotations

import copy
import json
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError
from ruamel.yaml.resolver import implicit_resolvers

from posttrain.errors import ConfigError

MOST_VALUES = 1_000_000
"""Values of one YAML file, each counted as often as an alias repeats it."""


class _TooManyValues(Exception):
    """A file of a few lines whose aliases stand for millions of values."""


def read_yaml(path: str | Path) -> Any:
    """Load YAML 1.2 as DVC does, so that 2e-5 is a number everywhere."""
    return parse_yaml(read_text(path), path)


def read_text(path: str | Path) -> str:
    """Return the text of a YAML file. Raises ConfigError if it cannot be read or is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        is_params = Path(path).name == "params.yaml"
        hint = " Run the command in the project's root, which holds params.yaml." if is_params else ""
        raise ConfigError(f"cannot read {path}: {error.strerror}.{hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text at byte {error.start}; save it as UTF-8.") from None


def parse_yaml(text: str, path: str | Path) -> Any:
    """Parse the text of a YAML file; `path` is named in errors.

    A step reads params.yaml and dvc.yaml several times, and parsing takes 20 ms: each text is parsed once, and each caller gets a copy.
    """
    try:
        return copy.deepcopy(_parsed(text))
    except DuplicateKeyError as error:
        raise ConfigError(f"{path}: {error.problem!s}, line {_line(error)}; remove one of the two.") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid YAML: nested too deeply to be read.") from None
    except _TooManyValues as error:
        raise ConfigError(
            f"{path}: its aliases (*name) stand for {error} values, more than {MOST_VALUES}: checking them would take for ever. Write the"
            " values without aliases."
        ) from None
    except (YAMLError, ValueError) as error:
        raise ConfigError(
            f"{path}: not valid YAML, line {_line(error)}: {getattr(error, 'problem', None) or error}"
        ) from None


@lru_cache(maxsize=8)
def _parsed(text: str) -> Any:
    """Parse a text. Errors are not kept."""
    tree = YAML(typ="safe", pure=True).load(StringIO(text))
    if "*" in text and (values := _size(tree, {})) > MOST_VALUES:
        raise _TooManyValues(str(values))
    if "\\u" in text.lower():
        # YAML can spell half of a surrogate pair, which UTF-8 cannot encode.
        json.dumps(tree, ensure_ascii=False, default=str, skipkeys=True).encode()
    return tree


def _size(tree: Any, known: dict[int, int]) -> int:
    """Return the number of values of a tree, in which aliases share parts. A part that contains itself counts once."""
    if not isinstance(tree, dict | list | set):
        return 1
    if id(tree) not in known:
        known[id(tree)] = 0
        parts = [*tree.keys(), *tree.values()] if isinstance(tree, dict) else tree
        known[id(tree)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(tree)]


class _WrittenLoader(yaml.CSafeLoader):
    """Read YAML 1.2 as DVC wrote it, several times as fast as the loader of params.yaml, and refuse a key that is there twice."""

    # pyrefly: ignore[bad-override]
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value]
        if len(keys) > len(set(keys)):
            raise yaml.YAMLError("a key is there twice")
        return super().construct_mapping(node, deep)


for _versions, _tag, _pattern, _first in implicit_resolvers:
    if (1, 2) in _versions:
        _WrittenLoader.add_implicit_resolver(str(_tag), _pattern, _first)


def parse_written(text: str) -> Any:
    """Parse YAML that DVC wrote: dvc.lock, or an entry of the run cache. Raises yaml.YAMLError, which does not name the file."""
    return yaml.load(text, _WrittenLoader)


def _line(error: Any) -> str:
    """Return the line of a YAML error."""
    mark = getattr(error, "problem_mark", None)
    return str(mark.line + 1) if mark else "?"
