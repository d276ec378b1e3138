"""Every folder of cases/models: it is loaded whole and read as transformers reads it, or refused in words that lead to a good one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipelines.config.data_schema import TableSource
from pipelines.config.params import load_params
from pipelines.data.sources import table_rows
from pipelines.validate import TokenLengths
from pipelines.validation.check import check
from pipelines.validation.messages import refuse
from pipelines.validation.suites import TableLimits, Validator
from posttrain.data.batches import collate
from posttrain.data.tokens import Tokens
from posttrain.errors import DataError, ModelError
from posttrain.models.folders import load_config, load_encoder, load_policy
from posttrain.models.policy import Policy
from posttrain.models.reach import probe_ids
from posttrain.planning import sizes

REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "trunk": (load_policy, r"Qwen3Model is a trunk without a language model's head, which would be random; save the model with its head"),
    "reward_model": (load_policy, r"ForSequenceClassification is no language model .* give the folder of the language model"),
    "no_tokenizer": (load_encoder, r"there is no tokenizer .* copy the tokenizer's files of the original model into the folder"),
    "gptq": (load_policy, r"its weights are quantised \(gptq\).* give the folder of the original model"),
}  # fmt: skip
ENDS = {
    "two_ends": (2, 1),
    "template_end_is_not_eos": (0, 2),
    "gpt2_48": (2,),
    "gemma3_composite": (2,),
    "no_system_role": (2,),
}
CONTEXT = {"two_ends": 256, "template_end_is_not_eos": 256, "gpt2_48": 48, "no_system_role": 256}
WHOLE = (*ENDS, "prefix")


def test_every_folder_has_its_expectation(cases: Path) -> None:
    assert {path.name for path in (cases / "models").iterdir()} == {*REFUSED, *WHOLE}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_folder_is_refused_in_words(cases: Path, name: str) -> None:
    load, words = REFUSED[name]
    with pytest.raises(ModelError, match=words) as raised:
        load(cases / "models" / name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", sorted(ENDS))
def test_ends_and_context(cases: Path, name: str) -> None:
    encoder = load_encoder(cases / "models" / name)
    assert encoder.ends == ENDS[name]
    assert encoder.max_length == CONTEXT.get(name, encoder.max_length)


@pytest.mark.parametrize("name", sorted(ENDS))
def test_log_probabilities_and_plan_are_those_of_transformers(cases: Path, name: str) -> None:
    lm = load_policy(cases / "models" / name)
    theirs = AutoModelForCausalLM.from_pretrained(cases / "models" / name, dtype=torch.float32).eval()
    ids = probe_ids(46, 259)
    row = Tokens(ids[:6], ids[6:])
    with torch.no_grad():
        found = Policy(lm)(collate([row])).logprobs[0]
        table = theirs(torch.tensor([ids])).logits[0, 5:-1].log_softmax(-1)
    assert found.tolist() == pytest.approx(table.gather(-1, torch.tensor(ids[6:])[:, None])[:, 0].tolist(), abs=1e-4)
    assert sizes(load_config(cases / "models" / name)).parameters == sum(p.numel() for p in theirs.parameters())


def test_a_known_prefix_is_stripped_and_reported(cases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = load_policy(cases / "models" / "prefix")
    assert "read the weights without the prefix _orig_mod. (torch.compile)" in capsys.readouterr().err
    saved = load_file(cases / "models" / "prefix" / "model.safetensors")
    own = dict(lm.named_parameters())
    assert {name.removeprefix("_orig_mod.") for name in saved} == set(own)
    assert all(torch.equal(weight, own[name.removeprefix("_orig_mod.")]) for name, weight in saved.items())


def test_a_template_without_a_system_role_is_a_paragraph_with_the_row(cases: Path, root: Path) -> None:
    params = load_params(root / "params.yaml")
    source = TableSource(source=str(cases / "data" / "problems_chat.jsonl"))
    rows = table_rows("problems", params.data.model_copy(update={"problems": source}))
    lengths = TokenLengths(load_encoder(cases / "models" / "no_system_role"))
    outcome = check({"problems": rows}, params.validation.rules, TableLimits(64, 96, "number"), lengths, Validator())
    words = r"table problems, .*rule chat_template \(stop\): 1 of 1 rows\..*id 0: .*System role not supported.*chat_template to quarantine"
    with pytest.raises(DataError, match=f"(?s){words}") as raised:
        refuse(outcome, 5, Path("report.html"))
    assert "jinja" not in str(raised.value).lower()
    assert json.loads(rows[0]["answer"]) == 7
