"""Change params.yaml by overlay or by key. The result is validated before anything is written, and comments are kept.

    posttrain configure examples/gsm8k.yaml
    posttrain configure sft.epochs=2 project.seeds=[0,1]
    posttrain configure --check
    posttrain configure data.sft.source=later.jsonl --absent

An overlay is a YAML file that holds only the keys to change. A mapping is merged into the existing one, any other value replaces the
existing value, and `null` removes an optional key. Prints each change. Files, import paths and columns that a run would not find, and
model names that are not of the form OWNER/NAME, are refused at once; --absent writes them anyway. Whether the hub has a model is seen only
when it is loaded. Settings that the processes in the environment cannot combine are refused as well. project.code is set to the folder of
your own modules, in which DVC sees edits. A mapping in braces that DVC cannot read or write is rewritten in block style.
"""

from __future__ import annotations

import fcntl
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.representer import RoundTripRepresenter

from pipelines.commands.lookahead import problems
from pipelines.commands.notes import notes
from pipelines.config.dvc_yaml import require_survival, survives, to_block_style
from pipelines.config.own_code import code_folder
from pipelines.config.params import Params, flatten, parse_params
from pipelines.config.yaml_files import parse_yaml, read_text, read_yaml
from pipelines.runtime import environment
from pipelines.runtime.combinations import all_refusals
from pipelines.runtime.command_line import command_parser, reports_errors
from pipelines.runtime.launch import configuration
from posttrain.errors import ConfigError
from posttrain.files import write_atomic

_NOTHING: Any = object()
_SHOWN = 80
"""Most characters of a change in an error."""


@reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = command_parser("posttrain configure", __doc__)
    parser.add_argument(
        "changes", nargs="*", metavar="OVERLAY.yaml | key=value", help="changes, applied from left to right"
    )
    parser.add_argument("--check", action="store_true", help="validate and print the changes, but write nothing")
    parser.add_argument("--absent", action="store_true", help="do not look for files, folders and functions")
    parser.add_argument("--params", type=Path, help="file to change instead of the project's params.yaml")
    args = parser.parse_args(arguments)
    path = args.params or environment.root() / "params.yaml"
    with _only_writer(path):
        changes, text, params = _changed(path, args.changes)
        if not args.absent:
            _look(params)
        require_combination(params)
        if changes and not args.check:
            write_atomic(path, text.encode())
    print("\n".join([*(changes or [f"{path.name}: valid, nothing changes"]), *notes(params, changes)]))
    return 0


def _look(params: Params) -> None:
    """Raise ConfigError if a run with the parameters would not find something."""
    sys.path.insert(0, os.getcwd())
    found = problems(params)
    if found:
        raise ConfigError("\n".join([*found, "Nothing was written. Type --absent if these will be there later."]))


def require_combination(params: Params) -> None:
    """Raise ConfigError if the processes that the environment names cannot combine the settings of a stage that trains."""
    found = all_refusals(environment.root(), params, configuration())
    if found:
        raise ConfigError("\n".join([*found, "Nothing was written."]))


def configure(path: Path, changes: Sequence[str]) -> list[str]:
    """Apply overlays and key=value changes to a params file, and return one line `key: old -> new` per change.

    Raises ConfigError and leaves the file unchanged if the result is not valid.
    """
    with _only_writer(path):
        differences, text, _ = _changed(path, changes)
        if differences:
            write_atomic(path, text.encode())
    return differences


