"""Tool calls and results of data sets: arguments that a file's columns fill up, and results in a different order than their calls."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.files import read_file
from pipelines.data.tool_results import MOVED, NULLS, UNASKED
from tests.pipelines.data.records import rows, says, user


def call(name: str, number: str | None = None, **arguments: Any) -> dict[str, Any]:
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made if number is None else {"id": number, **made}


def calls(*made: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": list(made)}


def result(text: str, number: str | None = None) -> dict[str, Any]:
    return {"role": "tool", "content": text} | ({} if number is None else {"tool_call_id": number})


def schema(name: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": properties}},
    }


TOOLS = [schema("weather", city={"type": "string"}), schema("add", x={"type": "integer"}, y={"type": "integer"})]
BOTH = calls(call("weather", city="Graz"), call("add", x=1, y=2))
RECORD = {"messages": [user("a"), BOTH, result("rain"), result("3"), says("b")], "tools": TOOLS}


@pytest.mark.parametrize("compression", ["", ".gz"])
def test_arguments_and_properties_that_only_other_calls_and_tools_have_are_left_out(
    tmp_path: Path, compression: str
) -> None:
    """Arrow stores {"city": "Graz", "x": null, "y": null} and {"city": null, "x": 1, "y": 2}."""
    path = tmp_path / f"rows.parquet{compression}"
    table = pa.Table.from_pylist([RECORD])
    assert table["messages"].to_pylist()[0][1]["tool_calls"][0]["function"]["arguments"]["x"] is None
    with pa.output_stream(path, compression="gzip" if compression else None) as file:
        pq.write_table(table, file)
    changes: Counter[str] = Counter()
    (row,) = rows("sft", *read_file(path), changes=changes)
    assert row["completion"][0]["tool_calls"] == BOTH["tool_calls"]
    assert json.loads(row["tools"]) == TOOLS
    assert changes[NULLS] == 0


def test_values_that_are_null_elsewhere_stay_and_arguments_as_json_keep_theirs(tmp_path: Path) -> None:
    record = {
        "messages": [user("a"), calls(call("add", x=1) | {"function": {"name": "add", "arguments": '{"x": null}'}})]
    }
    pq.write_table(pa.Table.from_pylist([record | {"extra": {"x": None, "z": 1}}]), tmp_path / "rows.parquet")
    (found,) = read_file(tmp_path / "rows.parquet")
    assert found["extra"] == {"x": None, "z": 1}
    changes: Counter[str] = Counter()
    (row,) = rows("sft", {"messages": found["messages"]}, changes=changes)
    assert row["completion"][0]["tool_calls"][0]["function"]["arguments"] == {"x": None}
    assert changes[NULLS] == 1  # kept, and counted


def test_a_null_in_a_schema_is_left_out_except_as_a_default() -> None:
    filled = schema("weather", city={"type": "string", "enum": None, "default": None}, x=None)
    (row,) = rows("sft", {"messages": [user("a"), says("b")], "tools": [filled]})
    assert json.loads(row["tools"]) == [schema("weather", city={"type": "string", "default": None})]


CALLS = calls(call("weather", "1", city="Graz"), call("weather", "2", city="Linz"))


@pytest.mark.parametrize(
    ("results", "texts", "counts"),
    [
        ([result("sun", "2"), result("rain", "1")], ["rain", "sun"], {MOVED: 1}),
        ([result("rain", "1"), result("sun", "2")], ["rain", "sun"], {}),
        ([result("sun", "2")], ["sun"], {}),
        # nothing is guessed: without ids, with one id twice, and with an id that no call has
        ([result("sun"), result("rain")], ["sun", "rain"], {}),
        ([result("sun", "2"), result("rain", "2")], ["sun", "rain"], {}),
        ([result("sun", "3"), result("rain", "1")], ["sun", "rain"], {UNASKED: 1}),
    ],
)
def test_results_follow_in_the_order_of_their_calls(
    results: list[dict[str, Any]], texts: list[str], counts: dict[str, int]
) -> None:
    for kind, given in (
        ("sft", {"messages": [user("a"), CALLS, *results, says("b")]}),
        ("problems", {"prompt": [user("a"), CALLS, *results, says("b"), user("c")], "answer": "d"}),
    ):
        changes: Counter[str] = Counter()
        (row,) = rows(kind, given, changes=changes)
        turns = [*row["prompt"], *row.get("completion", [])]
        assert [turn["content"] for turn in turns if turn["role"] == "tool"] == texts
        assert {name: changes[name] for name in (MOVED, UNASKED) if changes[name]} == counts
