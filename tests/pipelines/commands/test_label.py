"""A session is sampled from real tiny models; only prompts whose pairs the intake accepts are used; the same command continues it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import posttrain as pt
from pipelines.commands.label import finish, main, parser, prepare, prompts, usable, with_defaults
from pipelines.config.params import load_params
from pipelines.data.tables import Table, write_rows
from pipelines.labelling.judgements import Desk
from pipelines.labelling.sampling import Sampling, closest, most_disputed, sample_items
from pipelines.labelling.session import Answer, Item
from posttrain.errors import DataError
from tests.pipelines.labelling.sessions import session

SIZES = {"hidden_size": 16, "intermediate_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "max_length": 96}
ROWS: dict[Table, list[dict[str, Any]]] = {
    "preferences": [{"id": i, "prompt": f"pair {i}", "chosen": "a", "rejected": "b"} for i in range(3)],
    "preferences_heldout": [{"id": 0, "prompt": "held out", "chosen": "a", "rejected": "b"}],
    "evaluation": [{"id": 0, "prompt": "evaluated", "answer": "1"}],
    "problems": [{"id": 0, "prompt": "pair 1", "answer": "1"}, {"id": 1, "prompt": "a problem", "answer": "1"}],
}


@pytest.fixture
def project(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "params.yaml").write_text((root / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    for table, rows in ROWS.items():
        write_rows(table, rows, tmp_path / "data/valid" / f"{table}.parquet")
    for seed in (0, 1):
        pt.tiny(seed=seed, **SIZES).save(tmp_path / f"model-{seed}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_prompts_whose_pairs_would_be_refused_are_left_out(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["pair 1", "Pair 2.", "held out", "Evaluated", "a problem", "new"]
    assert usable(asked, project / "data/valid") == ["pair 1", "Pair 2.", "new"]
    said = capsys.readouterr().err
    assert "3 of 6 prompts are left out" in said
    assert "evaluation has 1, preferences_heldout has 1, problems has 1" in said
    with pytest.raises(DataError, match=r"all 1 prompts are in other tables \(evaluation has 1\)"):
        usable(["evaluated"], project / "data/valid")
    assert usable(prompts(Path("data/valid/preferences.parquet")), project / "data/valid") == [
        "pair 0",
        "pair 1",
        "pair 2",
    ]


def test_sampling_reports_its_progress_before_each_batch(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [str(project / "model-0"), "--count", "1", "--max-new-tokens", "4"]
    prepare(project, parser().parse_args(options), load_params(project / "params.yaml"))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("label: ")]
    assert lines == [
        f"label: loading {project / 'model-0'}",
        "label: model-0 answers 3 prompts, 1 of 2 times; 0 items so far",
        "label: model-0 answers 3 prompts, 2 of 2 times; 0 items so far",
    ]


def test_a_session_has_answers_of_the_named_models_and_is_continued(project: Path) -> None:
    options = [str(project / "model-0"), "model-1", "--count", "2", "--max-new-tokens", "8", "--ask", "pairs"]
    params = load_params(project / "params.yaml")
    made = prepare(project, parser().parse_args(options), params)
    assert len(made.items) == 2
    for item in made.items:
        assert [answer.model for answer in item.answers] == ["model-0", "model-1"]
        assert item.answers[0].md5 != item.answers[1].md5
        assert item.prompt in {"pair 0", "pair 1", "pair 2"}
    assert prepare(project, parser().parse_args(options), params) == made
    other = prepare(project, parser().parse_args([*options, "--seed", "1"]), params)
    assert other.folder != made.folder
    ranked = prepare(
        project, parser().parse_args(["model-0", "--ask", "ranking", "--answers", "3", "--max-new-tokens", "8"]), params
    )
    assert {len(item.answers) for item in ranked.items} == {3}


def test_a_greedy_model_alone_has_nothing_to_compare(project: Path) -> None:
    model = pt.tiny(seed=0, **SIZES)
    with pytest.raises(DataError, match="none of 2 prompts got two different answers"):
        sample_items([("one", "m", model)], ["a", "b"], 2, "pairs", Sampling(2, 4, 0.0, 0))


def test_the_closest_scores_come_first() -> None:
    def item(name: str, *texts: str) -> Item:
        return Item(name, "p", tuple(Answer(text, "m", "h") for text in texts))

    items = [item("far", "1", "9"), item("near", "4", "5"), item("middle", "2", "5")]
    found = closest(items, lambda pairs: [float(answer) for _, answer in pairs], 2)
    assert [each.id for each in found] == ["near", "middle"]


def test_the_answers_on_which_the_heads_differ_most_come_first() -> None:
    def item(name: str, *texts: str) -> Item:
        return Item(name, "p", tuple(Answer(text, "m", "h") for text in texts))

    items = [item("agreed", "1", "1"), item("one of two", "0", "9"), item("both", "5", "6")]
    found = most_disputed(items, lambda pairs: [float(answer) for _, answer in pairs], 2)
    assert [each.id for each in found] == ["both", "one of two"]


def test_mistakes_are_words(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model-0", "--prompts", "none.jsonl"]) == 2
    assert "no such file" in capsys.readouterr().err
    assert main(["--summary", "none"]) == 2
    assert "there is no labelling session none; sessions: none yet" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["model-0", "--name", "../x"])


def test_a_session_in_which_nobody_judged_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("empty", "judged"):
        desk = Desk(session(tmp_path / name, count=2))
        if name == "judged":
            desk.judge("ann", "1", "k", "first")
            desk.undo("ann")
        finish(desk)
        desk.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["judged"]
    assert (tmp_path / "judged/summary.json").is_file()
    said = capsys.readouterr().out
    assert said.startswith("no judgements; ")
    assert f"{Path('empty')} is removed" in said


def test_options_that_are_not_given_follow_the_project_and_the_models(root: Path) -> None:
    given = parser().parse_args(["--seed", "3"])
    params = load_params(root / "params.yaml")
    full = with_defaults(given, params)
    assert (full.models, full.answers, full.seed) == (["champion"], 2, 3)
    assert full.max_new_tokens == params.evaluation.max_new_tokens
    assert (given.models, given.answers, given.max_new_tokens) == ([], None, None), "the options given stay as they are"
    assert with_defaults(parser().parse_args(["a", "b", "--temperature", "0"]), params).temperature == 0
    assert with_defaults(parser().parse_args(["a", "b"]), params).answers == 1
