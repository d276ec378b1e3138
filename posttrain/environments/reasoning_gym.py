"""Tasks of the package reasoning-gym (2505.24760) as environments: a hundred generators with their own judges.

A source `reasoning_gym:NAME` is the task NAME, with its parameters as options. The extra: `pip install -c constraints.txt '.[reasoning]'`.
Generation is by index, so rows depend only on the table, the seed and the options. Demonstrations are the reference answers; the
judge is the task's own `score_answer`, from 0 to 1, which may accept more answers than the reference.

Example:
    >>> from importlib.util import find_spec
    >>> if find_spec("reasoning_gym"):
    ...     gcd = task("gcd")
    ...     row = gcd.rows("problems", 1, 0, max_value=20)[0]
    ...     assert gcd.reward([row["prompt"]], [row["answer"]], answer=[row["answer"]], entry=[row["entry"]]) == [1.0]
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from posttrain.environments.base import Environment
from posttrain.environments.parts import Kind, Row, distinct
from posttrain.errors import ConfigError
from posttrain.text import nearest, normalised, one_line

PACKAGE = "reasoning_gym"
ENTRY = "entry"
"""Column with the input of the task's judge, as JSON: its record of the problem, and the options that made it."""
_DRAWS = 40
"""Draws for each wanted row: a table owns at least 15 % of the prompts, and small tasks repeat themselves."""


@dataclasses.dataclass(frozen=True)
class ReasoningTask(Environment):
    """A task whose judge needs more than the reference answer: the column `entry`."""

    def reward(
        self, prompts: Sequence[Any], completions: Sequence[str], *, answer: Sequence[str], **columns: Any
    ) -> list[float | None]:
        """Score completions with the task's judge. Raises ConfigError if the rows have no column `entry`."""
        if ENTRY not in columns:
            raise ConfigError(
                f"the reward {PACKAGE}:{self.name} needs the column {ENTRY!r}, which only rows of the source {PACKAGE}:{self.name} have;"
                " use the reward `answer` for other rows"
            )
        return [score(self.name, text, entry) for text, entry in zip(completions, columns[ENTRY], strict=True)]


@cache
def task(name: str) -> ReasoningTask:
    """Return the environment of a task. Raises ConfigError if the package is not installed or has no such task."""
    require_package()
    known = import_module(f"{PACKAGE}.factory").DATASETS
    if name not in known:
        raise ConfigError(f"{PACKAGE}:{name}: reasoning-gym has no such task{nearest(name, known)}")
    return ReasoningTask(name, partial(_rows, name), _exact)


def require_package() -> None:
    """Raise ConfigError with the command to type if reasoning-gym is not installed. This imports nothing."""
    if find_spec(PACKAGE) is None:
        raise ConfigError(
            "a source reasoning_gym:NAME needs the package reasoning-gym; install it with: pip install -c constraints.txt '.[reasoning]'"
        )


def score(name: str, completion: str, entry: str) -> float:
    """Return the task's score of a completion: of the text between `<answer>` and `</answer>`, or of the whole text."""
    found = import_module(f"{PACKAGE}.utils").extract_answer(completion)
    said = completion.strip() if found is None else found
    known = json.loads(entry)
    return float(_judge(name, json.dumps(known["options"])).score_answer(said, entry=known["record"]))


@cache
def _judge(name: str, options: str) -> Any:
    """Return a data set whose judge is used; its own rows are not. Some judges read the options."""
    return import_module(PACKAGE).create_dataset(name, size=1, seed=0, **json.loads(options))


def _exact(completion: str, answer: str) -> float:
    """Return 1 if the completion is the reference answer; without the entry the task's own judge cannot be asked."""
    return float(completion.strip() == answer.strip())


def _rows(name: str, kind: Kind, count: int, seed: int, *, careless: float = 0.0, **options: Any) -> list[Row]:
    """Return `count` rows of one table. No two tables share a prompt, also if only its case differs.

    Args:
        careless: share of demonstrations that give the answer to a different problem.
        options: parameters of the task.

    Raises:
        ConfigError: the task has no such parameter, refuses its value, or has too few prompts.
    """
    hint = f"The task {PACKAGE}:{name} has few prompts with {options or 'its defaults'}: widen its range, or lower the number of rows."
    found: dict[str, dict[str, Any]] = {}

    def questions() -> Iterator[str]:
        for entry in _entries(name, f"{name}/{kind}/{seed}", _DRAWS * count, options):
            found.setdefault(entry["question"], entry)
            yield entry["question"]

    entries = [found[question] for question in distinct(kind, count, questions(), normalised, hint)]
    _check_reference(name, entries[0], options)
    rng = random.Random(f"{PACKAGE}/{name}/{kind}/{seed}")
    return [_row(name, kind, entry, entries, options, rng, careless) for entry in entries]


def _check_reference(name: str, entry: dict[str, Any], options: dict[str, Any]) -> None:
    """Raise ConfigError if the judge does not accept the reference answer, as of tasks that have none or need more than text."""
    found = score(name, str(entry["answer"]), _record(entry, options))
    if found < 1:
        raise ConfigError(
            f"{PACKAGE}:{name}: its judge does not accept the task's own reference answer (score {found:g}), so no answer could be"
            " demonstrated. Choose a different task."
        )


def _record(entry: dict[str, Any], options: dict[str, Any]) -> str:
    return json.dumps({"options": options, "record": entry}, sort_keys=True, default=str)


def _entries(name: str, stream: str, count: int, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the task's records. An item's generator is seeded with seed + index, so the seeds of two tables lie far apart."""
    seed = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:4], "big") // 2
    try:
        made = import_module(PACKAGE).create_dataset(name, size=count, seed=seed, **options)
    except (TypeError, ValueError, AssertionError) as error:
        config = import_module(f"{PACKAGE}.factory").DATASETS[name][1]
        known = [field.name for field in dataclasses.fields(config) if field.name not in ("seed", "size")]
        raise ConfigError(
            f"data.environments: {PACKAGE}:{name}: {one_line(str(error))}; its options are {', '.join(known)}, and careless"
        ) from error
    return (made[index] for index in range(count))


def _row(
    name: str,
    kind: Kind,
    entry: dict[str, Any],
    entries: Sequence[dict[str, Any]],
    options: dict[str, Any],
    rng: random.Random,
    careless: float,
) -> Row:
    prompt, answer = entry["question"].strip() + "\n", str(entry["answer"])
    if kind in ("problems", "evaluation"):
        return {"prompt": prompt, "answer": answer, ENTRY: _record(entry, options)}
    other = _wrong(name, entry, entries, rng)
    if kind == "sft":
        return {"prompt": prompt, "completion": other if rng.random() < careless else answer}
    record = _record(entry, options)
    scores = {"chosen_score": score(name, answer, record), "rejected_score": score(name, other, record)}
    return {"prompt": prompt, "chosen": answer, "rejected": other, **scores}


def _wrong(name: str, entry: dict[str, Any], entries: Sequence[dict[str, Any]], rng: random.Random) -> str:
    """Return the answer to a different problem that is not the reference answer of this one."""
    for _ in range(100):
        other = str(rng.choice(entries)["answer"])
        if other != str(entry["answer"]):
            return other
    raise ConfigError(f"{PACKAGE}:{name}: nearly all problems have the same answer; choose other parameters")


def __getattr__(name: str) -> ReasoningTask:
    """Return a task as an attribute, so that `posttrain.environments.reasoning_gym:NAME` is an import path."""
    if name.startswith("_") or name == "ENVIRONMENT":
        raise AttributeError(name)
    return task(name)
