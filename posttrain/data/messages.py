"""Whole conversations: which turns are learnt, and how much each counts.

Example:
    >>> asked, answered, greets = parted([{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}])
    >>> asked, answered, greets
    ([{'role': 'user', 'content': '1+1='}], [{'role': 'assistant', 'content': '2'}], False)
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.errors import DataError
from posttrain.text import shortened

ROLES = {
    "human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "system": "system", "user": "user", "assistant": "assistant", "tool": "tool", "developer": "developer",
    "observation": "tool", "function_response": "tool", "function": "tool",
}  # fmt: skip
"""How data sets spell the roles of messages, in small letters, and the roles that chat templates know."""
INSTRUCTING = ("system", "developer")
"""Roles of messages that instruct the assistant and ask nothing; `developer` is a newer name of `system`."""
WEIGHTS = ("weight", "train", "trainable", "training", "loss", "loss_weight", "loss_mask")
"""Keys of a message that say how much its tokens count in the loss: true, false, or a number that is not negative."""
MARKS = ("weights", "mask", "labels")
"""Names of columns, besides `WEIGHTS`, that may say which tokens of a row are trained."""
_TRAINING = frozenset((
    "train", "trained", "trainable", "training", "untrained", "finetune", "loss", "losses", "mask", "masks", "masked", "masking",
    "weight", "weights", "weighted", "weighting", "supervise", "supervised", "supervision", "ignore", "ignored", "learn", "learned",
    "learnable", "skip", "skipped", "exclude", "excluded", "labels", "backprop", "grad",
))  # fmt: skip
"""Words in the names of keys that may say which tokens are trained."""
_ALMOST = 0.75
"""Similarity from which the name of a role is a misspelling."""
_REPEATED = 16
"""Characters from which a prompt at the beginning of an answer is no accident."""
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def role_of(name: str, where: str) -> str:
    """Return a role as chat templates name it; an unknown one, such as `critic`, stays.

    Raises:
        DataError: it is a misspelling of a known one.

    Example:
        >>> role_of("GPT", "row 0"), role_of("critic", "row 0")
        ('assistant', 'critic')
    """
    spelt = name.strip().lower()
    close = difflib.get_close_matches(spelt, ("user", "assistant", "system"), n=1, cutoff=_ALMOST)
    if spelt not in ROLES and close:
        raise DataError(f"{where}: the role is {shortened(name)}; did you mean {close[0]!r}? Correct the row")
    return ROLES.get(spelt, name.strip())


def one_reading(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a message with `role` and `content`, which may be spelt `from` and `value`, and its other fields.

    A null, or an empty text next to a text, counts as absent. The result lacks a key if the message has neither spelling of it.

    Raises:
        DataError: two roles, or two texts, contradict each other: only one of them would be read.

    Example:
        >>> one_reading({"from": "human", "value": "a"}, "row 0"), one_reading({"role": "user", "value": "a", "content": None}, "row 1")
        ({'role': 'human', 'content': 'a'}, {'role': 'user', 'content': 'a'})
    """
    found = dict(turn)
    author, said = found.get("from"), found.get("value")
    if found.get("role") is None and "from" in found:
        found["role"] = found.pop("from")
    elif isinstance(author, str) and isinstance(found.get("role"), str) and author.strip().lower() in ROLES:
        if ROLES[author.strip().lower()] != role_of(found["role"], where):
            raise DataError(
                f"{where}: its role is {shortened(found['role'])} and its from {shortened(author)}; leave only the right one"
            )
        del found["from"]
    text = found.get("content")
    if text is None or (text == "" and isinstance(said, str)):
        found |= {"content": found.pop("value")} if "value" in found else {}
    elif isinstance(said, str):
        if said not in ("", text):
            raise DataError(
                f"{where}: its content is {shortened(text)} and its value {shortened(said)}, and only one of them would be read; leave only"
                " the right one"
            )
        del found["value"]
    ordered = {key: found[key] for key in ("role", "content") if key in found}
    return ordered | found


