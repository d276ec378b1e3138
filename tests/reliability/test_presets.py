"""Presets of every kind go through the align step, and start at the values of their formulas."""

from __future__ import annotations

import math

import pytest

from pipelines.config.params import load_params
from pipelines.data.tables import write_rows
from pipelines.runtime.identity import file_digest
from pipelines.runtime.journal import read
from posttrain.algorithms import PRESETS
from tests.reliability.test_kills import STEPS
from tests.reliability.workspace import Workspace

FIRST_LOSS = {"dpo_soft": math.log(2), "robust": math.log(2), "ipo": 25.0, "hinge": 1.0, "grpo_pairs": 0.0}
"""Of a policy that is its own reference: 1 / (4 beta^2) for IPO with beta 0.1; advantages of a pair that cancel for GRPO."""
LABELLED_STEPS = 8
"""Of KTO: 31 pairs are 62 answers with a label, in batches of 8."""
ON_POLICY = ("dr_grpo", "chord_phi", "rloo", "reinforce_pp", "distill")
OFF_POLICY = ("gspo", "cispo")
OTHERS = (*FIRST_LOSS, *ON_POLICY, *OFF_POLICY, "simpo", "kto")


@pytest.mark.parametrize("name", OTHERS)
def test_a_preset_trains_through_the_align_step(name: str, workspace: Workspace) -> None:
    workspace.succeed("pipelines.align", "--algorithm", name, "--seed", "0")
    records = read(workspace.folder / "runs" / "align" / f"{name}-0" / "journal.jsonl")
    steps = [record["values"] for record in records if record["kind"] == "metrics"]
    assert len(steps) == (6 if name in (*ON_POLICY, *OFF_POLICY) else LABELLED_STEPS if name == "kto" else 4)
    assert all(math.isfinite(values["loss"]) and values["grad_norm"] > 0 for values in steps)
    first = steps[0]
    if name in FIRST_LOSS:
        assert first["loss"] == pytest.approx(FIRST_LOSS[name], abs=1e-5)
        # the same model, pairs and code: the reference was computed by the first of these presets, and read by the others
        assert len(list((workspace.folder / ".posttrain" / "reference").glob("*.safetensors"))) == 1
    if name == "kto":
        # the reference is the policy itself, so z0 is 0 and every loss is 1 - sigma(0)
        assert (first["loss"], first["unpaired/baseline"]) == pytest.approx((0.5, 0.0), abs=1e-5)
    if name in ON_POLICY:
        assert (first["ratio/min"], first["ratio/max"], first["kl/approx"]) == (1.0, 1.0, 0.0)
    if name in OFF_POLICY:
        # four updates a step: the first is on-policy, the later ones are not
        assert first["ratio/min"] < 1.0 < first["ratio/max"]
    before, after = (
        workspace.folder / folder / "model.safetensors" for folder in ("models/sft", f"models/align/{name}-0")
    )
    assert file_digest(before) != file_digest(after)


def test_kto_trains_on_labelled_answers_if_there_are_any(workspace: Workspace) -> None:
    table = workspace.folder / "data" / "valid" / "labelled.parquet"
    before = table.read_bytes()
    rows = [{"id": i, "prompt": f"{i}+1=", "completion": str(i + 1 + i % 2), "label": i % 2 == 0} for i in range(10)]
    try:
        write_rows("labelled", rows, table)
        workspace.succeed("pipelines.align", "--algorithm", "kto", "--seed", "1")
    finally:
        table.write_bytes(before)
    records = read(workspace.folder / "runs" / "align" / "kto-1" / "journal.jsonl")
    steps = [record["values"] for record in records if record["kind"] == "metrics"]
    assert len(steps) == 2
    assert records[0]["inputs"]["data/valid/labelled.parquet"] != ""
    assert {"unpaired/desirable_reward", "unpaired/undesirable_reward"} <= set(steps[0])


def test_kill_tests_and_these_cover_every_kind_of_algorithm(workspace: Workspace) -> None:
    """Every preset takes steps in tests/training/test_every_preset.py; here a preset of every kind runs as a stage."""
    params = load_params(workspace.folder / "params.yaml")
    covered = {type(params.algorithm(name)) for name in (*OTHERS, *STEPS) if name in params.algorithms}
    assert covered == {type(spec) for spec in PRESETS.values()}
