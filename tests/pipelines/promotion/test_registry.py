"""Aliases of the model registry, in a real MLflow store."""

from __future__ import annotations

import contextlib
import socket
import sqlite3
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from flows.promote import _refuse_stale
from pipelines.commands.models import line
from pipelines.commands.serve import open_served
from pipelines.promotion.local_store import read_versions
from pipelines.promotion.named import find_model
from pipelines.promotion.registry import RETRAIN, Registry
from pipelines.tracking import store as store_module
from posttrain.errors import DataError, OrchestrationError, TrackingError
from tasks.challenger import best_model
from tasks.challenger import register as challenge
from tests.pipelines.conftest import Project
from tests.sockets import answering


@pytest.fixture
def registry(project: Project, store: Any) -> Registry:
    lock(project.folder, {"grpo-0": "a" * 32, "dpo-0": "b" * 32})
    return Registry(project.folder, "posttrain")


def lock(folder: Path, models: dict[str, str]) -> None:
    stages = "".join(
        f"  align@{name}:\n    cmd: x\n    outs:\n    - path: models/align/{name}\n      md5: {md5}.dir\n"
        "      size: 120\n      nfiles: 7\n"
        for name, md5 in models.items()
    )
    (folder / "dvc.lock").write_text(f"schema: '2.0'\nstages:\n{stages}")


def register(registry: Registry, name: str, **tags: str) -> int:
    return registry.register(name, f"models/align/{name}", tags, "why").number


def aliases(registry: Registry) -> dict[str, int]:
    return {alias: version.number for version in registry.versions() for alias in version.aliases}


def test_a_version_points_at_dvc_and_the_same_weights_are_one_version(registry: Registry, store: Any) -> None:
    number = register(registry, "grpo-0", decision="passed")
    assert number == register(registry, "grpo-0", decision="refused") == 1
    found = store.get_model_version("posttrain", "1")
    assert found.source == f"dvc://models/align/grpo-0?md5={'a' * 32}.dir"
    assert {key: found.tags[key] for key in ("dvc.md5", "dvc.size", "dvc.nfiles", "model", "decision")} == {
        "dvc.md5": "a" * 32 + ".dir",
        "dvc.size": "120",
        "dvc.nfiles": "7",
        "model": "grpo-0",
        "decision": "refused",
    }


def test_promotion_moves_the_aliases_and_a_roll_back_gives_production_back_and_bars_the_weights(
    registry: Registry,
) -> None:
    first = register(registry, "grpo-0")
    registry.challenge(first)
    assert aliases(registry) == {"challenger": 1}
    with pytest.raises(TrackingError, match="nothing to roll back to: posttrain has no champion yet"):
        registry.roll_back("no")
    registry.promote(first)
    assert aliases(registry) == {"champion": 1}
    with pytest.raises(TrackingError, match="has no previous version yet"):
        registry.roll_back("no")

    second = register(registry, "dpo-0")
    registry.challenge(second)
    registry.promote(second)
    assert aliases(registry) == {"champion": 2, "previous": 1}
    registry.promote(second)
    assert aliases(registry) == {"champion": 2, "previous": 1}
    assert registry.barred() == {}

    champion, before = registry.roll_back("answers in French")
    assert (champion.number, before.number) == (1, 2)
    assert aliases(registry) == {"champion": 1, "previous": 2}
    assert {md5: version.number for md5, version in registry.barred().items()} == {"b" * 32 + ".dir": 2}
    assert line(registry.version(2)).endswith("rolled back: answers in French")

    # the same command again does not bring back what it took away
    with pytest.raises(TrackingError, match=r"version 1 \(grpo-0\) is champion after a roll-back.*flows\.promote 1"):
        registry.roll_back("answers in French")
    assert aliases(registry) == {"champion": 1, "previous": 2}
    assert [version.number for version in registry.barred().values()] == [2]

    registry.promote(second)
    assert registry.barred() == {}
    assert aliases(registry) == {"champion": 2, "previous": 1}


