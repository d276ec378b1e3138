"""Write the prompt that a teacher reads in place of the student's, for self-distillation: the same model with more in its prompt.

Example:
    >>> teacher_prompt("{prompt} (the answer is {answer})", "1+1=?", {"answer": "2"})
    '1+1=? (the answer is 2)'
    >>> teacher_prompt("{prompt} Think.", [{"role": "user", "content": "1+1=?"}], {})
    [{'role': 'user', 'content': '1+1=? Think.'}]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from posttrain.errors import ConfigError, DataError
from posttrain.text import nearest

if TYPE_CHECKING:  # every step checks params.yaml with this module, and few need tokens
    from posttrain.data.tokens import Text, TextEncoder

SELF = "self"
"""Names the model before training as its own teacher."""
PROMPT = "prompt"
_NAME = re.compile(r"\{(\w+)\}")
_FORMATTED = re.compile(r"(?!\{prompt\})\{\s*(prompt)\b[^{}\n]*\}|\{([A-Za-z_]\w*)[\[!][^{}\n]*\}")
"""A name in braces with an index or a conversion, as str.format reads it."""


def require_template(template: str | None, teacher: object, where: str) -> None:
    """Raise ConfigError if a model is its own teacher without a longer prompt, or a template leaves the prompt out."""
    if template is None or template.strip() == f"{{{PROMPT}}}":
        if teacher == SELF:
            lack = "missing" if template is None else "only the prompt"
            raise ConfigError(
                f"{where}: {lack}. The model before training teaches only what its prompt adds, e.g."
                ' "{prompt} The answer is {answer}."'
            )
        return
    if strange := _FORMATTED.search(template):
        raise ConfigError(
            f"{where} = {template!r}: {strange[0]} is not read. Only the name of a column in braces is replaced, such as"
            f" {{{strange[1] or strange[2]}}}, without an index, an attribute or a format"
        )
    if PROMPT not in _NAME.findall(template):
        raise ConfigError(
            f"{where} = {template!r}: has no {{prompt}}, so every question would have the same teacher's prompt"
        )


def teacher_prompt(template: str, prompt: Text, columns: Mapping[str, Any]) -> Text:
    """Return the prompt with the template around it; of a conversation, its last message has the template around its text.

    Args:
        template: a text with `{prompt}`, and with the name of a column in braces for the row's value.

    Raises:
        DataError: the row has no such column, or the last message is not text.
    """
    if not isinstance(prompt, str):
        last = prompt[-1]
        if not isinstance(last.get("content"), str):
            raise DataError("teacher_prompt: the last message of a prompt is not text")
        return [*prompt[:-1], {**last, "content": teacher_prompt(template, last["content"], columns)}]

    def value(found: re.Match[str]) -> str:
        name = found.group(1)
        if name == PROMPT:
            return prompt
        if columns.get(name) is None:
            there = nearest(name, columns) if columns else "; it has only the prompt"
            raise DataError(f"teacher_prompt: a row of the problems has no column {name!r}{there}")
        return str(columns[name])

    return _NAME.sub(value, template)


def teacher_ids(
    encoder: TextEncoder, template: str | None, row: Mapping[str, Any], longest: int
) -> tuple[int, ...] | None:
    """Return the ids of the teacher's prompt for a row of problems, or None if it reads the student's.

    Args:
        longest: most tokens of an answer, which must fit into the context after the prompt.

    Raises:
        DataError: prompt and answer do not fit into the context.
    """
    from posttrain.data.tokens import row_tools

    if template is None:
        return None
    columns = {name: value for name, value in row.items() if name != PROMPT}
    ids = encoder.prompt(teacher_prompt(template, row[PROMPT], columns), row_tools(dict(row)))
    if len(ids) + longest > encoder.max_length:
        raise DataError(
            f"teacher_prompt: {len(ids)} tokens and an answer of {longest} exceed the model's context of {encoder.max_length}; shorten it,"
            " or lower max_new_tokens"
        )
    return tuple(ids)
