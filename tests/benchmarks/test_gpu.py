"""The script for a GPU also runs here at a tiny size, and its agreement checks hold on any device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import alarms, attempted, joined
from benchmarks.gpu_cases import BUDGET, CASES, GIB, SHAPES, Case, flop, groups_of, laid_out, must_recompute, predicted
from benchmarks.gpu_head import head_alarms, head_table
from posttrain.models.packed import REFUSED
from posttrain.planning import Sizes, sizes

pytestmark = pytest.mark.timeout(300)


def measured(root: Path, folder: Path, *options: str) -> Any:
    out = folder / "gpu.json"
    # -I: a bare box without the installed package, in another folder
    command = [sys.executable, "-I", str(root / "benchmarks" / "gpu.py"), "--tiny", "--out", str(out), *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(out.read_text(encoding="utf-8"))


def test_the_tiny_run_measures_everything_and_agrees(root: Path, tmp_path: Path) -> None:
    found = measured(root, tmp_path, "--repeats", "1", "--cases", ",".join([*CASES, "head"]))
    assert found["agreement"]["float32"]["logprob"] < 1e-4
    assert 0 < found["agreement"]["bfloat16"]["logprob"] < 0.2
    assert found["agreement"]["bfloat16"]["loss"] < 1e-2
    assert found["agreement"]["sampling"]["logprob"] < 1e-4
    for way in ("chosen", "single operators"):
        assert found["head"][way].items() >= {"name": "single operators", "peak_gib": None}.items()
        assert found["head"][way]["ms"] > 0
    assert found["head"]["Liger"] == {"skipped": "needs a GPU"}
    assert found["cases"].keys() == {f"tiny/{name}" for name in CASES}
    for name, case in found["cases"].items():
        assert case["tokens_per_second"] > 0, name
        assert case["predicted_gib"] > 0, name
        assert (case["tflops"] is None) == (name in ("tiny/rollouts", "tiny/step")), name


@pytest.mark.slow
def test_deterministic_runs_repeat_and_survive_a_kill_and_weights_arrive(root: Path, tmp_path: Path) -> None:
    found = measured(root, tmp_path, "--cases", "curves,transfers")
    for way in ("ipc", "nccl"):
        assert found["transfers"][way]["MiB"] > 0.1
        assert found["transfers"][way]["gap"] < 0.05
    for curve in found["deterministic"].values():
        # a checkpoint after every second step, and a kill after the fourth was recorded and before its checkpoint
        expected = {"steps": 6, "same_again": True, "resumed_at": 3, "same_after_kill": True}
        assert curve | expected == curve
        assert curve["times_as_slow"] > 0


def test_a_shared_prompt_is_counted_once_and_the_head_only_for_answers() -> None:
    model = Sizes(
        parameters=1000, hidden=8, layers=2, query_width=8, key_width=8, intermediate=16, vocabulary=10, outside=80
    )
    groups = groups_of(Case("grpo", 1, 4, 3, answers=2), 50)
    assert laid_out(groups) == 4 + 2 * 3
    # weights of layers for 10 tokens, the head for 6; keys: 4 x 4 / 2 of the prompt, 3 x 4 + 3 x 3 / 2 of each answer
    assert flop(model, groups) == 6 * (920 * 10 + 80 * 6) + 12 * 2 * 8 * (8 + 2 * (12 + 4.5))
    lengths = [len(prompt) for prompt, _ in groups_of(Case("sft", 4, 64, 8, uneven=True), 50)]
    assert lengths == [64, 32, 16, 8]


def test_alarms_are_five_percent_of_the_kept_numbers_ten_of_the_plan_and_runs_that_differ() -> None:
    def case(speed: float, peak: float | None, planned: float = 10.0) -> dict[str, Any]:
        attention = "masks" if peak is None else "FlashAttention by offsets"
        return {"tokens_per_second": speed, "peak_gib": peak, "predicted_gib": planned, "attention": attention}

    kept = {"cases": {"a": case(100, 10), "b": case(100, 10), "full": {"error": "out of memory"}}}
    curve = {"same_again": True, "same_after_kill": True}
    fine = {
        "a": case(95.1, 10.4),
        "b": case(300, 9.1),
        "new": case(1, 10.9),
        "cpu": case(1, None),
        "full": {"error": "…"},
    }
    agreement: dict[str, Any] = {"float32": {"logprob": 1e-5}, "bfloat16": {"logprob": 0.03}}
    agreement["sampling"] = {"logprob": 1e-6, "refused": ""}
    weights = {"ipc": {"gap": 0.0}, "nccl": {"skipped": "one GPU"}}
    good = {"agreement": agreement, "cases": fine, "deterministic": {"sft": curve}, "transfers": weights}
    assert alarms(good, kept) == []
    refused = f"masks, because FlashAttention {REFUSED} (an old GPU)"
    worse = {"a": case(94.9, 10.6) | {"attention": refused}, "b": case(100, 8.9), "new": {"error": "out of memory"}}
    worse["padded"] = case(1, 10.0) | {"attention": "the model's own, over padded rows"}
    differs = {"grpo": curve | {"same_after_kill": False}, "sft": {"error": "no disk"}}
    wrong = {"float32": {"logprob": float("nan")}, "sampling": {"logprob": 0.1, "refused": "a kernel waits"}}
    far = {"agreement": agreement | wrong, "transfers": {"ipc": {"error": "no handle"}}}
    assert alarms(far | {"cases": worse, "deterministic": differs}, kept) == [
        "weights by ipc: no handle",
        "deterministic sft: no disk",
        "float32: a log-probability differs by nan",
        "sampling: a log-probability differs by 0.1",
        "sampling: a kernel waits",
        f"a: {refused}",
        "a: 95 tokens/s, and 100 are kept",
        "a: a peak of 10.60 GiB, and 10.00 are kept",
        "b: a peak of 8.90 GiB, and the plan is 10.00",
        "new: out of memory",
        "padded: the model's own, over padded rows",
        "deterministic grpo: same again True, after a kill False",
    ]
    assert alarms({"agreement": {"error": "no kernel"}, "cases": {}}, {}) == ["agreement: no kernel"]


def test_alarms_of_the_head_are_a_refused_kernel_other_gradients_and_more_time() -> None:
    def way(ms: float, of_hidden: float = 1.0, name: str = "kernels") -> dict[str, Any]:
        return {"ms": ms, "tflops": 1.0, "peak_gib": 1.0, "name": name, "of_hidden": of_hidden, "of_weight": 1.0}

    kept = {"chosen": way(50)}
    assert head_alarms({"chosen": way(52), "single operators": way(50, 1.0009), "Liger": {"skipped": ""}}, kept) == []
    refused = way(53, name=f"single operators (kernels {REFUSED}: no C compiler)")
    assert head_alarms({"chosen": refused, "single operators": way(50, 1.002), "Liger": {"error": "old"}}, kept) == [
        "head by Liger: old",
        f"head: {refused['name']}",
        "head: 53 ms, and 50 are kept",
        "head: 53 ms as chosen, 50 by single operators",
        "head: gradient norms of_hidden of 1 as chosen, 1.002 by single operators",
    ]
    assert len(head_table({"chosen": refused, "Liger": {"error": "old"}})) == 5
    assert head_alarms({"chosen": {"error": "no memory"}}, kept) == ["head by chosen: no memory"]


def test_commands_on_one_device_share_a_file(tmp_path: Path) -> None:
    own, path = {"device": "a GPU", "torch": "2.13"}, tmp_path / "numbers.json"
    assert joined(own, [path]) is own
    known = {**own, "cases": {"0.6B/sft-2k": {"tokens_per_second": 9.0}}}
    path.write_text(json.dumps(known))
    assert joined(own, [path]) == known
    other = {**own, "torch": "2.14"}
    assert joined(other, [path]) is other


def test_a_part_that_fails_leaves_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert attempted(lambda: {"seconds": 1 / 0}) == {"error": "ZeroDivisionError: division by zero"}
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("shape", "recomputes"), [("0.6B", False), ("4B", True)])
def test_every_case_has_a_plan_that_fits_an_h200(shape: str, recomputes: bool) -> None:
    model, room = sizes(SHAPES[shape].config()), 139 * GIB
    for name, case in CASES.items():
        chosen = must_recompute(case, model, "cuda", BUDGET, room)
        assert chosen == (recomputes and case.kind != "rollouts"), name
        assert predicted(case, model, "cuda", BUDGET, chosen, room).total < 0.9 * room, name
    assert not must_recompute(CASES["sft-2k"], model, "cpu", BUDGET, None)
