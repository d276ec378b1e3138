"""Environments of the package verifiers as ours: its tasks are the rows, its scoring the reward, its replies the turns.

A source `verifiers:MODULE` is the environment that verifiers loads for the taskset MODULE: a built-in one, such as `textarena`, or an
installed package in its format. Options are those of the taskset. The extra: `pip install -c constraints.txt '.[verifiers]'`.

An environment of verifiers asks the model for turns; ours are asked for replies. So each reply replays the conversation: the environment
runs from the start with the turns so far, up to its next message (verifiers_replay.py). Nothing lives between two turns, and a
run that was killed continues with the same bytes. An environment that replies differently on a replay is refused.

Example:
    >>> opening([{"role": "user", "content": "Guess."}], number=7)
    [{'role': 'user', 'content': 'Task 7.\\n\\nGuess.'}]
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from typing import Any

from posttrain.environments.base import Conversation
from posttrain.environments.parts import Kind, Row, distinct
from posttrain.environments.replayed import ENTRY, ReplayedEnvironment
from posttrain.environments.verifiers_replay import Episode, LoadedEnvironment, load, play
from posttrain.errors import ConfigError
from posttrain.text import normalised, one_line

PACKAGE = "verifiers"
_DRAWS = 40
"""Tasks to look at for each wanted row: a table owns at least 15 % of them."""
Messages = list[dict[str, Any]]


@cache
def environment_of(name: str) -> ReplayedEnvironment:
    """Return the environment of a taskset. Raises ConfigError if the package is not installed or has no such taskset."""
    require_package()
    try:
        import_module(f"{PACKAGE}.v1.utils.loaders").taskset_class(name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{PACKAGE}:{name}: verifiers cannot load this taskset: {one_line(str(error))}") from error
    return ReplayedEnvironment(
        name, partial(_rows, name), _exact, partial(_reply, name), package=PACKAGE, score=partial(score, name)
    )


def require_package() -> None:
    """Raise ConfigError with the command to type if verifiers is not installed. This imports nothing."""
    if find_spec(PACKAGE) is None:
        raise ConfigError(
            "a source verifiers:MODULE needs the package verifiers; install it with: pip install -c constraints.txt '.[verifiers]'"
        )


def score(name: str, entry: str, turns: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the reward of a conversation, given as the turns after the prompt."""
    return _replayed(name, entry, turns, final=True).reward


def opening(prompt: Messages, number: int | None) -> Messages:
    """Return the prompt with its task's number before the last message, None for the prompt as it is."""
    if number is None:
        return prompt
    *before, last = prompt
    return [*before, {**last, "content": f"Task {number}.\n\n{last['content']}"}]


def _reply(name: str, conversation: Conversation) -> Messages | None:
    """Return the environment's message after the model's newest turn; None at the end."""
    places = [place for place, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    # a prompt may hold turns of an assistant, too: the model's are the last ones
    said = conversation.messages[places[-conversation.turn] :]
    message = _replayed(name, conversation.columns[ENTRY], said, final=False).message
    return None if message is None else [{"role": "user", "content": message}]


def _replayed(name: str, entry: str, turns: Sequence[Mapping[str, Any]], final: bool) -> Episode:
    known = json.loads(entry)
    environment = load(name, json.dumps(known["options"], sort_keys=True))
    return play(environment, environment.task(known["task"]), turns, final)


def _exact(completion: str, answer: str) -> float:
    """Return 1 if the completion is the reference answer; without the entry the environment cannot be asked."""
    return float(completion.strip() == answer.strip())


def _rows(
    name: str, kind: Kind, count: int, seed: int, *, numbered: bool = False, first: int = 0, **options: Any
) -> list[Row]:
    """Return `count` rows of one table. No two tables share a task or a prompt.

    Args:
        numbered: write the task's number before the prompt, for environments in which many tasks begin with the same words.
        first: place of the first task to take; those after it are shuffled by `seed`.
        options: options of the taskset.

    Raises:
        ConfigError: an option is refused, there are too few tasks, or the table needs demonstrations and tasks have no `answer`.
    """
    if kind == "preferences":
        raise ConfigError(
            f"data.preferences.source = {PACKAGE}:{name}: its tasks have no rejected answers; take pairs from a different source"
        )
    environment = load(name, json.dumps(options, sort_keys=True))
    hint = (
        f"The environment {PACKAGE}:{name} with {options or 'its defaults'} has few tasks with different prompts: lower the number of"
        f" rows, or set data.environments.{PACKAGE}:{name}.numbered to true, which writes a number before each prompt."
    )
    found: dict[str, tuple[dict[str, Any], Messages]] = {}

    def prompts() -> Iterator[str]:
        for task in _tasks(environment, count, first, seed):
            prompt = opening(environment.prompt(task), task.data.idx if numbered else None)
            key = normalised(json.dumps(prompt))
            found.setdefault(key, (environment.record(task), prompt))
            yield key

    chosen = [found[key] for key in distinct(kind, count, prompts(), str, hint)]
    return [_row(name, kind, task, prompt, options) for task, prompt in chosen]


def _tasks(environment: LoadedEnvironment, count: int, first: int, seed: int) -> list[Any]:
    """Return tasks in an order that depends on the seed: all of a finite environment, enough of one without end."""
    end = first + _DRAWS * count if environment.infinite else None
    listed = list(islice(environment.tasks(), first, end))
    random.Random(f"{PACKAGE}/{seed}").shuffle(listed)
    return listed


def _row(name: str, kind: Kind, task: dict[str, Any], prompt: Messages, options: dict[str, Any]) -> Row:
    answer = task.get("answer")
    if kind == "sft":
        if not isinstance(answer, str) or not answer:
            raise ConfigError(
                f"data.sft.source = {PACKAGE}:{name}: its tasks have no `answer`, so there are no demonstrations; take sft rows from a"
                " different source, or align the base model with align.start: base"
            )
        return {"prompt": prompt, "completion": answer}
    record = json.dumps({"options": options, "task": task}, sort_keys=True)
    return {"prompt": prompt, "answer": str(answer or task.get("name") or "none"), ENTRY: record}


def __getattr__(name: str) -> ReplayedEnvironment:
    """Return an environment as an attribute, so that `posttrain.environments.verifiers:MODULE` is an import path."""
    if name.startswith("_") or name == "ENVIRONMENT":
        raise AttributeError(name)
    return environment_of(name)
