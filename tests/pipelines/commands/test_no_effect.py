"""Parameters that could not work are refused before a run, and those without effect are named."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipelines.commands.configure import configure
from pipelines.commands.first_rows import mixed_forms
from pipelines.commands.lookahead import problems
from pipelines.commands.notes import notes
from pipelines.config.params import Params, merged, parse_params
from pipelines.config.yaml_files import read_yaml
from pipelines.data.pairs import Changes
from pipelines.data.sources import table_rows
from posttrain.errors import ConfigError


@pytest.fixture(scope="module")
def shipped(root: Path) -> dict[str, Any]:
    tree: dict[str, Any] = read_yaml(root / "params.yaml")
    return tree


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def changed(shipped: dict[str, Any], over: dict[str, Any]) -> Params:
    return parse_params(merged(copy.deepcopy(shipped), over))


@pytest.mark.parametrize(
    ("over", "message"),
    [
        (
            {"tune": {"space": {"on_policy": {"budget.foo": {"low": 1, "high": 2}}}}},
            r"tune\.space\.on_policy\.budget\.foo: the value 1\.0 cannot be tried: .*unknown parameter",
        ),
        (
            {"tune": {"space": {"on_policy": {"budget.steps": {"values": [0, 3]}}}}},
            r"budget\.steps: the value 0 cannot be tried: .*greater than or equal to 1",
        ),
        (
            {"tune": {"space": {"on_policy": {"budget.steps": {"low": 9.0, "high": 3.0, "log": True}}}}},
            r"high 3\.0 must be greater than low 9\.0",
        ),
        ({"evaluation": {"pass_k": [1, 1]}}, "names the same k twice"),
        (
            {"sft": {"compute": {"threads": 0}}},
            r"sft\.compute\.threads = 0: should be greater than or equal to 1, or should be 'auto'",
        ),
        (
            {"sft": {"lora": {"rank": 4, "alpha": 8, "target_modules": []}}},
            r"sft\.lora\.target_modules = \[\]: should be 'all-linear', or a list needs at least one entry",
        ),
        ({"sft": {"optimizer": {"learning_rate": "nan"}}}, "'nan': should be a valid number, and this is a text"),
    ],
)
def test_values_that_could_not_work_are_refused(shipped: dict[str, Any], over: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        changed(shipped, over)
    assert "constrained" not in str(caught.value)


def test_a_space_of_valid_values_is_taken(shipped: dict[str, Any]) -> None:
    space = {"on_policy": {"budget.optimizer.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True}}}
    assert changed(shipped, {"tune": {"space": space}}).tune.space


def test_a_key_without_a_value_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no value after the equals sign; .* sft=null"):
        configure(root / "params.yaml", ["sft="])


LORA = {"rank": 4, "alpha": 8, "target_modules": ["q_prj"]}


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"rewards": {"mine": {"function": "os:nope"}}}, "Python's module os has no nope"),
        ({"sft": {"lora": LORA}}, "sft.lora.target_modules: the model has no layer 'q_prj'; did you mean 'q_proj'"),
        ({"align": {"lora": LORA}}, "align.lora.target_modules: the model has no layer 'q_prj'"),
        ({"sft": {"lora": LORA | {"target_modules": ["lm_head"]}}}, "'lm_head' is the head or an embedding"),
        ({"data": {"sft": {"columns": {"prompt": "x"}}}}, "data.sft.columns: has no effect on the generator"),
        ({"data": {"sft": {"split": "test"}}}, "data.sft.split: has no effect on the generator"),
        ({"data": {"sft": {"source": "rows.zip"}}}, "files that end in '.zip' cannot be read; unpack it"),
        (
            {"data": {"sft": {"source": "rows.csv"}}},
            "' completion': remove the space (completion); 'Prompt': write it in",
        ),
        (
            {"data": {"problems": {"source": "asked.jsonl", "rows": None}}},
            "rewards.answer: the function 'answer' reads gold answers, and data.problems has none",
        ),
        ({"model": {"source": "trained"}}, "models are in its subfolders: write trained/checkpoint-100"),
    ],
)
def test_what_a_run_would_stop_at_is_found(
    shipped: dict[str, Any], here: Path, over: dict[str, Any], message: str
) -> None:
    folder = here / "trained" / "checkpoint-100"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (here / "rows.zip").write_bytes(b"PK")
    (here / "asked.jsonl").write_text('{"prompt": "a"}\n')
    (here / "rows.csv").write_text("Prompt, completion\na,b\n")
    assert any(message in line for line in problems(changed(shipped, over)))


def test_layers_of_a_model_folder_are_read_from_its_files(shipped: dict[str, Any], here: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file(
        {"model.layers.0.attn.wq.weight": torch.zeros(2, 2), "norm.weight": torch.zeros(2)}, here / "model.safetensors"
    )
    (here / "config.json").write_text("{}")
    over = {
        "model": {"source": str(here)},
        "sft": {"lora": LORA | {"target_modules": ["wq", "attn.wq", "q_proj", "norm", "wte"]}},
    }
    found = [line for line in problems(changed(shipped, over)) if "target_modules" in line]
    assert len(found) == 3
    assert "no layer 'q_proj'" in found[0]
    assert "no layer 'norm'" in found[1]
    assert "'wte' is the head or an embedding, which cannot have an adapter" in found[2]


def test_settings_without_effect_are_named(shipped: dict[str, Any], here: Path) -> None:
    (here / "mine").mkdir()
    for split in ("train", "test", "validation"):
        (here / "mine" / f"{split}.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    counted: Changes = Counter()
    assert (
        len(table_rows("sft", changed(shipped, {"data": {"sft": {"source": "mine", "rows": None}}}).data, counted)) == 1
    )
    assert counted["files of other splits than 'train', not read: mine/test.jsonl, mine/validation.jsonl"] == 2
    (here / "model").mkdir()
    (here / "model" / "config.json").write_text("{}")
    params = changed(shipped, {"data": {"sft": {"source": "mine", "rows": None}}, "model": {"source": "model"}})
    read = "data.sft reads only files of the split 'train' (data.sft.split); not read: mine/test.jsonl, mine/validation.jsonl."
    assert any(read in line for line in notes(params))
    shape = [line for line in notes(params, ["model.tiny.layers: 2 -> 7"]) if "model.tiny.layers: no effect" in line]
    assert len(shape) == 1
    long = changed(shipped, {"sft": {"optimizer": {"warmup_steps": 100_000}}})
    assert any(
        "sft would stop: sft.optimizer.warmup_steps = 100000 is longer than its" in line for line in notes(long, [])
    )


def test_configure_reports_each_warm_up_that_stops_its_stage(shipped: dict[str, Any], here: Path) -> None:
    def stops(**own: Any) -> list[str]:
        return [line for line in notes(changed(shipped, own), []) if "would stop" in line]

    assert stops() == []
    rows = [{"prompt": f"{i}+0=", "completion": str(i)} for i in range(96)]
    (here / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # 96 rows in batches of 64 over 6 epochs; 80 % of 100 pairs in batches of 32 over 2 epochs, or 1
    few = {"sft": {"source": "mine.jsonl", "rows": None}, "preferences": {"rows": 100}}
    assert stops(data=few, reward={"optimizer": {"warmup_steps": 10}}) == [
        "warning: sft would stop: sft.optimizer.warmup_steps = 20 is longer than its 12 optimiser steps; set it to 1, a tenth of them, or"
        " train for longer.",
        "warning: reward would stop: reward.optimizer.warmup_steps = 10 is longer than its 6 optimiser steps; set it to 0, a tenth of them,"
        " or train for longer.",
        *(
            f"warning: align@{name} would stop: align.preference.optimizer.warmup_steps = 5 is longer than its 3 optimiser steps; set it to"
            " 0, a tenth of them, or train for longer."
            for name in ("dpo", "dpo_soft", "grpo_pairs")
        ),
    ]
    assert stops(data={"sft": {"source": "absent.jsonl", "rows": None}}) == []


def test_a_choice_of_the_checkpoint_that_leaves_no_problem_is_named_and_its_reward_counts_as_used(
    shipped: dict[str, Any], here: Path
) -> None:
    short = {"rewards": {"short": {"function": "length", "arguments": {"target": 3, "tolerance": 40}}}}
    rule = {"every_steps": 10, "problems": 4000, "reward": "short"}
    params = changed(shipped, short | {"align": {"best_checkpoint": rule}})
    assert [line for line in problems(params) if "best_checkpoint" in line] == [
        "align.best_checkpoint.problems = 4000: data.problems.rows = 4000, so no problem would be left to train on; lower the one or raise"
        " the other"
    ]
    assert [line for line in notes(params, []) if "rewards.short" in line] == []
    fewer = changed(shipped, short | {"align": {"best_checkpoint": rule | {"problems": 100}}})
    assert [line for line in problems(fewer) if "best_checkpoint" in line] == []
    unused = changed(shipped, short)
    assert "rewards.short is computed by nothing" in "".join(notes(unused, []))


def test_prompts_of_another_form_than_the_demonstrations_are_named(here: Path, shipped: dict[str, Any]) -> None:
    turns = [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]
    (here / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (here / "tasks.jsonl").write_text(json.dumps({"prompt": turns[:1], "answer": "4"}) + "\n")
    chat = changed(shipped, {"data": {"sft": {"source": "chat.jsonl", "rows": None}}})
    (warning,) = (line for line in notes(chat) if "form that it was not taught" in line)
    assert warning.startswith(
        "warning: data.sft teaches conversations, but data.problems and data.evaluation have plain prompts"
    )
    remedy = warning.rpartition("posttrain configure ")[2]
    assert remedy == """'data.problems.template="{prompt}"' 'data.evaluation.template="{prompt}"'"""
    (here / "params.yaml").write_text(json.dumps(shipped))
    configure(here / "params.yaml", ["data.sft={source: chat.jsonl}", *(each.strip("'") for each in remedy.split(" "))])
    assert list(mixed_forms(parse_params(read_yaml("params.yaml")))) == [], "the command mends it"
    plain = changed(shipped, {"data": {"problems": {"source": "tasks.jsonl", "rows": None}}})
    assert [
        "data.sft teaches plain text, but data.problems has conversations" in line for line in mixed_forms(plain)
    ] == [True]
    assert list(mixed_forms(changed(shipped, {}))) == []
