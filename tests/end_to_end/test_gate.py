"""The gate over the finished tiny pipeline: the champion's weights answer the same prompts with the same seeds."""

from __future__ import annotations

import json

import pyarrow.parquet as pq

from tests.end_to_end.conftest import Clone


def test_the_champions_weights_give_the_answers_that_its_evaluation_gave(reproduced: Clone) -> None:
    reproduced.run("pipelines.gate", "--champion", "models/align/grpo-0", "--champion-name", "version 1",
                   "--candidates", "grpo-0", "ppo-0", POSTTRAIN_FOLLOWER="1")  # fmt: skip
    folder = reproduced.root / "runs" / "gate" / "artifacts"
    evaluated = reproduced.root / "runs" / "evaluate" / "grpo-0" / "artifacts" / "predictions.parquet"
    assert pq.read_table(folder / "champion.parquet").equals(pq.read_table(evaluated))
    decision = json.loads((folder / "decision.json").read_text(encoding="utf-8"))
    assert decision["reference"] == "version 1"
    itself = next(candidate for candidate in decision["candidates"] if candidate["name"] == "grpo-0")
    values = {check["name"]: check["value"] for check in itself["checks"]}
    assert (values["loss"], values["length"], values["divergence/rm"]) == (0.0, 1.0, 0.0)
    page = (folder / "decision.html").read_text(encoding="utf-8")
    assert all(f"<h2>{name} against version 1</h2>" in page for name in ("grpo-0", "ppo-0"))
    assert ("<h1>Promote" in page) == decision["promote"]
