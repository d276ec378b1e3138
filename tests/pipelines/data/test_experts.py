"""Expert demonstrations for CHORD: marked in the sft table, and read by it only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.commands.lookahead import problems
from pipelines.config.data_schema import DataParams, ExpertSource, TableSource
from pipelines.config.params import load_params, parse_params
from pipelines.config.yaml_files import read_yaml
from pipelines.data.experts import with_experts
from pipelines.data.sources import table_rows
from pipelines.data.tables import EXPERT, expert_rows, read_rows, supervised_rows, write_rows
from pipelines.runtime.param_tracking import watched
from pipelines.training.on_policy import _demonstrations
from posttrain.algorithms import choose
from posttrain.algorithms.specs import OnPolicy
from posttrain.data.tokens import TextEncoder
from posttrain.errors import ConfigError, DataError
from posttrain.models.tiny import byte_tokenizer

TERSE = ExpertSource(source="arithmetic", rows=3, options={"careless": 0.0, "notation": "terse"})


@pytest.fixture
def data(root: Path) -> DataParams:
    own = load_params(root / "params.yaml").data
    return own.model_copy(update={"sft": TableSource(source="arithmetic", rows=5), "experts": TERSE})


def test_the_experts_follow_in_their_own_style_and_with_a_mark(data: DataParams) -> None:
    plain = table_rows("sft", data.model_copy(update={"experts": None}))
    rows = with_experts(table_rows("sft", data), data)
    assert [row["id"] for row in rows] == list(range(8))
    assert [row[EXPERT] for row in rows] == [False] * 5 + [True] * 3
    assert [row["completion"] for row in rows[:5]] == [row["completion"] for row in plain]
    # a chain names the running sums of each column, the terse notation only the column's total
    assert all("+" in row["completion"] for row in rows[:5])
    terse = data.model_copy(update={"arithmetic": data.arithmetic.model_copy(update=TERSE.options)})
    expected = table_rows("sft", terse.model_copy(update={"sft": TableSource(source="arithmetic", rows=3)}))
    assert [row["completion"] for row in rows[5:]] == [row["completion"] for row in expected]
    # a stage reads parameters through a proxy that tracks them
    tree = load_params(Path(__file__).parents[3] / "params.yaml").model_copy(update={"data": data})
    leaves = set[str]()
    assert with_experts(plain, watched(tree, leaves.add).data) == rows
    assert "data.experts.options.notation" in leaves
    assert with_experts(plain, data.model_copy(update={"experts": None})) is plain


def test_chord_reads_the_experts_and_fine_tuning_the_others(
    data: DataParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "data" / "valid" / "sft.parquet"
    rows = with_experts(table_rows("sft", data), data)
    write_rows("sft", rows, path)
    read = read_rows(path)
    assert [row["completion"] for row in supervised_rows(read)] == [row["completion"] for row in rows[:5]]
    assert [row["completion"] for row in expert_rows(read)] == [row["completion"] for row in rows[5:]]
    encoder, chord = TextEncoder(byte_tokenizer(96), 96), choose("chord", {})
    assert isinstance(chord, OnPolicy)
    budget = load_params(Path(__file__).parents[3] / "params.yaml").align.on_policy
    found = _demonstrations(chord, encoder, budget, seed=0)
    assert found is not None
    assert sorted(encoder.text(row.response) for row in found.rows) == sorted(row["completion"] for row in rows[5:])
    # without experts both read all rows
    write_rows("sft", table_rows("sft", data), path)
    assert len(supervised_rows(read_rows(path))) == len(expert_rows(read_rows(path))) == 5
    with pytest.raises(DataError, match=r"no row of data\.experts left"):
        expert_rows([row | {EXPERT: False} for row in rows])
    with pytest.raises(DataError, match=r"only rows of data\.experts"):
        supervised_rows([row | {EXPERT: True} for row in rows])


@pytest.mark.parametrize(
    ("options", "refusal"),
    [({"notation": "short"}, "data.experts.options.notation"), ({"careles": 0.0}, "data.experts.options")],
)
def test_wrong_options_are_refused_by_their_place(data: DataParams, options: dict[str, Any], refusal: str) -> None:
    wrong = ExpertSource(source="arithmetic", rows=3, options=options)
    with pytest.raises(ConfigError, match=refusal):
        with_experts(table_rows("sft", data), data.model_copy(update={"experts": wrong}))


def test_files_have_no_options_and_their_columns_are_checked_before_a_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("experts.jsonl").write_text(json.dumps({"question": "1 + 1 =", "answer": "2"}) + "\n", encoding="utf-8")
    tree = read_yaml(root / "params.yaml")
    tree["data"]["experts"] = {"source": "experts.jsonl", "options": {"careless": 0.0}}
    assert [line for line in problems(parse_params(tree)) if "experts" in line] == [
        "data.experts.options: has no effect, because 'experts.jsonl' is no generator. Remove it."
    ]
    tree["data"]["experts"] = {"source": "arithmetic"}
    assert [line for line in problems(parse_params(tree)) if "experts" in line] == [
        "data.experts.rows: missing; a generator needs to know how many rows to make, e.g. rows: 1000"
    ]
    tree["data"]["experts"] = {"source": "experts.jsonl"}
    (line,) = [line for line in problems(parse_params(tree)) if "experts" in line]
    assert "completion" in line
    tree["data"]["experts"]["columns"] = {"prompt": "question", "completion": "answer"}
    checked = parse_params(tree)
    assert [line for line in problems(checked) if "experts" in line] == []
    rows = with_experts(table_rows("sft", checked.data), checked.data)
    assert (rows[-1]["prompt"], rows[-1]["completion"], rows[-1][EXPERT]) == ("1 + 1 =", "2", True)


def test_experts_without_an_algorithm_that_reads_them_are_refused(root: Path) -> None:
    tree = read_yaml(root / "params.yaml")
    tree["data"]["experts"] = {"source": "arithmetic", "rows": 3}
    assert parse_params(tree).data.experts is not None
    tree["project"]["algorithms"] = ["grpo"]
    with pytest.raises(ConfigError, match=r"data\.experts: has no effect, because no algorithm .* chord or chord_phi"):
        parse_params(tree)
