"""Choose the files of one split in a folder; each shard is there, and no file is read twice."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pipelines.data.compression import kind_and_compression
from pipelines.data.files import READERS, is_readable
from posttrain.errors import DataError
from posttrain.files import files_below

_PATTERNS = 8
"""Most patterns that a message names."""
_SHARD = re.compile(r"(?P<series>.*)-(?P<number>\d+)-of-(?P<count>\d+)\.")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_TRAIN = frozenset({"train", "training"})
_HELD_OUT = frozenset(
    {"test", "tests", "testing", "holdout", "heldout", "valid", "validation", "val", "dev", "eval", "evaluation"}
)


def folder_files(folder: Path, split: str) -> list[Path]:
    """Return the data files of a folder in the order of their names, those of `split` if the names say one.

    The words of a file's name and of the folders between it and `folder` count, in any case: `test/a.jsonl`, `gsm_test.jsonl`.

    Raises DataError if there are none, if they are of several formats, if a name holds two splits, if a numbered shard is missing, or if a
    file is there twice.
    """
    files = _data_files(folder)
    named = {path: found for path in files if (found := _splits(path.relative_to(folder)))}
    if named:
        for path, words in named.items():
            if words & _TRAIN and words & _HELD_OUT:
                raise DataError(
                    f"{folder}: the name {path.relative_to(folder).as_posix()} names two splits ({', '.join(sorted(words))}), so it is not"
                    " certain whether it may be trained. Rename it, or name the wanted files by a pattern or a list."
                )
        files = [path for path in files if split.lower() in named.get(path, ())]
        if not files:
            there = sorted(set().union(*named.values()))
            raise DataError(f"{folder}: no file of the split {split!r}; set data.*.split to one of: {', '.join(there)}")
    if not files:
        raise DataError(f"{folder}: no file that can be read; files must end in one of: {', '.join(READERS)}")
    _require_one_format(folder, files)
    _check_shards(folder, files)
    refuse_twice(files)
    return files


def _require_one_format(folder: Path, files: Sequence[Path]) -> None:
    """Raise DataError if files have several formats: they may be one table in two forms, or two parts of one."""
    counts = Counter(kind_and_compression(path)[0] for path in files)
    if len(counts) < 2:
        return
    listed = ", ".join(f"{counts[kind]} {kind}" for kind in sorted(counts))
    patterns = sorted({_pattern(path) for path in files})
    shown = ", ".join(patterns[:_PATTERNS]) + (", …" if len(patterns) > _PATTERNS else "")
    raise DataError(
        f"{folder}: holds files of several formats ({listed}), which may hold the same rows twice. If all {len(files)} files are wanted,"
        f" name them in a list of patterns: data.*.source: [{shown}]. If one format has all rows, name only its pattern; the other files"
        " are then not read"
    )


def _pattern(path: Path) -> str:
    """Return the pattern of all files of this format in the file's own folder."""
    ending = len("".join(kind_and_compression(path)))
    return (path.parent / f"*{path.name[-ending:]}").as_posix()


def pattern_files(pattern: str, files: Sequence[Path], split: str | None) -> list[Path]:
    """Return the files of a pattern that are of `split`; without one, all of them if their names say no split, or the same.

    Raises DataError if they are of several splits and `split` is None, or if none is of the split.
    """
    named = {path: _splits(path.relative_to(Path(pattern).parent)) for path in files}
    there = sorted(set[str]().union(*named.values()))
    if split is None and len({*named.values()}) > 1:
        listed = "; ".join(f"{path.name}: {', '.join(sorted(words)) or 'none'}" for path, words in [*named.items()][:4])
        raise DataError(
            f"{pattern}: its files are of several splits by their names ({listed}), so held-out rows could be trained. Set data.*.split"
            f" to one of: {', '.join(there)}; or write a narrower pattern."
        )
    if split is None or not there:
        return list(files)
    chosen = [path for path in files if split.lower() in named[path]]
    if not chosen:
        raise DataError(
            f"{pattern}: no file of the split {split!r}; set data.*.split to one of: {', '.join(there)}, or remove it"
        )
    return chosen


def unread_files(folder: Path, split: str) -> list[Path]:
    """Return the data files of a folder that belong to other splits, or to none."""
    return sorted({*_data_files(folder)} - {*folder_files(folder, split)})


def refuse_twice(files: Sequence[Path]) -> None:
    """Raise DataError if a file is named twice, or is there both as it is and compressed: its rows would count twice."""
    seen: dict[Path, Path] = {}
    for path in files:
        _, compression = kind_and_compression(path)
        plain = path.with_name(path.name[: len(path.name) - len(compression)])
        for key in {path.resolve(), plain.resolve()}:
            if key in seen:
                first = seen[key].as_posix()
                raise DataError(
                    f"{path.as_posix()}: its rows would be read twice, because the source also holds {first}"
                    f"{' (the same file)' if seen[key] == path else ''}. Name or keep only one of them."
                )
        seen |= dict.fromkeys((path.resolve(), plain.resolve()), path)


def _splits(path: Path) -> frozenset[str]:
    """Return the words of a path that name a split."""
    return frozenset(word.lower() for word in _WORD.findall(path.as_posix())) & (_TRAIN | _HELD_OUT)


def _data_files(folder: Path) -> list[Path]:
    return [p for p in files_below(folder) if is_readable(p) and not _is_hidden(p.relative_to(folder))]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _check_shards(folder: Path, files: Sequence[Path]) -> None:
    """Raise DataError if a numbered shard is missing. Shards count from 0 or, as those of weights, from 1."""
    shards: dict[tuple[str, int], set[int]] = {}
    for path in files:
        if found := _SHARD.match(path.name):
            series = (path.relative_to(folder).parent / found["series"]).as_posix()
            shards.setdefault((series, int(found["count"])), set()).add(int(found["number"]))
    for (series, count), numbers in sorted(shards.items()):
        first = 1 if count in numbers and 0 not in numbers else 0
        missing = sorted(set(range(first, first + count)) - numbers)
        if missing:
            raise DataError(
                f"{folder}: {series} has {len(numbers)} of {count} shards, without number {missing[0]}; a part of the data would"
                " be missing. Fetch the shard, or name the wanted files by a pattern."
            )