def says_training(name: str) -> bool:
    """Return True if the name of a key or column may say which tokens are trained, such as `train_detail` or `lossMask`."""
    return any(word.lower() in _TRAINING for word in _WORD.findall(name))


def weighted(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the message with its weight under the key `weight`, whatever key of `WEIGHTS` it has; without one if it has none.

    Raises DataError for a value that is no weight, for keys that contradict each other, and for other keys that may say which tokens
    are trained.
    """
    others = {key: value for key, value in turn.items() if key not in WEIGHTS}
    given = {key: turn[key] for key in WEIGHTS if turn.get(key) is not None}
    for key, value in others.items():
        if value is not None and isinstance(key, str) and says_training(key):
            raise DataError(
                f"{where}: the key {key!r} ({shortened(value)}) may say which tokens are trained, and is not read. Write `weight: 0` into"
                " each message that must not be trained, or rename the key if it means something else."
            )
    for key, value in given.items():
        number = value.item() if getattr(value, "shape", None) == () else value
        if not isinstance(number, int | float) or not 0 <= number <= sys.float_info.max:
            raise DataError(
                f"{where}: {key} is {shortened(value)}; it must be true, false, or a finite number that is not negative"
            )
        given[key] = float(number)
    if len(set(given.values())) > 1:
        shown = ", ".join(f"{key}: {turn[key]}" for key in given)
        raise DataError(
            f"{where}: {shown} contradict each other, and only one of them would be used; leave only `weight`"
        )
    return others | ({"weight": next(iter(given.values()))} if given else {})


def require_whole_weights(turns: Any, where: str) -> None:
    """Raise DataError for an answer's turn whose weight is neither 0 nor 1: only imitation (sft) weighs tokens."""
    for i, turn in enumerate(turns if isinstance(turns, list) else ()):
        if isinstance(turn, Mapping) and turn.get("weight", 1.0) not in (0, 1):
            raise DataError(
                f"{where}, turn {i}: its weight is {turn['weight']:g}, and here a turn counts or not: only imitation (sft) weighs tokens."
                " Give 1 or 0, or remove the weight"
            )


def parted(turns: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[Any], bool]:
    """Return the turns before the first answer, those from it on, and True if the conversation begins with the assistant.

    Its greeting answers nothing, so it belongs to the first part and is not trained.
    """
    asked = [i for i, turn in enumerate(turns) if turn["role"] not in INSTRUCTING]
    greets = bool(asked) and turns[asked[0]]["role"] == "assistant"
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"][1 if greets else 0 :]
    first = answers[0] if answers else len(turns)
    return list(turns[:first]), list(turns[first:]), greets


def once_each(row: Mapping[str, Any], answers: Sequence[str], where: str) -> tuple[dict[str, Any], bool]:
    """Return the row with answers that do not repeat its prompt, and True if one did; an answer of nothing else becomes None.

    Raises:
        DataError: an answer begins with turns that are not the prompt, or the answers repeat different prompts.
    """
    read = {name: without_prompt(row["prompt"], row[name], where) for name in answers}
    if not any(repeated for _, _, repeated in read.values()):
        return dict(row), False
    prompts = [[{"role": "user", "content": one}] if isinstance(one, str) else [*one] for one, _, _ in read.values()]
    if any(prompt != prompts[0] for prompt in prompts):
        raise DataError(f"{where}: {' and '.join(answers)} begin with different prompts; correct or remove the row")
    return {**row, "prompt": prompts[0]} | {name: answer or None for name, (_, answer, _) in read.items()}, True


def refuse_repeated_texts(rows: Sequence[Mapping[str, Any]], answers: Sequence[str], where: str) -> int:
    """Return in how many rows each answer is a text that begins with the whole prompt; a prompt below 16 characters does not count.

    Raises:
        DataError: it is so in all of several rows, so that two columns hold the prompt.
    """
    found = [i for i, row in enumerate(rows) if all(_begins(row["prompt"], row[name]) for name in answers)]
    if len(found) == len(rows) > 1:
        first = rows[0]
        raise DataError(
            f"{where}: in every row {' and '.join(answers)} begin{'s' * (len(answers) == 1)} with the whole text of the prompt (row 0:"
            f" {shortened(first['prompt'], 40)}), so the model would read the question twice and learn to repeat it. Remove the prompt"
            " from the answers' texts. If answers shall repeat the question, write both as chat messages."
        )
    return len(found)


def _begins(prompt: Any, answer: Any) -> bool:
    texts = isinstance(prompt, str) and isinstance(answer, str)
    return texts and len(prompt.strip()) >= _REPEATED and answer.strip().startswith(prompt.strip())


def without_prompt(prompt: Any, answer: Any, where: str) -> tuple[Any, Any, bool]:
    """Return prompt and answer with each turn once, and True if the answer repeated turns of the prompt, as many data sets do.

    Only an answer of messages is read. A prompt that is text is then the user's turn. Weights and white space at the ends do not count.

    Raises:
        DataError: the answer begins with a turn of the user or the system that is not the prompt's last one.

    Example:
        >>> user, assistant = {"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}
        >>> without_prompt("1+1=", [user, assistant], "row 0")
        ([{'role': 'user', 'content': '1+1='}], [{'role': 'assistant', 'content': '2'}], True)
    """
    if isinstance(answer, str) or not answer:
        return prompt, answer, False
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    old, new = [*map(_said, asked)], [*map(_said, answer)]
    for count in range(min(len(old), len(new)), 0, -1):
        if old[-count:] == new[:count]:
            return asked, list(answer[count:]), True
    first = next((i for i, turn in enumerate(answer) if turn["role"] == "assistant"), len(answer))
    if old and old[-1] in new[:first] and len(old) == 1:
        return list(answer[:first]), list(answer[first:]), True
    if new[0][0] in ("user", *INSTRUCTING) and old and old[-1][0] == "user":
        raise DataError(
            f"{where}: the answer begins with a turn of {answer[0]['role']} that is not the prompt: {shortened(answer[0]['content'])}, and"
            f" the prompt ends with {shortened(asked[-1]['content'])}. Write all turns before the answer into the prompt, or leave the"
            " prompt out and give whole conversations"
        )
    return prompt, answer, False


def _said(turn: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return role, text and other fields of a turn without its weight, to compare it."""
    others = {
        key: value for key, value in turn.items() if key not in ("role", "content", *WEIGHTS) and value is not None
    }
    return turn["role"], (turn.get("content") or "").strip(), others


def is_tool(value: Any) -> bool:
    """Return True if the value describes one tool: it has a function, a name or a type. A dictionary of tools by name is none.

    Example:
        >>> is_tool({"type": "function", "function": {"name": "add"}}), is_tool({"name": "add"}), is_tool({"add": {}})
        (True, True, False)
    """
    if not isinstance(value, Mapping):
        return False
    return isinstance(value.get("function"), Mapping) or any(
        isinstance(value.get(key), str) for key in ("name", "type")
    )


def thumb(value: Any, where: str) -> bool:
    """Return a label as a boolean. Raises DataError unless it is true or false, 1 or 0, also as text in any case.

    Example:
        >>> thumb(True, "row 0: label"), thumb("False", "row 1: label"), thumb(1.0, "row 2: label")
        (True, False, True)
    """
    found = _read_thumb(value)
    if found is None:
        raise DataError(
            f"{where} is {shortened(value)}; it must be true (thumbs up) or false (thumbs down), or 1 or 0. Write these into the"
            " column in place of other labels, such as 'good' or -1"
        )
    return found


def is_thumb(value: Any) -> bool:
    """Return True if `thumb` reads the value."""
    return _read_thumb(value) is not None


def _read_thumb(value: Any) -> bool | None:
    given = value.item() if getattr(value, "shape", None) == () else value
    named = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
    return named.get(str(given).strip().lower())