@contextmanager
def _only_writer(path: Path) -> Iterator[None]:
    """Let one process at a time read and replace the file: of two at once, the changes of one would be lost.

    The folder is locked, since the file itself is replaced.
    """
    if not path.parent.is_dir():  # the reader names the missing file
        yield
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _changed(path: Path, changes: Sequence[str]) -> tuple[list[str], str, Params]:
    """Return one line per change, and the file's text and parameters as they will be after the changes."""
    original = read_text(path)
    before = parse_yaml(original, path)
    yaml = _round_trip()
    tree = yaml.load(original)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of sections")
    for change in changes:
        _merge(tree, _overlay(change))
    blocks: list[str] = []
    text = _written(yaml, tree)
    if not survives(text):
        blocks = to_block_style(tree)
        text = _written(yaml, tree)
        require_survival(text, path.name)
    after = parse_yaml(text, path.name)
    params = parse_params(after, path.name)
    folder = code_folder(params)
    if folder is not None:  # DVC sees edits only there
        _merge(tree, {"project": {"code": folder}})
        text = _written(yaml, tree)
        after = parse_yaml(text, path.name)
        params = parse_params(after, path.name)
    differences = _differences(flatten(before), flatten(after))
    differences += [f"{name}: rewritten without braces, in which DVC cannot read it" for name in blocks]
    return differences, text, params


def _written(yaml: YAML, tree: Any) -> str:
    text = io.StringIO()
    yaml.dump(tree, text)
    return text.getvalue()


def _round_trip() -> YAML:
    """Return a YAML reader and writer that keeps comments and quotes."""
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.Representer = _Representer
    return yaml


class _Representer(RoundTripRepresenter):
    """Write `null` explicitly; ruamel's default writes nothing. A subclass, because the parent class is shared."""

    def represent_null(self, _: Any) -> Any:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


_Representer.add_representer(type(None), _Representer.represent_null)


def _overlay(change: str) -> dict[str, Any]:
    """Return the tree of an overlay file, or of one key=value."""
    key, assigned, value = change.partition("=")
    if not assigned:
        if not Path(change).exists() and Path(change).suffix not in (".yaml", ".yml"):
            raise ConfigError(f"{change}: no such file. To change a parameter, write {change}=VALUE.")
        tree = read_yaml(change)
        if not isinstance(tree, dict):
            raise ConfigError(
                f"{change}: an overlay must be a mapping of sections, like params.yaml but with only the keys to change"
            )
        overlay: dict[str, Any] = _round_trip().load(Path(change).read_text(encoding="utf-8"))
        return overlay
    names = key.strip().split(".")
    if not all(names):
        raise ConfigError(f"{change!r}: write dotted.key=value, e.g. sft.epochs=2")
    if not value.strip():
        raise ConfigError(
            f"{change!r}: there is no value after the equals sign; to remove an optional key, write {key}=null"
        )
    parse_yaml(value, change[:_SHOWN])  # refuses no YAML, deep nesting, and aliases of millions of values
    try:
        tree = _round_trip().load(value)
    except (YAMLError, ValueError) as error:
        reason = getattr(error, "problem", None) or error
        raise ConfigError(f"{change[:_SHOWN]!r}: the value is not YAML: {reason}") from None
    for name in reversed(names):
        tree = {name: tree}
    return dict(tree)


def _merge(tree: dict[str, Any], over: dict[str, Any]) -> None:
    """Merge `over` into `tree` in place, so that the comments of unchanged keys are kept."""
    for key, value in over.items():
        if value is None:
            tree.pop(key, None)
        elif isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        elif tree.get(key, _NOTHING) != value:
            tree[key] = value


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return one line for each key that differs; a key without a value that gets a mapping is shown by the mapping's keys."""
    mappings = {key.rpartition(".")[0] for key in after}
    keys = [*after, *(key for key in before if key not in after and not (before[key] is None and key in mappings))]
    return [
        f"{key}: {_shown(before.get(key, _NOTHING))} -> {_shown(after.get(key, _NOTHING))}"
        for key in keys
        if before.get(key, _NOTHING) != after.get(key, _NOTHING)
    ]


def _shown(value: Any) -> str:
    """Return a value as text for a change line."""
    return "(none)" if value is _NOTHING else repr(value)


if __name__ == "__main__":
    sys.exit(main())
