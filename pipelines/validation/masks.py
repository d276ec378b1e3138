"""Which tokens of a row are trained, as parts of its text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pipelines.data.tables import EXPERT, TEXT, Row, Table
from posttrain.errors import DataError

if TYPE_CHECKING:
    from posttrain.data.conversations import TrainOn
    from posttrain.data.tokens import TextEncoder, Tokens

Part = tuple[str, int, bool]
"""Text, its number of tokens, and whether they are trained."""
_READ = frozenset(
    ("role", "content", "name", "weight", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")
)
"""Fields of a turn that are read, or counted in their own way."""
OTHER_PROMPT = (
    "answers that training shows after a different text than the prompt of sampling, because the chat template opens them differently, such"
    " as with <think>, or shows other parts of earlier turns"
)
HIDDEN = "earlier turns whose reasoning the chat template leaves out"
EACH = ", so that they train without it; sft.train_on: each trains every answer with its reasoning"
CONTROL = "turns whose text spells a token of the chat template, such as <|im_end|>, which is read as that token"
NO_END = "answers that train no end, because the chat template closes them, before a further turn, with no token that stops sampling"


def trained_parts(
    encoder: TextEncoder, table: Table, row: Row, train_on: TrainOn = "completion"
) -> dict[str, list[Part]]:
    """Return the parts of each trained column; of a table without answers, the prompt as the model is going to see it.

    `train_on` is `sft.train_on`, which holds for the rows of the stage sft; those of `data.experts` follow it only if it is `each`.
    """
    from posttrain.data.tokens import Tokens, demonstrated_as, row_tools

    name, tools = str(row["id"]), row_tools(row)
    columns = [column for column in TEXT[table] if column != "prompt"]
    if not columns:
        return {"prompt": _parts(encoder, Tokens(tuple(encoder.prompt(row["prompt"] or "", tools, name)), ()))}
    if table != "sft":
        train_on = "completion"
    elif row.get(EXPERT):
        train_on = demonstrated_as(train_on)
    if train_on == "each":
        answers = encoder.answers(row["prompt"] or "", row["completion"] or "", name, tools)
        return {f"completion, answer {i} of {len(answers)}": _parts(encoder, t) for i, t in enumerate(answers, 1)}
    found = {
        column: encoder.tokens(row["prompt"] or "", row[column] or "", name, tools, train_on) for column in columns
    }
    return {
        column: _parts(encoder, tokens.with_prompt() if train_on == "all" else tokens)
        for column, tokens in found.items()
    }


def _parts(encoder: TextEncoder, tokens: Tokens) -> list[Part]:
    weights = tokens.weights or (1.0,) * len(tokens.response)
    marked = [(i, False) for i in tokens.prompt] + [
        (i, weight != 0) for i, weight in zip(tokens.response, weights, strict=True)
    ]
    parts = []
    for trained, group in groupby(marked, key=lambda pair: pair[1]):
        ids = [i for i, _ in group]
        parts.append((str(encoder.tokenizer.decode(ids, skip_special_tokens=False)), len(ids), trained))
    return parts


def left_out(encoder: TextEncoder, table: Table, rows: Sequence[Row], train_on: TrainOn = "completion") -> Counter[str]:
    """Return how often the chat template trains or shows something else than one may expect of a table's conversations.

    It may leave out earlier reasoning or other fields of a turn, begin sampling with a different prompt, close answers without an end, or
    read a turn's text as its own tokens.
    """
    from posttrain.data.conversations import as_messages
    from posttrain.data.tokens import row_tools
    from posttrain.data.turn_texts import hidden_reasoning

    counts: Counter[str] = Counter()
    marks = encoder.template.control_tokens()
    for row in rows:
        each = train_on == "each" and table == "sft"
        for column in [column for column in TEXT[table] if column != "prompt"] or [""]:
            prompt, answer = row["prompt"] or "", (row[column] or "") if column else ""
            if isinstance(prompt, str) and isinstance(answer, str):
                continue
            messages = [*as_messages(prompt, "user"), *(as_messages(answer, "assistant") if column else ())]
            messages = encoder.template.suited(messages, row_tools(row), not column)
            try:
                text = encoder.template.render(messages, row_tools(row), generate=not column, row=str(row["id"]))
            except DataError:  # the rule chat_template has reported the row
                continue
            counts[HIDDEN + EACH * (table == "sft")] += 0 if each else len(hidden_reasoning(text, messages))
            counts["turns whose `name` the chat template leaves out"] += sum(
                str(turn["name"]) not in text for turn in messages if turn.get("name") and turn["role"] != "tool"
            )
            counts[CONTROL] += sum(any(mark in str(turn.get("content")) for mark in marks) for turn in messages)
            counts += _fields(encoder, messages, text, row, generate=not column)
            for part in _trained(prompt, answer, each) if column else ():
                counts += _answers(encoder, *part, row, each)
    return +counts


def _trained(prompt: Any, answer: Any, each: bool) -> Iterator[tuple[Any, Any]]:
    """Yield prompt and answer, or with `each` those of every trained answer."""
    from posttrain.data.tokens import asked_and_answered

    if not each:
        yield prompt, answer
        return
    yield from ((asked, [answered]) for asked, answered in asked_and_answered(prompt, answer))


def _fields(encoder: TextEncoder, messages: Sequence[Any], text: str, row: Row, generate: bool) -> Counter[str]:
    """Return how many turns have a field without which the text is the same, by the field's name."""
    from posttrain.data.tokens import row_tools

    found: Counter[str] = Counter()
    for name in sorted({key for turn in messages for key in turn if key not in _READ}):
        without = [{key: value for key, value in turn.items() if key != name} for turn in messages]
        try:
            unread = encoder.template.render(without, row_tools(row), generate, str(row["id"])) == text
        except DataError:  # the template needs the field
            continue
        found[f"turns whose `{name}` the chat template leaves out"] += unread * sum(name in turn for turn in messages)
    return found


