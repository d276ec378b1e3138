"""Run an environment of the package verifiers on the turns of a conversation so far, up to its next message.

verifiers gives an environment agents, and the environment asks them for turns. Here the only agent reads its turns from a list. If the
list is used up, the run stops at that place with the environment's message or, at the end of a conversation, is told that the model has
finished, so that the task is scored.

Example:
    >>> texts([{"role": "user", "content": "Guess."}, {"role": "assistant", "content": "4"}])
    ['Guess.', '4']
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import random
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from posttrain.errors import ConfigError, RolloutError
from posttrain.text import one_line


@dataclass(frozen=True)
class Episode:
    """Result of a replay: the environment's next message, or the reward of the finished conversation."""

    message: str | None = None
    reward: float | None = None


class _TurnWanted(BaseException):
    """The environment asks for a turn beyond the list. No environment that catches Exception stops it."""

    def __init__(self, message: str | None) -> None:
        super().__init__(message)
        self.message = message


class LoadedEnvironment:
    """An environment of verifiers with one agent, whose tasks need no container and no tools."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        loaders = import_module("verifiers.v1.utils.loaders")
        try:
            self.own = loaders.load_environment(loaders.resolve_env_config({"taskset": {"id": name, **options}}))
        except Exception as error:  # the import and the configuration run a package's code, which may raise anything
            raise ConfigError(
                f"verifiers:{name}: cannot be loaded with the options {dict(options)}: {one_line(str(error))}"
            ) from error
        self.name, self.kind = name, type(self.own.taskset).task_type()
        self._check()

    def _check(self) -> None:
        agents = import_module("verifiers.v1.configs.agent").agent_config_fields(self.own.config)
        taskset = self.own.taskset
        reasons = {
            f"it has {len(agents)} agents ({', '.join(agents)}), and one is trained here": len(agents) != 1,
            "its tasks need a container": self.kind.NEEDS_CONTAINER,
            "it starts tool servers": bool(taskset.toolsets(taskset.config) or self.kind.toolsets(taskset.config.task)),
            "its tasks prepare or read a runtime": self._reads_runtime(),
        }
        if found := [reason for reason, holds in reasons.items() if holds]:
            raise ConfigError(
                f"verifiers:{self.name} cannot be used here: {'; '.join(found)}. Choose a different environment."
            )

    def _reads_runtime(self) -> bool:
        base = import_module("verifiers.v1.task").Task
        prepared = any(getattr(self.kind, hook) is not getattr(base, hook) for hook in ("setup", "finalize"))
        marked = (value for owner in self.kind.__mro__ for value in vars(owner).values() if hasattr(value, "reward"))
        return prepared or any("runtime" in inspect.signature(function).parameters for function in marked)

    @property
    def infinite(self) -> bool:
        """Return True if the tasks have no end."""
        return bool(self.own.taskset.INFINITE)

    def tasks(self) -> Iterator[Any]:
        """Yield the environment's tasks in its order."""
        yield from self.own.taskset

    def record(self, task: Any) -> dict[str, Any]:
        """Return a task as plain values, from which `task` makes it again."""
        values: dict[str, Any] = task.data.model_dump(mode="json", exclude_defaults=True)
        return values

    def task(self, record: Mapping[str, Any]) -> Any:
        """Return the task of a record."""
        return self.kind(self.kind.data_type().model_validate(record), self.own.taskset.config.task)

    def prompt(self, task: Any) -> list[dict[str, Any]]:
        """Return the messages before the model's first turn; an environment that speaks first is asked for its message."""
        messages = _prompt_messages(task)
        if task.data.prompt is None:
            first = play(self, task, [], final=False).message
            messages.append({"role": "user", "content": first or ""})
        return messages


@cache
def load(name: str, options: str) -> LoadedEnvironment:
    """Return the environment of a taskset with its options as JSON. Raises ConfigError if it cannot be used."""
    return LoadedEnvironment(name, json.loads(options))


def play(environment: LoadedEnvironment, task: Any, turns: Sequence[Mapping[str, Any]], final: bool) -> Episode:
    """Run the environment on a conversation, given as the turns after the prompt.

    Args:
        final: the conversation has ended. The model is silent if it is asked again, and the task is scored.

    Raises:
        RolloutError: the environment's messages differ from those in `turns`, or it opens several conversations.
    """
    player = _Player(environment.name, task, turns, final)
    with _seeded(json.dumps(environment.record(task), sort_keys=True)):
        try:
            asyncio.run(_episode(environment.own, task, player))
        except _TurnWanted as wanted:
            return Episode(message=wanted.message or "")
    rewards = [reward for trace in player.traces for reward in trace.rewards.values() if reward is not None]
    return Episode(reward=sum(float(reward.value) for reward in rewards) if rewards else None)


async def _episode(own: Any, task: Any, player: _Player) -> None:
    v1 = import_module("verifiers.v1")
    agents = v1.Agents(own.config, lambda name, spec: player)
    await own.setup(agents)
    await own.run(task, agents)
    recorded = import_module("verifiers.v1.trace").TraceTask(type=type(task).__name__, data=task.data)
    episode = v1.Episode(env=v1.EnvInfo(id=own.config.env_id), task=recorded)
    episode.traces.extend(player.traces)
    await own.finalize(task, episode)


