"""The example that writes pairs with graded human scores: votes of annotators, ranks of replies, and dirt that is left out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipelines.commands.configure import configure
from pipelines.config.params import load_params


def converted(root: Path, folder: Path, kind: str, text: str) -> tuple[list[dict[str, Any]], str]:
    """Return the rows that the example writes, and its line."""
    (folder / "in").write_text(text, encoding="utf-8")
    script = str(root / "examples" / "human_scores.py")
    done = subprocess.run(
        [sys.executable, script, kind, str(folder / "in"), str(folder / "raw" / "out.jsonl")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = (folder / "raw" / "out.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], done.stdout


def test_votes_become_scores_and_ties_and_dirt_are_left_out(root: Path, tmp_path: Path) -> None:
    def row(one: Any, other: Any, *votes: int) -> dict[str, Any]:
        own = {f"annotator{i}": vote for i, vote in enumerate(votes, start=1)}
        return {"instruction": "Add.", "input": "1 1", "response1": one, "response2": other, **own}

    given = [
        row("2", "3", 1, 1, 0),
        row("3", "2", 2, 2, 2),
        row("a", "b", 0, 0, 0),
        row(True, "b", 1, 1, 1),
        row("", "b", 2, 2, 1),
    ]
    rows, line = converted(root, tmp_path, "pandalm", json.dumps(given))
    shared = {"prompt": "Add.\n\n1 1", "chosen": "2", "rejected": "3"}
    assert rows == [
        shared | {"chosen_score": 2.5 / 3, "rejected_score": 1 - 2.5 / 3},
        shared | {"chosen_score": 1.0, "rejected_score": 0.0},
    ]
    assert line.endswith("2 pairs over 1 prompts; 2 left out\n")


def test_ranks_become_pairs_of_every_two_replies_with_the_conversation_before(root: Path, tmp_path: Path) -> None:
    def message(role: str, text: str, *replies: Any, rank: int | None = None) -> dict[str, Any]:
        return {"role": role, "text": text, "rank": rank, "replies": list(replies)}

    last = message("prompter", "why?", message("assistant", "x", rank=1), message("assistant", "y", rank=0))
    replies = [
        message("assistant", "a", last, rank=2),
        message("assistant", "b", rank=0),
        message("assistant", "c", rank=None),
    ]
    tree = {"prompt": message("prompter", "hi", *replies, message("assistant", "d", rank=1))}
    rows, _ = converted(root, tmp_path, "oasst", json.dumps(tree) + "\n")
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("b", "a"), ("d", "a"), ("b", "d"), ("y", "x")]
    assert (rows[0]["chosen_score"], rows[0]["rejected_score"], rows[0]["prompt"]) == (0, -2, "hi")
    assert rows[-1]["prompt"] == "user: hi\n\nassistant: a\n\nuser: why?"


def test_the_example_is_valid(root: Path, tmp_path: Path) -> None:
    shutil.copy(root / "params.yaml", tmp_path / "params.yaml")
    configure(tmp_path / "params.yaml", [str(root / "examples" / "human_scores.yaml")])
    params = load_params(tmp_path / "params.yaml")
    assert (params.reward.heads, params.data.preferences.source) == (4, "data/raw/pandalm.jsonl")
