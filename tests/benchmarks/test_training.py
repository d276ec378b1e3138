"""Our side of the comparison with TRL does the work that its job names: the first loss is transformers' own over the same rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.training import BY_NAME, job, saved_model


@pytest.mark.parametrize("name", ["sft", "sft-uneven"])
def test_the_first_loss_is_that_of_transformers(name: str, root: Path, tmp_path: Path) -> None:
    case = replace(BY_NAME[name], batch=3, steps=2, answer=(4, 40))
    work = job(case, saved_model(case, tmp_path), seed=1, given=True)
    assert [len(prompt) for prompt, _ in work["rows"]] == [8] * 6
    done = subprocess.run(
        [sys.executable, str(root / "benchmarks/peers/ours.py")],
        input=json.dumps(work) + "\n", capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    said = json.loads(done.stdout)
    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float64)
    taken = []
    for prompt, answer in work["rows"][:3]:
        with torch.no_grad():
            table = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        taken += [float(table[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)]
    assert said["losses"][0] == pytest.approx(-sum(taken) / len(taken), abs=1e-5)
    assert len(said["losses"]) == len(said["grad_norms"]) == 2