def _answers(encoder: TextEncoder, prompt: Any, answer: Any, row: Row, each: bool) -> Counter[str]:
    """Return how many trained answers of a row follow a different prompt than in sampling, or train no end."""
    from posttrain.data.conversations import as_messages
    from posttrain.data.tokens import row_tools

    tools, train_on = row_tools(row), "each" if each else "completion"
    asked, answered = as_messages(prompt, "user"), as_messages(answer, "assistant")
    messages = [*asked, *answered]
    try:
        text, spans = encoder.template.spans(asked, answered, tools, train_on, str(row["id"]))
        several = any(span.turn < len(messages) - 1 for span in spans)
        tokens = encoder.tokens(prompt, answer, str(row["id"]), tools) if several else None
    except DataError:  # the rule chat_template has reported the row
        return Counter()
    elsewhere = sum(not encoder.template.is_asked(messages, span, text, tools) for span in spans)
    ids = () if tokens is None else tokens.response
    weights = (*((tokens.weights if tokens else None) or (1.0,) * len(ids)), 0.0)
    last = [ids[i] for i in range(len(ids)) if weights[i] and not weights[i + 1]]
    return Counter({OTHER_PROMPT: elsewhere, NO_END: sum(token not in encoder.ends for token in last)})


def samples(
    encoder: TextEncoder, tables: Mapping[Table, Sequence[Row]], count: int, train_on: TrainOn = "completion"
) -> list[tuple[str, list[Part]]]:
    """Return the first `count` rows of each table with their trained parts; `train_on` is `sft.train_on`."""
    return [
        (f"{table} {row['id']}, {column}", parts)
        for table, rows in sorted(tables.items())
        for row in rows[:count]
        for column, parts in trained_parts(encoder, table, row, train_on).items()
    ]
