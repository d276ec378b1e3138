"""Environments that an OpenEnv server runs, in its own process and its own Python environment.

A source `openenv:name` is the server whose address, such as http://127.0.0.1:8000, POSTTRAIN_OPENENV_NAME holds.
The package openenv clashes with this project's dependencies, so only its protocol over a WebSocket is used (extra `openenv`).

A row is a seed. Each reply resets a new session with that seed and repeats the turns so far, so nothing lives between two turns. An
environment that answers differently after the same seed and turns is refused. The reward is the sum of the steps' rewards.

Example:
    >>> shown({"echo": "hi", "reward": 0.0}, None), shown({"echo": "hi"}, "echo")
    ('{"echo": "hi", "reward": 0.0}', 'hi')
    >>> address_variable("name")
    'POSTTRAIN_OPENENV_NAME'
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Mapping
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

from posttrain.environments.base import Conversation
from posttrain.environments.parts import Kind, Row, distinct
from posttrain.environments.replayed import ENTRY, ReplayedEnvironment, Turns
from posttrain.errors import ConfigError, RolloutError

PACKAGE = "openenv"
SECONDS = 60.0
"""A server that has not answered by then is considered hung."""
_BYTES = 2**24
"""Largest message of a server."""


@dataclasses.dataclass(frozen=True)
class Session:
    """State of an environment after some turns: its newest message, the sum of rewards, and whether the episode is over."""

    message: str
    reward: float | None
    done: bool


@cache
def environment_of(name: str) -> ReplayedEnvironment:
    """Return the environment of a server. Raises ConfigError if the extra is not installed or no address is set."""
    if find_spec("websockets") is None:
        raise ConfigError(
            "a source openenv:NAME needs the package websockets; install it with: pip install -c constraints.txt '.[openenv]'"
        )
    _address(name)
    return ReplayedEnvironment(
        name, partial(_rows, name), _exact, partial(_reply, name), package=PACKAGE,
        score=lambda entry, turns: session(name, entry, turns).reward,
    )  # fmt: skip


def address_variable(name: str) -> str:
    """Return the variable that names the address of a server."""
    return f"POSTTRAIN_OPENENV_{name.upper()}"


def session(name: str, entry: str, turns: Turns) -> Session:
    """Reset a new session with the entry's seed and repeat the model's turns.

    Raises:
        RolloutError: the server does not answer, refuses an action, or differs from the conversation.
    """
    from websockets.exceptions import WebSocketException
    from websockets.sync.client import connect

    known = json.loads(entry)
    options = known["options"]
    try:
        with connect(
            f"{_address(name)}/ws", max_size=_BYTES, open_timeout=SECONDS, close_timeout=1, proxy=None
        ) as socket:
            found = _ask(name, socket, "reset", {**options["reset"], "seed": known["seed"]})
            total = None
            for turn in turns:
                message = shown(found["observation"], options["observation"])
                if turn["role"] != "assistant":
                    _check_same(name, message, str(turn["content"]))
                    continue
                if found.get("done"):
                    break
                found = _ask(name, socket, "step", {**options["action"], options["field"]: str(turn["content"])})
                reward = found.get("reward")
                total = total if reward is None else (total or 0.0) + float(reward)
            return Session(shown(found["observation"], options["observation"]), total, bool(found.get("done")))
    except (OSError, WebSocketException) as error:
        raise RolloutError(
            f"{PACKAGE}:{name}: the server at {_address(name)} does not answer ({error}); is it running, and its limit of sessions large"
            " enough?"
        ) from error


def shown(observation: Mapping[str, Any], field: str | None) -> str:
    """Return an observation as the model reads it: one field, or all of it as JSON."""
    if field is None:
        return json.dumps(observation, sort_keys=True, ensure_ascii=False)
    if field not in observation:
        raise ConfigError(
            f"observation: {field!r} is no field of the observation, which has {', '.join(sorted(observation))}"
        )
    value = observation[field]
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def _ask(name: str, socket: Any, kind: str, data: dict[str, Any]) -> dict[str, Any]:
    socket.send(json.dumps({"type": kind, "data": data}))
    answer = json.loads(socket.recv(timeout=SECONDS))
    if answer.get("type") != "observation":
        raise RolloutError(f"{PACKAGE}:{name}: the server refused {kind} with {json.dumps(answer)[:300]}")
    found: dict[str, Any] = answer["data"]
    return found


def _check_same(name: str, message: str, before: str) -> None:
    if message != before:
        raise RolloutError(
            f"{PACKAGE}:{name} is not deterministic: after the same seed and turns it answered {before[:80]!r} and now {message[:80]!r}."
            " Its replies must depend only on the seed and the turns"
        )


def _address(name: str) -> str:
    address = os.environ.get(address_variable(name), "").rstrip("/")
    scheme, separator, rest = address.partition("://")
    if scheme not in ("http", "https") or not separator:
        raise ConfigError(
            f"{PACKAGE}:{name}: set {address_variable(name)} to the address of the server, such as http://127.0.0.1:8000"
        )
    return f"{'ws' if scheme == 'http' else 'wss'}://{rest}"


def _reply(name: str, conversation: Conversation) -> list[dict[str, Any]] | None:
    """Return the observation after the model's newest turn; None at the end of the episode."""
    places = [place for place, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    turns = conversation.messages[places[-conversation.turn] :]
    found = session(name, conversation.columns[ENTRY], turns)
    return None if found.done else [{"role": "user", "content": found.message}]


def _exact(completion: str, answer: str) -> float:
    """Return 1 if the completion is the reference answer; without the entry the server cannot be asked."""
    return float(completion.strip() == answer.strip())


def _rows(
    name: str,
    kind: Kind,
    count: int,
    seed: int,
    *,
    field: str = "message",
    observation: str | None = None,
    action: Mapping[str, Any] | None = None,
    reset: Mapping[str, Any] | None = None,
) -> list[Row]:
    """Return `count` rows of one table, each with its own seed, whose number precedes the first observation.

    Args:
        field: field of the action that takes the model's answer.
        observation: field of the observation that the model reads; None: all of it as JSON.
        action: other fields of every action.
        reset: arguments of every reset.

    Raises:
        ConfigError: the table needs demonstrations.
    """
    if kind in ("sft", "preferences"):
        raise ConfigError(
            f"data.{kind}.source = {PACKAGE}:{name}: an environment has no demonstrations; take these rows from a different source"
        )
    rng = random.Random(f"{PACKAGE}/{kind}/{seed}")
    draws = (str(rng.randrange(2**31)) for _ in range(40 * count))
    options = {"field": field, "observation": observation, "action": dict(action or {}), "reset": dict(reset or {})}
    rows = []
    for number in distinct(kind, count, draws, str, "Ask for fewer rows."):
        entry = json.dumps({"seed": int(number), "options": options}, sort_keys=True)
        first = session(name, entry, []).message
        prompt = [{"role": "user", "content": f"Episode {number}.\n\n{first}"}]
        rows.append({"prompt": prompt, "answer": number, ENTRY: entry})
    return rows


def __getattr__(name: str) -> ReplayedEnvironment:
    """Return an environment as an attribute, so that `posttrain.environments.openenv:NAME` is an import path."""
    if name.startswith("_") or name == "ENVIRONMENT":
        raise AttributeError(name)
    return environment_of(name)