class _Player:
    """The agent that the environment plays with; its turns are those of the list."""

    def __init__(self, name: str, task: Any, turns: Sequence[Mapping[str, Any]], final: bool) -> None:
        self.name, self.task, self.turns, self.final = name, task, list(turns), final
        self.trainable, self.opened = True, False
        self.traces: list[Any] = []

    async def run(self, task: Any, **_: Any) -> Any:
        """Take one turn on the task."""
        async with self.interaction(task) as interaction:
            await interaction.turn()
        return interaction.trace

    @asynccontextmanager
    async def interaction(self, task: Any, **_: Any) -> AsyncIterator[_Interaction]:
        """Open the conversation; score its task at the end."""
        if self.opened:
            raise RolloutError(
                f"verifiers:{self.name} opens several conversations for one task; here a task is one conversation"
            )
        self.opened = True
        interaction = _Interaction(self, task)
        yield interaction
        interaction.trace.stop("user_closed")
        interaction.trace.ok = True
        await task.score(interaction.trace)
        self.traces.append(interaction.trace)


class _Interaction:
    """The conversation as an environment drives it: a turn of the user, then the model's."""

    def __init__(self, player: _Player, task: Any) -> None:
        self.player, self.task, self.place = player, task, 0
        self.trace = _new_trace(task)
        for message in _prompt_messages(task):
            _append(self.trace, message, sampled=False)

    async def turn(self, message: Any = None) -> Any:
        """Return the model's next turn as a segment, terminated if there is none."""
        v1, asked = import_module("verifiers.v1"), None if message is None else _text(message)
        if await self._stops() or (self.place >= len(self.player.turns) and self.player.final):
            self.trace.stop("max_turns")
            return v1.Segment(messages=[], terminated=True)
        if asked is not None:
            self._check_same(asked)
            _append(self.trace, {"role": "user", "content": asked}, sampled=False)
        if self.place >= len(self.player.turns):
            raise _TurnWanted(asked)
        said = _append(self.trace, self.player.turns[self.place], sampled=True)
        self.place += 1
        return v1.Segment(messages=[said])

    def _check_same(self, message: str) -> None:
        """Raise RolloutError if a message of the replay differs from the one in the conversation."""
        if self.place == 0 or self.place >= len(self.player.turns):
            return
        before = str(self.player.turns[self.place]["content"])
        self.place += 1
        if message != before:
            raise RolloutError(
                f"verifiers:{self.player.name} is not deterministic: its reply was {before[:80]!r}, and with the same turns it is now"
                f" {message[:80]!r}. Replies must depend only on the task and the turns; use a different environment"
            )

    async def _stops(self) -> bool:
        session = import_module("verifiers.v1.session")
        trace = import_module("verifiers.v1.trace").Trace
        stops = [hook for hook in self.task.hooks("stop") if session.hook_boundary(hook, allow_trace=True) is trace]
        return any([await session.call_hook(hook, {trace: self.trace}) for hook in stops]) if self.place else False


def texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the text of each message."""
    return [_text(message["content"]) for message in messages]


def _prompt_messages(task: Any) -> list[dict[str, Any]]:
    system, prompt = task.data.system_prompt, task.data.prompt
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    if isinstance(prompt, str):
        return [*messages, {"role": "user", "content": prompt}]
    return messages + [{"role": message.role, "content": _text(message.content)} for message in prompt or []]


def _text(content: Any) -> str:
    """Return the text of a message's content. Raises ConfigError if it holds anything else, such as an image."""
    if isinstance(content, str):
        return content
    parts = [part if isinstance(part, dict) else part.model_dump() for part in content or []]
    if all("content" in part for part in parts):  # whole messages
        return "\n\n".join(_text(part["content"]) for part in parts)
    if any(part.get("type") != "text" for part in parts):
        raise ConfigError(
            "an environment of verifiers shows the model something other than text; only text is supported"
        )
    return "".join(str(part["text"]) for part in parts)


def _new_trace(task: Any) -> Any:
    module = import_module("verifiers.v1.trace")
    config = import_module("verifiers.v1.configs.agent").AgentConfig()
    recorded = module.TraceTask(type=type(task).__name__, data=task.data)
    return module.Trace(task=recorded, agent=module.AgentInfo(config=config))


def _append(trace: Any, message: Mapping[str, Any], sampled: bool) -> Any:
    types, graph = import_module("verifiers.v1.types"), import_module("verifiers.v1.graph")
    kinds = {"system": types.SystemMessage, "user": types.UserMessage, "assistant": types.AssistantMessage}
    if message["role"] not in kinds:
        raise ConfigError(f"a message of the role {message['role']!r} in an environment of verifiers is not supported")
    made = kinds[message["role"]](content=message["content"])
    parent = len(trace.nodes) - 1 if trace.nodes else None
    trace.nodes.append(graph.MessageNode(parent=parent, message=made, sampled=sampled))
    return made


@contextmanager
def _seeded(key: str) -> Iterator[None]:
    """Give the global generators of Python and NumPy a seed from `key`, and their old states back afterwards."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