def test_the_local_store_is_read_as_mlflow_reads_it(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_versions(registry.project, registry.name) == registry.versions() == []
    first, second = register(registry, "grpo-0", decision="passed"), register(registry, "dpo-0")
    registry.challenge(second)
    registry.promote(first)
    registry.promote(second)
    registry.roll_back("worse")
    assert read_versions(registry.project, registry.name) == registry.versions()
    assert [version.aliases for version in registry.versions()] == [("previous",), ("champion",)]
    (registry.project / "mlflow.db").rename(registry.project / "away.db")
    assert read_versions(registry.project, registry.name) == []
    (registry.project / "mlflow.db").write_bytes(b"no database")
    assert read_versions(registry.project, registry.name) is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert read_versions(registry.project, registry.name) is None


def test_what_is_not_there_is_named(registry: Registry) -> None:
    assert registry.versions() == []
    assert registry.holding("champion") is None
    with pytest.raises(TrackingError, match=r"models/align/ppo-0 is not in dvc\.lock"):
        register(registry, "ppo-0")
    register(registry, "grpo-0")
    with pytest.raises(TrackingError, match="no version 7 of posttrain; it has: 1"):
        registry.version(7)


@pytest.mark.parametrize("uri", ["foo://bar", "127.0.0.1:5000"])
def test_an_address_that_names_no_store_is_told_in_words(
    project: Project, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(TrackingError, match=f"MLFLOW_TRACKING_URI = {uri}: not an address that MLflow accepts"):
        Registry(project.folder, "posttrain").versions()


def test_a_registry_that_does_not_answer_says_so_and_shows_no_password(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:pass-word-1@127.0.0.1:9")
    with pytest.raises(
        TrackingError, match=r"MLflow at http://\*\*\*@127\.0\.0\.1:9 did not respond to a request for the registry"
    ) as error:
        Registry(project.folder, "posttrain").versions()
    assert "pass-word-1" not in str(error.value)


@pytest.mark.slow  # SQLite waits for the lock, several times
def test_a_locked_database_is_reported_in_words(project: Project, capfd: pytest.CaptureFixture[str]) -> None:
    registry = Registry(project.folder, "posttrain")
    assert registry.versions() == []
    with closing(sqlite3.connect(project.folder / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(TrackingError, match=r"database is locked.*run again when it responds"):
            registry.versions()
    assert "Traceback" not in capfd.readouterr().err
    assert registry.versions() == []


class LoginPage(BaseHTTPRequestHandler):
    """A proxy that answers every request with its login page."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<html><form>Sign in</form></html>")

    do_POST = do_GET

    def log_message(self, *_: Any) -> None: ...


def test_an_address_that_answers_with_a_login_page_is_no_empty_registry(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), LoginPage) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(TrackingError, match="did not respond to a request for the registry"):
            Registry(project.folder, "posttrain").versions()
        server.shutdown()


def test_a_tracking_server_that_trickles_its_answer_is_left(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound the whole call: the limit of requests is one for each byte."""
    ended = threading.Event()

    def trickle(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n")
            while not ended.wait(0.05):
                connection.sendall(b" ")

    monkeypatch.setattr(store_module, "SECONDS", 0.5)
    with answering(trickle) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url.removesuffix("/hook"))
        with pytest.raises(TrackingError, match=r"no whole answer within 0\.5 s"):
            Registry(project.folder, "posttrain").versions()
        ended.set()


COMPARISON = {
    "solved": True,
    "best": "grpo",
    "title": "grpo wins",
    "headline": "sampled_accuracy",
    "models": {"grpo": {"seeds": [0, 3], "sampled_accuracy_by_seed": [0.5, 0.75]}},
}


def test_the_best_seed_of_the_best_algorithm_becomes_challenger(registry: Registry, project: Project) -> None:
    assert best_model(COMPARISON | {"solved": False}) is None
    assert best_model(COMPARISON | {"best": None}) is None
    assert best_model(COMPARISON) == ("grpo-3", "grpo wins")
    said = challenge.fn(str(project.folder), "grpo-0", "grpo wins")
    assert said.startswith("registry: version 1 (grpo-0) is challenger")
    version = registry.holding("challenger")
    assert version is not None
    assert version.tags["reason"] == "best of a comparison: grpo wins"
    judged = register(registry, "dpo-0", decision="refused")
    assert "the gate has decided on it: refused" in challenge.fn(str(project.folder), "dpo-0", "dpo wins")
    registry.challenge(judged)
    assert "the gate's challenger stays" in challenge.fn(str(project.folder), "grpo-0", "grpo wins")
    assert aliases(registry) == {"challenger": judged}
    registry.promote(version.number)
    assert "the champion, is the best model" in challenge.fn(str(project.folder), "grpo-0", "grpo wins")
    assert aliases(registry) == {"champion": 1, "challenger": judged}


def test_what_a_decision_rests_on_names_aliases_and_roll_backs(registry: Registry) -> None:
    first, second = register(registry, "grpo-0"), register(registry, "dpo-0")
    assert registry.state() == {}
    registry.promote(first)
    registry.promote(second)
    before = registry.state()
    assert before == {"champion": "2 " + "b" * 32 + ".dir", "previous": "1 " + "a" * 32 + ".dir"}
    champion, previous = registry.roll_back_pair()
    assert (champion.number, previous.number) == (2, 1)
    registry.roll_back("answers in French")
    assert registry.state() == {
        "champion": "1 " + "a" * 32 + ".dir",
        "previous": "2 " + "b" * 32 + ".dir",
        "rolled back 2": "b" * 32 + ".dir",
    }
    with pytest.raises(TrackingError, match="is champion after a roll-back"):
        registry.roll_back_pair()


def test_a_decision_against_an_earlier_champion_is_refused(registry: Registry) -> None:
    first, second = register(registry, "grpo-0"), register(registry, "dpo-0")
    wanted = registry.version(second)
    _refuse_stale(registry, wanted, "none")
    registry.promote(first)
    _refuse_stale(registry, wanted, "1")
    with pytest.raises(
        OrchestrationError, match="judged against the supervised model, and the champion is now version 1"
    ):
        _refuse_stale(registry, wanted, "none")


def test_a_version_that_was_rolled_back_since_is_refused_and_one_that_was_before_may_be_asked_for(
    registry: Registry,
) -> None:
    first, second = register(registry, "grpo-0"), register(registry, "dpo-0")
    registry.promote(first)
    registry.promote(second)
    registry.roll_back("it answers 0")
    wanted = registry.version(second)
    with pytest.raises(OrchestrationError, match=r"rolled back by hand after it was judged.*flows\.promote 2"):
        _refuse_stale(registry, wanted, "1")
    _refuse_stale(registry, wanted, "1", "it answers 0")
    with pytest.raises(OrchestrationError, match="rolled back by hand after it was judged"):
        _refuse_stale(registry, wanted, "1", "an earlier reason")


def test_a_long_reason_is_cut_to_one_line_unless_it_is_asked_for(registry: Registry) -> None:
    number = register(registry, "grpo-0", reason="too\x1b[31m long\n" * 200)
    short = line(registry.version(number))
    assert short.endswith("…")
    assert "\n" not in short
    assert "\x1b" not in short
    assert len(short.rpartition("-         ")[2]) == 120
    assert len(line(registry.version(number), full=True)) > 2000
    registry.tag(number, {RETRAIN: "trained on a forgotten file"})
    assert " train again: trained on a forgotten file; too" in line(registry.version(number))


def test_without_a_champion_the_challenger_is_named(
    project: Project, registry: Registry, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.folder)

    def refused() -> set[str]:
        found = set()
        for look in (find_model, open_served):
            with pytest.raises(DataError, match="there is no champion yet") as error:
                look(project.folder, "champion", "posttrain")
            found.add(str(error.value))
        return found

    ending = "or let the gate choose a champion with `make retrain`"
    assert refused() == {f"there is no champion yet; trained models: grpo-0, dpo-0, {ending}"}
    registry.challenge(register(registry, "grpo-0", model="grpo-0"))
    assert refused() == {f"there is no champion yet; `challenger`, version 1 (grpo-0), is there: name it, {ending}"}


def test_a_model_is_served_only_under_the_hash_of_its_bytes(
    project: Project, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refuse a folder with a flipped bit: answers would name sound weights."""
    monkeypatch.chdir(project.folder)
    (project.folder / "models/align/grpo-0").mkdir(parents=True)
    (project.folder / "models/align/grpo-0/config.json").write_text("{}")
    with pytest.raises(
        DataError,
        match=r"not hold the weights of grpo-0 \(md5 a{32}\.dir\).*`dvc checkout --force models",
    ):
        open_served(project.folder, "grpo-0", "posttrain")


def test_versions_beyond_the_first_page_of_mlflow_are_found(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a thousand refused nights a champion of the first year would count as lost."""
    registry.promote(register(registry, "grpo-0"))
    register(registry, "dpo-0")
    monkeypatch.setattr("pipelines.promotion.registry._PAGE", 1)
    assert [(each.number, each.aliases) for each in registry.versions()] == [(2, ()), (1, ("champion",))]
