"""Tasks of reasoning-gym: tables, judge, options. Skipped where the extra is not installed, except for the words that say so."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pipelines.commands.configure import configure
from pipelines.commands.lookahead import problems
from pipelines.config.data_schema import DataParams, TableSource
from pipelines.config.params import load_params
from pipelines.data.sources import table_rows
from posttrain.environments.base import environment, import_path, is_environment
from posttrain.environments.parts import KINDS
from posttrain.errors import ConfigError
from posttrain.rewards import require_available
from posttrain.rewards.functions import find_function
from posttrain.text import normalised

NAME = "reasoning_gym:gcd"
installed = pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="the extra 'reasoning' is not installed")
absent = pytest.mark.skipif(find_spec("reasoning_gym") is not None, reason="the extra 'reasoning' is installed")


def data_of(root: Path, name: str = NAME, **options: Any) -> DataParams:
    source = TableSource(source=name, rows=20)
    return load_params(root / "params.yaml").data.model_copy(
        update=dict.fromkeys(KINDS, source) | {"environments": {name: options}}
    )


def test_a_source_is_the_import_path_of_its_wrapper() -> None:
    assert is_environment(NAME)
    assert import_path(NAME) == "posttrain.environments.reasoning_gym:gcd"
    assert import_path("mine.tasks:ENVIRONMENT") == "mine.tasks:ENVIRONMENT"
    assert import_path("reasoning_gym") == "reasoning_gym"


@absent
def test_without_the_extra_every_way_in_says_what_to_type(root: Path) -> None:
    for used in (
        lambda: table_rows("sft", data_of(root)),
        lambda: require_available(NAME),
        lambda: find_function(NAME),
    ):
        with pytest.raises(ConfigError, match=r"pip install -c constraints.txt '.\[reasoning\]'"):
            used()


def test_the_example_is_valid_and_names_the_task_in_every_table(root: Path, tmp_path: Path) -> None:
    shutil.copy(root / "params.yaml", tmp_path / "params.yaml")
    configure(tmp_path / "params.yaml", [str(root / "examples" / "reasoning_gym.yaml")])
    params = load_params(tmp_path / "params.yaml")
    task = "reasoning_gym:spell_backward"
    assert {getattr(params.data, kind).source for kind in KINDS} == {params.rewards["spelled"].function} == {task}
    found = problems(params)
    if find_spec("reasoning_gym"):
        assert found == []
    else:
        # one for the reward, one for each table
        assert len(found) == 5
        assert all("pip install -c constraints.txt '.[reasoning]'" in line for line in found)


@installed
def test_every_table_has_its_own_prompts_and_depends_on_the_seed_only(root: Path) -> None:
    data = data_of(root, max_value=60)
    tables = {kind: table_rows(kind, data) for kind in KINDS}
    prompts = [row["prompt"] for rows in tables.values() for row in rows]
    assert len(prompts) == len(set(prompts)) == 80
    assert tables == {kind: table_rows(kind, data) for kind in KINDS}
    assert tables["problems"] != table_rows("problems", data.model_copy(update={"seed": 1}))
    assert "completion" in tables["sft"][0]
    pair = tables["preferences"][0]
    assert (pair["chosen_score"], pair["chosen"] != pair["rejected"]) == (1.0, True)
    assert pair["rejected_score"] < 1


@installed
def test_the_tasks_own_judge_scores_whole_answers_and_marked_ones(root: Path) -> None:
    (row, *_) = table_rows("problems", data_of(root, max_value=60))
    gold, wrong = row["answer"], str(int(row["answer"]) + 1)
    said = [gold, f" {gold}\n", f"I think <answer>{gold}</answer>", wrong, ""]
    reward = find_function(NAME)
    assert reward([row["prompt"]] * 5, said, answer=[gold] * 5, entry=[row["entry"]] * 5) == [1.0, 1.0, 1.0, 0.0, 0.0]
    with pytest.raises(ConfigError, match="needs the column 'entry'"):
        reward([row["prompt"]], [gold], answer=[gold])


@installed
def test_an_answer_other_than_the_reference_is_right_if_the_task_says_so(root: Path) -> None:
    (row, *_) = table_rows("problems", data_of(root, "reasoning_gym:countdown"))
    other = f"(0 + {row['answer']})".replace("(0 + ", "(").strip()
    assert other != row["answer"]
    assert environment("reasoning_gym:countdown").reward(
        [""], [other], answer=[row["answer"]], entry=[row["entry"]]
    ) == [1.0]


@installed
def test_prompts_that_differ_in_case_only_are_in_one_table() -> None:
    found = environment("reasoning_gym:spell_backward")
    rows = {kind: found.rows(kind, 400, 0, max_word_len=5) for kind in KINDS}
    prompts = {kind: {normalised(row["prompt"]) for row in table} for kind, table in rows.items()}
    # the list of words has names, too: Beth and beth
    assert len(prompts["sft"]) < 400 or len(prompts["problems"]) < 400
    assert all(prompts[a].isdisjoint(prompts[b]) for a in KINDS for b in KINDS if a != b)


@installed
def test_careless_demonstrations_are_wrong_and_their_share_is_as_asked(root: Path) -> None:
    found = environment(NAME)
    asked = {row["prompt"]: row["completion"] for row in found.rows("sft", 300, 0, careless=0.0)}
    careless = found.rows("sft", 300, 0, careless=0.4)
    wrong = [row["completion"] != asked[row["prompt"]] for row in careless]
    # 300 draws at .4: four standard deviations are .113
    assert abs(sum(wrong) / 300 - 0.4) < 0.113


@installed
def test_wrong_names_options_and_small_tasks_are_refused_in_words(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no such task; did you mean 'gcd'"):
        environment("reasoning_gym:gdc")
    with pytest.raises(
        ConfigError, match=r"its options are min_numbers, max_numbers, min_value, max_value, and careless"
    ):
        table_rows("sft", data_of(root, maxvalue=3))
    with pytest.raises(ConfigError, match="has few prompts"):
        table_rows("evaluation", data_of(root, max_value=3))
    with pytest.raises(ConfigError, match="does not accept the task's own reference answer"):
        table_rows("problems", data_of(root, "reasoning_gym:rush_hour"))


@installed
def test_the_judge_has_the_options_of_its_rows(root: Path) -> None:
    (row, *_) = table_rows("problems", data_of(root, "reasoning_gym:puzzle24", max_value=8))
    known = json.loads(row["entry"])
    assert known["options"] == {"max_value": 8}
    # a judge that allows only 1 refuses the same answer
    narrow = json.dumps(known | {"options": {"min_value": 1, "max_value": 1}})
    asked = environment("reasoning_gym:puzzle24")
    scores = asked.reward([""] * 2, [row["answer"]] * 2, answer=[row["answer"]] * 2, entry=[row["entry"], narrow])
    assert scores == [1.0, 0.01]
