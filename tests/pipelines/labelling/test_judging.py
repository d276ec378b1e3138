"""A model judges a session as an annotator: its cost, its agreement with people, and when its judgements reach the inbox."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import posttrain as pt
from pipelines.commands.judge import main
from pipelines.commands.sync import synchronise
from pipelines.data.files import read_file
from pipelines.labelling.judgements import Desk
from pipelines.labelling.judging import agreement
from pipelines.labelling.preferences import hand_over
from pipelines.report.measured import all_runs
from pipelines.tracking.store import open_client
from posttrain.errors import DataError
from tests.judges.servers import Server, serving
from tests.pipelines.labelling.sessions import session

CONFIGURED = ["judge.model=referee", "judge.alone.items=6", "judge.alone.agreement=0.5"]


def answers(user: str) -> list[str]:
    return re.findall(r"\[begin of answer(?: .)?\]\n(.*?)\n\[end", user, re.S)


def shorter(system: str, user: str) -> str:
    """Prefer the shorter answer, except to items 3 and 4, where the first place wins."""
    a, b = answers(user)
    if a[0] in "34":
        return "[[A]]"
    return "[[A]]" if len(a) < len(b) else "[[B]]"


@pytest.fixture
def project(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from pipelines.commands.configure import configure

    (tmp_path / "params.yaml").write_text((root / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    configure(tmp_path / "params.yaml", CONFIGURED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("POSTTRAIN_INBOX", raising=False)
    return tmp_path


def people(made_in: Path, liked: int, count: int, name: str = "ann") -> None:
    """Let a person judge the first items of a session; she likes the answer with this index."""
    from pipelines.labelling.session import open_session

    desk = Desk(open_session(made_in))
    try:
        for number in range(count):
            places = desk.session.places(name, str(number))
            desk.judge(name, str(number), f"{name}{number}", ("first", "second")[places.index(liked)])
    finally:
        desk.close()


def inbox(project: Path) -> list[dict[str, object]]:
    return [row for path in sorted((project / "inbox/preferences").glob("*")) for row in read_file(path)]


def ask(server: Server, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setenv("POSTTRAIN_JUDGE_URL", server.url)
    return main(["test", *arguments])


def test_a_judge_labels_alone_only_after_it_agreed_with_people(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = session(project / "labels/test").folder
    people(folder, liked=0, count=4)
    with serving(shorter) as server:
        assert ask(server, monkeypatch, "--dry-run") == 0
        assert "12 items of labels/test are left: 24 questions" in capsys.readouterr().out
        assert not server.bodies
        assert ask(server, monkeypatch) == 0
        said = capsys.readouterr().out
        words = sum(len(body["messages"][1]["content"].split()) for body in server.bodies)
        assert "12 items judged now; all of the session: 10 decided, 2 ties, 0 no verdict" in said
        assert (
            f"24 questions asked, 0 answered by the cache; {words} + 72 tokens, cost unknown: prices.yaml has no price"
            in said
        )
        assert "agreement with people on 4 items: Cohen's kappa 0.00" in said
        assert "not handed to the inbox: judge.alone asks for Cohen's kappa 0.5 on 6 items" in said
        assert inbox(project) == []

        asked = len(server.bodies)
        assert ask(server, monkeypatch) == 0
        assert len(server.bodies) == asked, "what was judged is not asked again"
    (run,) = all_runs(project)
    assert (run.name, run.judge_tokens) == ("judge-test-1", {"referee": (words, 72)})


def test_mlflow_shows_what_each_call_paid(project: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> None:
    shutil.copy(empty_store, project / "mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    session(project / "labels/test", count=2)
    with serving(shorter) as server:
        assert ask(server, monkeypatch) == 0
        words = sum(len(body["messages"][1]["content"].split()) for body in server.bodies)
        session(project / "labels/test")
        assert ask(server, monkeypatch) == 0
        assert ask(server, monkeypatch) == 0
    client = open_client(project)
    second, first = client.search_runs([client.get_experiment_by_name("posttrain").experiment_id])
    assert [run.info.status for run in (first, second)] == ["FINISHED"] * 2
    assert [run.data.tags["posttrain.run"][:13] for run in (first, second)] == ["judge-test-1-", "judge-test-2-"]
    assert [run.data.metrics["cost/judge_tokens_output"] for run in (first, second)] == [4 * 3, 20 * 3]
    assert first.data.metrics["cost/judge_tokens_input"] == words
    assert "cost.judge_money" not in first.data.tags, "without a price the money is unknown, not 0"
    assert first.data.params["judge.model"] == "referee"
    (project / "prices.yaml").write_text("currency: EUR\njudge_tokens: {referee: {input: 0, output: 1e4}}\n")
    synchronise(project, 0)
    assert client.get_run(first.info.run_id).data.tags["cost.judge_money"] == "0.12 EUR"
    assert [run.name for run in all_runs(project)] == ["judge-test-1", "judge-test-2"]


def test_the_money_is_by_the_list_of_prices(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session(project / "labels/test")
    (project / "prices.yaml").write_text("currency: EUR\njudge_tokens: {referee: {input: 0, output: 1e4}}\n")
    with serving(shorter) as server:
        assert ask(server, monkeypatch) == 0
    assert "+ 72 tokens, cost 0.7200 EUR" in capsys.readouterr().out


def test_its_judgements_reach_the_inbox_and_those_of_people_do_not_wait_for_them(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = session(project / "labels/test", count=12).folder
    first = {str(i): i % 2 for i in range(12)}  # people like short and long answers by turns; the judge says the same

    def same(system: str, user: str) -> str:
        a, _ = answers(user)
        wanted = int(a.split(".")[0]) % 2
        return "[[A]]" if a.split(".")[1].startswith(str(wanted)) else "[[B]]"

    from pipelines.labelling.session import open_session

    desk = Desk(open_session(folder))
    for task, liked in list(first.items())[:8]:
        desk.judge("ann", task, f"k{task}", ("first", "second")[desk.session.places("ann", task).index(liked)])
    desk.close()
    with serving(same) as server:
        assert ask(server, monkeypatch) == 0
    said = capsys.readouterr().out
    assert "agreement with people on 8 items: Cohen's kappa 1.00" in said
    assert "20 judgements handed to the inbox" in said
    rows = inbox(project)
    assert len(rows) == 20
    assert sum(str(row["annotator"]).startswith("judge/referee ") for row in rows) == 12
    assert all(str(row["chosen"]).split(".")[1][0] == str(first[str(row["prompt"]).split("+")[0]]) for row in rows)


def test_the_page_of_people_hands_over_no_judge_and_no_person_takes_a_judges_name(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = session(project / "labels/test", count=4).folder
    with serving(shorter) as server:
        assert ask(server, monkeypatch) == 0
    people(folder, liked=0, count=1)
    from pipelines.labelling.session import open_session

    desk = Desk(open_session(folder))
    assert hand_over(desk, str(project / "inbox"), scores=False) == 1
    with pytest.raises(DataError, match="means a model that judges"):
        desk.state("judge/referee")
    desk.close()


def test_agreement_on_scores_is_krippendorffs_alpha_of_all_answers(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = session(project / "labels/test", count=2, ask="scores").folder
    from pipelines.labelling.session import open_session

    desk = Desk(open_session(folder))
    for task, scores in (("0", [2, 4]), ("1", [6, 9])):
        desk.judge("ann", task, task, [scores[place] for place in desk.session.places("ann", task)])
    desk.close()
    graded = {"0.0": 2, "0.1x": 5, "1.0": 7, "1.1x": 9}
    with serving(lambda system, user: f"[[{graded[answers(user)[0]]}]]") as server:
        assert ask(server, monkeypatch) == 0
    name = next(each.annotator for each in judgements(folder) if each.annotator != "ann")
    found = agreement(project / "labels", name, "scores")
    # units (2,2) (4,5) (6,7) (9,9): observed 2 x (0 + 1 + 1 + 0) / 8; expected: 2 x sum of squared differences of all pairs / (8 x 7)
    values = [2, 2, 4, 5, 6, 7, 9, 9]
    expected = sum((a - b) ** 2 for a in values for b in values) / (8 * 7)
    assert (found.items, found.chance_corrected) == (2, pytest.approx(1 - (4 / 8) / expected))


def judgements(folder: Path) -> list[object]:
    from pipelines.labelling.session import open_session

    desk = Desk(open_session(folder))
    try:
        return list(desk.judgements())
    finally:
        desk.close()


def test_a_model_of_this_machine_judges_too_and_mistakes_are_words(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipelines.commands.configure import configure

    session(project / "labels/test", count=2)
    monkeypatch.delenv("POSTTRAIN_JUDGE_URL", raising=False)
    pt.tiny(seed=0, hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1, max_length=2048).save(
        project / "referee"
    )
    assert main(["test"]) == 0
    assert "0 decided, 0 ties, 2 no verdict" in capsys.readouterr().out
    session(project / "labels/ranked", ask="ranking", answers=3)
    assert main(["ranked"]) == 2
    assert "ranked asks for rankings, which judges do not give" in capsys.readouterr().err
    configure(project / "params.yaml", ["judge.model=null"])
    assert main(["test"]) == 2
    assert "judge.model is not set" in capsys.readouterr().err
