"""NaN and infinity: updates that are skipped, runs that stop, and inputs saved for a replay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.data.tokens import Tokens
from posttrain.errors import CheckpointError, NotFiniteError
from posttrain.training.checkpoint import Checkpoints
from posttrain.training.faults import Faults, pack, repeat, row_ids, unpack
from posttrain.training.loop import LoopSettings, fit
from posttrain.training.source import StepData
from tests.training.cases import NAMES, case
from tests.training.runs import Killed, Memory
from tests.training.test_trainer import Linear, trainer, weights


class Batches:
    """The given batches, one step each; an infinite reward if a batch is None."""

    def __init__(self, batches: Sequence[list[list[float]] | None]) -> None:
        self.batches = batches

    def next(self, step: int) -> StepData[float]:
        given = self.batches[step]
        if given is None:
            raise NotFiniteError("reward 'mine' gave inf", ["problem 7", "problem 9"])
        return StepData(list(given), {"reward/mine/mean": 1.0})

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


GOOD, BAD = [1.0, 2.0], [3.0, math.nan]
BROKEN = [[GOOD], [BAD], [GOOD, BAD, GOOD], None, [[4.0]]]


def run(folder: Path, batches: Sequence[Any], at_most: int, recorder: Memory) -> Any:
    made = trainer(total=10, schedule="linear")
    faults = Faults(Checkpoints(folder / "faults", at_most + 1, "fault"), at_most, "command --replay")
    settings = LoopSettings("t", len(batches), checkpoint_steps=1)
    last = fit(made, Batches(batches), Linear(), settings, recorder, Checkpoints(folder / "steps"), faults=faults)
    return made, last


def test_what_is_left_out_leaves_no_trace_in_the_weights(tmp_path: Path) -> None:
    recorder = Memory()
    made, last = run(tmp_path / "broken", BROKEN, 3, recorder)
    clean, _ = run(tmp_path / "clean", [[GOOD], [GOOD, GOOD], [[4.0]]], 0, Memory())
    assert weights(made) == weights(clean)
    assert made.updates == 4
    assert recorder.steps[2] == {"reward/mine/mean": 1.0, "faults/skipped": 1.0}
    assert recorder.steps[3]["faults/skipped"] == 2.0
    assert recorder.steps[3]["mean_row"] == 1.5
    assert recorder.steps[4] == {"faults/skipped": 3.0}
    assert "faults/skipped" not in recorder.steps[5]
    assert (last["mean_row"], last["faults/skipped"]) == (4.0, 3.0)


def test_every_fault_is_told_with_its_step_place_and_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Memory()
    run(tmp_path, BROKEN, 3, recorder)
    told = [(f["step"], f["where"], f["rows"]) for step in sorted(recorder.told) for f in recorder.told[step]]
    assert told == [
        (2, "update 1 of 1", ["#0", "#1"]),
        (3, "update 2 of 3", ["#0", "#1"]),
        (4, "preparing its batches", ["problem 7", "problem 9"]),
    ]
    said = capsys.readouterr().err
    assert (
        "step 2, update 1 of 1: the loss of update 2 is nan; weights are unchanged by it. If the updates before" in said
    )
    assert "lower learning_rate = 0.1 (rows #0, #1); skipped, 1 of at most 3" in said
    assert f"`command --replay {tmp_path / 'faults' / 'fault-00000003'}` replays it" in said


@pytest.mark.parametrize(("at_most", "step"), [(0, 2), (1, 3), (2, 4)])
def test_the_run_stops_at_the_fault_beyond_its_limit(at_most: int, step: int, tmp_path: Path) -> None:
    recorder = Memory()
    with pytest.raises(
        NotFiniteError, match=rf"step {step}, .*faults\.skip_at_most = {at_most}.*`command --replay "
    ) as raised:
        run(tmp_path, BROKEN, at_most, recorder)
    assert sorted(recorder.steps) == list(range(1, step))
    assert sorted(recorder.told)[-1] == step
    assert raised.value.exit_code == 3
    assert len(list((tmp_path / "faults").iterdir())) == at_most + 1


def test_faults_before_a_kill_count_after_it(tmp_path: Path) -> None:
    recorder = Memory(kill_at=3)
    with pytest.raises(Killed):
        run(tmp_path, BROKEN, 2, recorder)
    recorder.kill_at = None
    with pytest.raises(NotFiniteError, match=r"step 4, .*2 were already skipped"):
        run(tmp_path, BROKEN, 2, recorder)


def test_without_a_policy_the_error_comes_through(tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match="the loss of update 2 is nan"):
        fit(trainer(), Batches(BROKEN), Linear(), LoopSettings("t", 5), Memory(), Checkpoints(tmp_path))


def test_a_kept_fault_is_repeated_on_its_own_weights_and_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(NotFiniteError):
        run(tmp_path, BROKEN, 0, Memory())
    kept = tmp_path / "faults" / "fault-00000001"
    fresh = trainer(total=10, schedule="linear")
    with pytest.raises(NotFiniteError, match="the loss of update 2 is nan"):
        repeat(fresh, Batches(BROKEN), Linear(), kept)
    met, _ = run(tmp_path / "before", [[GOOD]], 0, Memory())
    assert weights(fresh) == weights(met)
    said = capsys.readouterr().out
    assert "weights that are not finite: none" in said
    # 3 x (w1 + w2) / 2 rows; the gradient of either weight is 3 / 2
    assert f"row #0: loss {1.5 * sum(weights(met)):.6g}, gradient norm {1.5 * math.sqrt(2):.6g}" in said
    assert "row #1: loss nan, gradient norm nan" in said

    class Mended(Linear):
        def terms(self, model: Any, rows: Any) -> Any:
            return super().terms(model, [0.0 if math.isnan(row) else row for row in rows])

    assert repeat(fresh, Batches(BROKEN), Mended(), kept).startswith("the fault is gone: loss ")


def test_a_fault_in_the_making_of_a_batch_is_repeated_too(tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError):
        run(tmp_path, [None], 0, Memory())
    kept = tmp_path / "faults" / "fault-00000001"
    with pytest.raises(NotFiniteError, match="reward 'mine' gave inf"):
        repeat(trainer(), Batches([None]), Linear(), kept)
    assert repeat(trainer(), Batches([[GOOD]]), Linear(), kept) == "the fault is gone: 1 batches were made"


def test_a_plain_checkpoint_is_not_taken_for_a_fault(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).save(1, {"trainer": trainer().state_dict()})
    with pytest.raises(CheckpointError, match="not a saved fault"):
        repeat(trainer(), Batches([]), Linear(), path)
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        repeat(trainer(), Batches([]), Linear(), tmp_path / "nowhere")


@pytest.mark.parametrize("name", NAMES)
def test_the_rows_of_every_objective_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    rows = case(name).rows
    path = Checkpoints(tmp_path).save(1, {"batch": pack(rows)})
    back = unpack(Checkpoints.read(path)["batch"])
    assert [type(row) for row in back] == [type(row) for row in rows]
    made = case(name)
    first, second = (made.objective.terms(made.model().eval(), given).losses for given in (rows, back))
    assert {k: v[0].item() for k, v in first.items()} == {k: v[0].item() for k, v in second.items()}


def test_a_kept_row_never_makes_anything_but_rows() -> None:
    with pytest.raises(CheckpointError, match="subprocess:Popen"):
        unpack({"kind": "subprocess:Popen", "of": [["true"]]})
    with pytest.raises(CheckpointError, match="is not a row type"):
        unpack({"kind": "posttrain.training.trainer:Trainer", "of": []})


def test_the_ids_of_rows_are_found_wherever_their_tokens_are() -> None:
    rows = [Tokens((1,), (2,), "17"), case("dpo").rows[0], Tokens((1,), (2,))]
    assert row_ids(rows) == ["17", "#1", "#2"]
    assert isinstance(unpack(pack(np.zeros(2, dtype=np.float32))), np.ndarray)
    assert Tokens((1,), (2,), "17") == Tokens((1,), (2,), "18")
