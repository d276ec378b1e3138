"""Check the replies of a server: garbage is a fault of the server, and must reach neither the probe nor training.

Example:
    >>> sampled({"token_ids": [7], "logprobs": {"token_logprobs": [-0.5]}}, "http://x", most=1, vocabulary=8)
    ((7,), (-0.5,))
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.errors import RolloutError, ServerError

SHOWN = 200
ROUNDING = 1e-3
"""Log-probability in nats that rounding may leave above 0."""


def field(reply: Any, name: str, url: str) -> Any:
    """Return a field of a reply. Raises RolloutError if it is missing."""
    value = reply.get(name) if isinstance(reply, dict) else None
    if value is None:
        raise RolloutError(
            f"{url} sends no {name}: it is not a vLLM server, or its version is too old (docs/rollouts.md lists the tested version)"
        )
    return value


def first(reply: Any, name: str, url: str) -> dict[str, Any]:
    """Return the first mapping of a list. Raises ServerError if the field holds anything else."""
    found = field(reply, name, url)
    if not isinstance(found, list) or not found or not isinstance(found[0], dict):
        raise _unreadable(url, f"{name} = {_shown(found)}", "a list of objects")
    return found[0]


def served_model(reply: Any, url: str) -> tuple[str, int]:
    """Return name and context length of the first model of `/v1/models`; 0 if no length is given."""
    found = first(reply, "data", url)
    name, length = found.get("id"), found.get("max_model_len") or 0
    if not isinstance(name, str) or not _is_count(length):
        raise _unreadable(url, f"the model {_shown(found)}", "an id and a max_model_len")
    return name, length


def sampled(
    choice: Mapping[str, Any], url: str, most: int, vocabulary: int
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return the tokens of an answer with their log-probabilities.

    Raises:
        ServerError: they are none, more than `most`, no tokens of the vocabulary, or no log-probabilities.
    """
    tokens, logprobs = field(choice, "token_ids", url), field(choice.get("logprobs"), "token_logprobs", url)
    if not isinstance(tokens, list) or not all(_is_count(token) and token < vocabulary for token in tokens):
        raise _unreadable(url, f"token_ids = {_shown(tokens)}", f"whole numbers from 0 to {vocabulary - 1}")
    if not isinstance(logprobs, list) or not all(_is_logprob(value) for value in logprobs):
        raise _unreadable(url, f"token_logprobs = {_shown(logprobs)}", "finite numbers of at most 0")
    if not tokens or len(tokens) > most or len(logprobs) != len(tokens):
        asked = f"from 1 to {most} tokens, each with a log-probability"
        raise _unreadable(url, f"{len(tokens)} tokens with {len(logprobs)} log-probabilities", asked)
    return tuple(tokens), tuple(map(float, logprobs))


def of_prompt(choice: Mapping[str, Any], ids: Sequence[int], url: str) -> list[float]:
    """Return the log-probabilities of ids[1:]. Raises ServerError if one of them is missing or not finite."""
    reported = field(choice, "prompt_logprobs", url)
    entries = reported[1 : len(ids)] if isinstance(reported, list) else []
    found = [
        entry.get(str(token)) if isinstance(entry, dict) else None
        for entry, token in zip(entries, ids[1:], strict=False)
    ]
    values = [one.get("logprob") if isinstance(one, dict) else None for one in found]
    if len(values) != len(ids) - 1 or not all(_is_logprob(value) for value in values):
        raise _unreadable(
            url, f"prompt_logprobs = {_shown(reported)}", f"a finite number for each of {len(ids) - 1} tokens"
        )
    return [float(value) for value in values if value is not None]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_logprob(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value <= ROUNDING


def _unreadable(url: str, sent: str, wanted: str) -> ServerError:
    return ServerError(
        f"{url} sent {sent} in place of {wanted}, so its answers cannot be trained on: restart it, or use the version that"
        " docs/rollouts.md lists"
    )


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
