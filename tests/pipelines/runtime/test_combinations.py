"""Settings that several processes cannot combine: each rule of the table, before processes start and in two commands."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelines.commands.configure import main as configure
from pipelines.commands.plan import main as plan
from pipelines.config.params import load_params, merged, parse_params
from pipelines.config.yaml_files import read_yaml
from pipelines.runtime.combinations import all_refusals, stage_refusals
from posttrain.combinations import RULES, Setup, refusals
from posttrain.errors import ConfigError

ROWS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # rule, a setup that it refuses, and what mends it
    ("layers by some of the processes", {"processes": 4, "layers": 2}, {"layers": 4}),
    ("layers by some of the processes", {"layers": 2}, {"processes": 2}),
    ("rows by an uneven number", {"processes": 4, "context": 3}, {"context": 2}),
    ("FSDP version 1", {"processes": 2, "fsdp": 1}, {"fsdp": 2}),
    ("layers and FSDP2", {"processes": 2, "layers": 2, "fsdp": 2}, {"fsdp": 0}),
    ("layers and rows", {"processes": 2, "layers": 2, "context": 2}, {"context": 1}),
    ("layers and an adapter", {"processes": 2, "layers": 2, "lora": True}, {"layers": 1, "fsdp": 2}),
    ("layers and experts", {"processes": 2, "layers": 2, "experts": True}, {"layers": 1, "fsdp": 2}),
    ("layers and uneven heads", {"processes": 4, "layers": 4, "heads": 8, "key_heads": 2}, {"key_heads": 4}),
    ("layers and compiled ones", {"processes": 2, "layers": 2, "compile": True}, {"compile": False}),
    ("layers and moments in 8 bits", {"processes": 2, "layers": 2, "moment_bits": 8}, {"layers": 1, "fsdp": 2}),
    ("layers and a different sampler", {"processes": 2, "layers": 2, "engine": "vllm"}, {"engine": "native"}),
    (
        "layers and a different sampler",
        {"processes": 2, "layers": 2, "engine": "native", "staleness": 1},
        {"staleness": 0},
    ),
    ("split weights and offloaded moments", {"processes": 2, "fsdp": 2, "offload": True}, {"fsdp": 0}),
    ("split weights and offloaded moments", {"processes": 2, "layers": 2, "offload": True}, {"offload": False}),
    ("split weights and the best checkpoint", {"processes": 2, "fsdp": 2, "best_checkpoint": True}, {"fsdp": 0}),
    ("rows and experts", {"processes": 2, "context": 2, "experts": True}, {"context": 1}),
    ("rows and uneven heads", {"processes": 4, "context": 4, "heads": 6, "key_heads": 2}, {"heads": 8}),
    ("rows and uneven heads", {"processes": 4, "context": 4, "heads": 12, "key_heads": 3}, {"key_heads": 2}),
    (
        "samples of older weights from servers",
        {"processes": 2, "engine": "vllm", "staleness": 1},
        {"engine": "native"},
    ),
]
ADAPTER = {"rank": 4, "alpha": 8.0}


@pytest.mark.parametrize(("rule", "given", "instead"), ROWS)
def test_each_rule_refuses_its_combination_and_no_other(
    rule: str, given: dict[str, Any], instead: dict[str, Any]
) -> None:
    setup = Setup(**given)
    assert refusals(setup) == [RULES[rule].message(setup)]
    assert refusals(Setup(**given | instead)) == []


def test_every_rule_has_a_row() -> None:
    assert {rule for rule, *_ in ROWS} == set(RULES)


@pytest.mark.parametrize(
    ("edit", "kind", "environ", "stage", "words"),
    [
        ({"sft": {"lora": ADAPTER}}, "ddp_cpu", {"TENSOR": "2"}, "sft", "only a part is trained, as with `lora`"),
        ({"sft": {"optimizer": {"offload": True}}}, "fsdp2_cpu", {}, "sft", "optimizer.offload: true"),
        ({"align": {"preference": {"optimizer": {"moment_bits": 8}}}}, "ddp_cpu", {"TENSOR": "2"}, "align@dpo", "= 8"),
        ({"align": {"on_policy": {"rollouts": {"engine": "vllm"}}}}, "ddp_cpu", {"TENSOR": "2"}, "align@grpo", "vllm"),
        ({"model": {"tiny": {"experts": 4}}}, "ddp_cpu", {"CONTEXT": "2"}, "reward", "a mixture of experts"),
        ({"model": {"tiny": {"kv_heads": 1}}}, "ddp_cpu", {"TENSOR": "2"}, "sft", "cannot be divided evenly"),
        ({}, None, {"TENSOR": "2"}, "sft", "runs as one process"),
        ({}, None, {"CONTEXT": "2"}, "sft", "runs as one process, which has whole rows; give a configuration of 2"),
        ({}, "ddp_cpu", {"CONTEXT": "3"}, "align@grpo", "must be a divisor of the 2 processes"),
    ],
)
def test_a_stage_and_the_plan_refuse_what_their_processes_cannot_combine(
    edit: dict[str, Any],
    kind: str | None,
    environ: dict[str, str],
    stage: str,
    words: str,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(f"POSTTRAIN_{name}_PARALLEL", value)
    tree = {"model": {"tiny": {"kv_heads": 2}}}
    params = parse_params(merged(read_yaml(root / "params.yaml"), merged(tree, edit)))
    path = None if kind is None else root / "infra" / "accelerate" / f"{kind}.yaml"
    name, _, algorithm = stage.partition("@")
    began = time.process_time()
    [found] = stage_refusals(tmp_path, params, name, algorithm or None, path)
    assert time.process_time() - began < 1
    assert words in found
    assert any(line.endswith(found) and stage in line for line in all_refusals(tmp_path, params, path))


def test_the_configuration_of_a_model_folder_is_read(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("POSTTRAIN_TENSOR_PARALLEL", "2")
    (tmp_path / "models" / "base").mkdir(parents=True)
    config: dict[str, Any] = {"num_attention_heads": 14, "num_key_value_heads": 2}
    params = load_params(root / "params.yaml")
    params = params.model_copy(update={"model": params.model.model_copy(update={"source": "owner/name"})})
    path = root / "infra" / "accelerate" / "ddp_cpu.yaml"
    assert stage_refusals(tmp_path, params, "sft", None, path) == []  # nothing is known before `base` has run
    for more, words in (
        ({}, None),
        ({"num_local_experts": 8}, "a mixture of experts"),
        ({"num_key_value_heads": 1}, "14 heads, 1 of"),
    ):
        (tmp_path / "models" / "base" / "config.json").write_text(json.dumps({"text_config": config | more}))
        found = stage_refusals(tmp_path, params, "sft", None, path)
        assert words in found[0] if words else not found, (more, found)


@pytest.mark.parametrize(("command", "more"), [(plan, []), (configure, ["--check"]), (configure, ["--absent"])])
def test_plan_and_configure_refuse(
    command: Callable[[Sequence[str]], int],
    more: list[str],
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("POSTTRAIN_TENSOR_PARALLEL", "2")
    assert command(["--params", str(root / "params.yaml"), *more]) == ConfigError.exit_code
    assert "error: sft, reward, align@" in (error := capsys.readouterr().err)
    assert error.count("runs as one process") == 1
