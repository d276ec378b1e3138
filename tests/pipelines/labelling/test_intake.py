"""The night takes judgements in: the inbox accepts the file, and the pairs stay on the training side of the split."""

from __future__ import annotations

import json
from pathlib import Path

from pipelines.commands.configure import configure
from pipelines.config.params import load_params
from pipelines.data.handover import needs_scores, preference, put
from pipelines.data.sources import table_rows
from pipelines.ingest import split_tables
from pipelines.labelling.judgements import Desk
from pipelines.labelling.preferences import hand_over
from pipelines.labelling.session import Answer, Item, Session
from posttrain.environments.parts import KINDS
from tests.pipelines.commands.test_intake import folder, left, taken

__all__ = ["folder"]


def test_judgements_of_two_people_who_disagree_are_taken_in(folder: Path) -> None:
    params = load_params(folder / "params.yaml")
    tables = split_tables({kind: table_rows(kind, params.data) for kind in KINDS}, params.data)
    prompts = list(dict.fromkeys(row["prompt"] for row in tables["preferences"]))[:6]
    answers = (Answer("#1", "champion", "a.dir"), Answer("#22", "sft", "b.dir"))
    items = tuple(Item(str(i), prompt, answers) for i, prompt in enumerate(prompts))
    session = Session(folder / "labels" / "s", "pairs", 0, 0, items)
    session.save()
    desk = Desk(session)
    for name, chosen in (("ann", 0), ("bob", 1)):
        for i in range(6):
            place = session.places(name, str(i)).index(chosen)
            desk.judge(name, str(i), f"{name}{i}", ("first", "second")[place])
    assert hand_over(desk, str(folder / "inbox"), scores=needs_scores(folder)) == 12
    desk.close()
    (result,) = taken(folder)
    assert (result.outcome, result.table, result.rows, result.set_aside) == ("accepted", "preferences", 12, 0)
    assert left(folder) == []
    after = split_tables({kind: table_rows(kind, params.data) for kind in KINDS}, params.data)
    mine = [(row["chosen"], row["rejected"]) for row in after["preferences"] if row["prompt"] in prompts]
    added = [pair for pair in mine if "#1" in pair]
    assert sorted(added) == [("#1", "#22")] * 6 + [("#22", "#1")] * 6
    assert len(after["preferences_heldout"]) == len(tables["preferences_heldout"])


GRADED = """data.preferences={source: graded.jsonl, heldout: 0.25, columns: {prompt: q}, graded: {answers: answers, text: t,
 score: s, better: higher}}"""


def test_judgements_are_taken_in_whatever_columns_the_projects_own_file_has(folder: Path) -> None:
    """Without the mark of its form, the file is asked for the configured columns."""
    answers = [{"t": "the right answer", "s": 2}, {"t": "no idea", "s": 1}]
    lines = [json.dumps({"q": f"how much is {i}+1?", "answers": answers}) for i in range(9)]
    (folder / "graded.jsonl").write_text("\n".join(lines) + "\n")
    configure(folder / "params.yaml", [GRADED])
    assert needs_scores(folder)
    data = load_params(folder / "params.yaml").data
    tables = split_tables({kind: table_rows(kind, data) for kind in KINDS}, data)
    marked = preference(tables["preferences"][0]["prompt"], "yes", "no")
    unmarked = {name: value for name, value in marked.items() if name != "form"}
    put(str(folder / "inbox"), "a-marked.jsonl", [marked], scores=True)
    put(str(folder / "inbox"), "b-unmarked.jsonl", [unmarked], scores=True)
    assert [(result.outcome, result.rows) for result in taken(folder)] == [("accepted", 1), ("quarantined", 0)]
