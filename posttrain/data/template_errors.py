"""Explain why a chat template cannot show a conversation, with advice for the row.

Example:
    >>> error = refusal(ValueError("no system"), [{"role": "system", "content": "Be brief."}], "row 3", lambda: False)
    >>> str(error).partition("Its turns")[0]
    "row 3: the model's chat template refuses the conversation (no system). "
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from posttrain.data.stand_ins import LeftOut
from posttrain.data.turn_texts import shorter
from posttrain.errors import DataError, ModelError, PosttrainError

Message = Mapping[str, Any]


def refusal(
    error: Exception, messages: Sequence[Message], row: str, fails_always: Callable[[], bool]
) -> PosttrainError:
    """Return the error of a template that raised: ModelError for one that is no program, else DataError with advice for the row.

    Args:
        row: how the message names the row.
        fails_always: True if the template refuses every conversation.
    """
    reason = " ".join(str(error).split())
    if type(error).__name__ == "TemplateSyntaxError":
        return ModelError(
            f"{row}: the model's chat template is no valid Jinja ({reason}, line {getattr(error, 'lineno', '?')}), so no conversation can"
            " be shown. Correct chat_template.jinja, or the entry chat_template of tokenizer_config.json, or fetch the model again."
        )
    roles = ", ".join(str(message.get("role")) for message in messages)
    return DataError(
        f"{row}: the model's chat template refuses the conversation ({reason}). Its turns are {roles}."
        f" {_advice(messages, fails_always)}"
    )


def _advice(messages: Sequence[Message], fails_always: Callable[[], bool]) -> str:
    calls = [i for i, message in enumerate(messages) if message.get("tool_calls")]
    if any(message.get("role") == "system" for message in messages):
        return "Put the system message into the user's turn, or take a model whose template allows it."
    if calls:
        empty = "" if messages[calls[0]].get("content") else " which has no text"
        return (
            f"Turn {calls[0]} is a tool call{empty}, and the template may not know tool calls: take a model whose template does, or write"
            " the call as the turn's text."
        )
    if len(messages) > 2 and not fails_always():
        return "It allows a question and its answer: change the order of the turns, or take a model whose template allows it."
    if len(messages) <= 2:
        return "The template may be broken: correct chat_template.jinja, or take a model with a different template."
    return "It refuses a plain question and its answer, too, so it may be broken: correct chat_template.jinja, or take a different model."


def not_shown(messages: Sequence[Message], part: LeftOut, row: str) -> DataError:
    """Return the error of a template that leaves out a part of a turn."""
    turn = messages[part.turn]
    if part.argument is not None:
        name = f"the argument {part.argument!r} of the call in turn {part.turn}"
        advice = "Take a model whose template shows the arguments of calls, or write the call as the turn's text."
    else:
        name = f"the text of turn {part.turn} ({turn.get('role')})"
        advice = (
            "Put it into a turn that the template shows, such as the user's, or take a model with another template."
        )
        if turn.get("tool_calls"):
            advice = "Remove the text that comes with the call, or take a model whose template shows both."
    if turn.get("role") == "assistant" and part.turn < len(messages) - 1:
        advice += " If the template shows it in a last answer, sft.train_on: each trains it there."
    return DataError(f"{row}: the model's chat template leaves out {name}, so the model would never see it. {advice}")


def changed_letters(turn: int, message: Message, text: str, row: str) -> DataError:
    """Return the error of a template that shows a turn in other letters."""
    return DataError(
        f"{row}: the model's chat template changes the letters of turn {turn} ({message.get('role')}), as its filters upper and lower do:"
        f" {shorter(text)} is not in what it shows. The model would learn another text than the row's; take a model with another"
        " template, or correct the template."
    )


def uncertain(turn: int, earlier: bool, row: str) -> DataError:
    """Return the error of a turn whose tokens cannot be separated from those around it; `earlier`: further turns follow."""
    apart = (
        "In sft, train each answer after its own prompt (sft.train_on: each); in a pair, put the turns before the last answer into the"
        " prompt; or use"
        if earlier
        else "Use"
    )
    return DataError(
        f"{row}: it is not certain which tokens of turn {turn} (assistant) the chat template makes, so training could learn other turns'"
        f" text. {apart} a template with {{% generation %}} marks, or remove the row."
    )


def unnamed(where: str, name: str, row: str) -> DataError:
    """Return the error of a template that leaves out the name of a tool or of a call: it may ignore both without an error."""
    return DataError(
        f"{row}: the model's chat template leaves out {name!r} of {where}, so the model would never see it. Take a model"
        " whose template shows tools, or write tools and calls as text."
    )
