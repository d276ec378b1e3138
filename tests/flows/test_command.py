from argparse import Namespace
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.command import add_stages, main
from flows.promote import _call, promote
from posttrain.errors import OrchestrationError


def test_help_says_what_the_flow_does_and_what_the_environment_sets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main("compare", "Compare algorithms.", lambda _: None, add_stages, ["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for words in (
        "usage: python -m flows.compare",
        "Compare algorithms.",
        "POSTTRAIN_SLOTS",
        "PREFECT_API_URL",
        "STAGE",
        "POSTTRAIN_INBOX",
        "POSTTRAIN_WEBHOOK",
    ):
        assert words in printed


@pytest.mark.parametrize(
    ("url", "beginning"),
    [
        (
            "http://someone:a-password@127.0.0.1:9/api",
            "error: the Prefect server at http://***@127.0.0.1:9/api (PREFECT_API_URL) does not respond: ",
        ),
        (
            "127.0.0.1:9/api",
            "error: PREFECT_API_URL = 127.0.0.1:9/api: not an address of a Prefect server. Set it to http://HOST:PORT/api",
        ),
    ],
)
def test_a_server_that_is_away_is_told_in_words(
    tmp_path: Path, url: str, beginning: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "params.yaml").touch()
    monkeypatch.setattr("flows.server.ANSWER_SECONDS", 0.5)
    with temporary_settings({PREFECT_API_URL: url}):
        assert main("compare", "", lambda _: None, add_stages, ["--root", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(beginning)
    assert "a-password" not in printed


def test_a_root_that_is_no_project_is_told_and_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("compare", "", lambda _: None, add_stages, ["--root", str(tmp_path / "typo")]) == 2
    assert "typo is not a project: it has no params.yaml. Set --root" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_project_that_cannot_be_written_is_one_paragraph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "params.yaml").touch()
    (tmp_path / ".posttrain").touch()
    assert main("compare", "", lambda _: None, add_stages, ["--root", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {tmp_path}/.posttrain cannot be written: ")
    assert printed.count("\n") == 1


def test_an_approval_without_a_server_is_refused_instead_of_waiting_for_a_week() -> None:
    options = Namespace(version=3, roll_back=False, reason="", approval=True, adopt=False, server=None)
    with pytest.raises(OrchestrationError, match="without PREFECT_API_URL there is no page to answer on"):
        _call(options)


def test_a_roll_back_takes_neither_a_version_nor_an_approval() -> None:
    for version, approval in ((1, False), (None, True)):
        with pytest.raises(OrchestrationError, match="takes neither a version nor --approval"):
            promote.fn(version, roll_back=True, approval=approval)
