"""Text of data, files and names stays text: in pages, tables, the terminal, logs and messages."""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import logging
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.params import parse_params
from pipelines.config.yaml_files import read_yaml
from pipelines.promotion.page import markdown
from pipelines.report.tables import _csv
from pipelines.runtime.command_line import report_error
from pipelines.runtime.markup import markdown_text
from pipelines.runtime.redaction import printable, redact, redact_log_records
from posttrain.errors import ConfigError, DataError
from tasks.notify import notify


@pytest.mark.parametrize(
    "name", ["a:b", "team/x", "..", ".hidden", "x" * 101, "it's", '"q"', "", "a\nb", "<b>", "=1+1", "-x"]
)
def test_an_experiment_that_no_registry_or_address_could_hold_is_refused(root: Path, name: str) -> None:
    tree = read_yaml(root / "params.yaml")
    tree["project"]["experiment"] = name
    with pytest.raises(ConfigError, match=r"project\.experiment"):
        parse_params(tree)


@pytest.mark.parametrize("name", ["posttrain", "my team_2.1-b", "x" * 100])
def test_usual_experiments_are_taken(root: Path, name: str) -> None:
    tree = read_yaml(root / "params.yaml")
    tree["project"]["experiment"] = name
    assert parse_params(tree).project.experiment == name


def test_a_cell_is_no_formula() -> None:
    rows = [["=HYPERLINK(1)", "+1", "-1", "@x", -1.5, "grpo"]]
    assert _csv(["a"] * 6, rows) == "a,a,a,a,a,a\n'=HYPERLINK(1),'+1,'-1,'@x,-1.5,grpo\n"


def test_markdown_shows_what_is_there() -> None:
    assert markdown_text("<script>a|b</script>\n[x](http://y)") == (
        "&lt;script&gt;a\\|b&lt;/script&gt; \\[x\\]\\(http://y\\)"
    )
    check = {"name": "<i>", "passed": True, "words": "a|b"}
    shown = markdown({"candidates": [{"name": "<b>", "checks": [check]}], "reference": "sft"}, "[click](x)")
    assert "<i>" not in shown
    assert "<b>" not in shown
    assert "](" not in shown


def test_the_terminal_gets_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable("a\x1b[2Jb\rc\x9bd\te\n") == "a\\x1b[2Jb\\x0dc\\x9bd\te\n"
    assert printable("a\u202egnp.sh\u2066b\u2028c \u05d0") == "a\\u202egnp.sh\\u2066b\\u2028c \u05d0"
    report_error(DataError("no file \x1b]0;title\x07"))
    assert capsys.readouterr().err == "error: no file \\x1b]0;title\\x07\n"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PREFECT_API_AUTH_STRING", "admin:correct-horse"),
        ("POSTTRAIN_WEBHOOK", "https://hooks.example.com/T1/abcdef"),
        ("DB_PASS", "tiger"),
        ("REDIS_PWD", "lion"),
        ("AZURE_STORAGE_KEY", "/abcd+efgh=="),
        ("AZURE_STORAGE_CONNECTION_STRING", "DefaultEndpointsProtocol=https;AccountKey=abc"),
    ],
)
def test_values_of_secret_variables_are_hidden(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert redact(f"tried {value} here") == "tried *** here"


def test_a_password_is_hidden_without_its_user_and_a_short_one_only_as_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "admin:correct-horse")
    monkeypatch.setenv("DB_PASS", "lion")
    assert redact("correct-horse, lion, a million") == "***, ***, a million"


def test_tokens_in_headers_and_connection_strings_are_hidden() -> None:
    assert redact("Authorization: Bearer abc123.def456-ghi") == "Authorization: Bearer ***"
    assert redact("Basic cG9zdHRyYWluOmFiYw==") == "Basic ***"
    assert redact("AccountName=x;AccountKey=c2VjcmV0;y") == "AccountName=x;AccountKey=***;y"
    assert redact("basic understanding of the bearer bonds") == "basic understanding of the bearer bonds"


def test_a_chained_traceback_is_logged_without_passwords() -> None:
    """Prefect sends records to its server, with the cause of every error."""
    redact_log_records()
    stream = io.StringIO()
    logger = logging.getLogger("prefect.test")
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    try:
        try:
            try:
                raise OSError("postgresql://anna:hunter2@db/mlflow is away")
            except OSError as error:
                raise DataError("no store") from error
        except DataError:
            logger.exception("at %s", "http://anna:hunter2@db")
    finally:
        logger.removeHandler(handler)
    assert "hunter2" not in stream.getvalue()
    assert "OSError: postgresql://***@db/mlflow is away" in stream.getvalue()


@contextmanager
def redirecting(to: str) -> Iterator[tuple[str, list[str]]]:
    """A server that sends everybody elsewhere, and the signatures that it was given."""
    given: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            given.append(self.headers["X-Posttrain-Signature"])
            given.append("sha256=" + hmac.new(b"a-shared-secret", body, hashlib.sha256).hexdigest())
            self.send_response(307 if to else 200)
            self.send_header("Location", to)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/hook", given
        server.shutdown()


def test_a_webhook_is_signed_and_sends_nobody_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POSTTRAIN_WEBHOOK_SECRET", "a-shared-secret")
    with redirecting("") as (inside, reached), redirecting(inside) as (url, given):
        monkeypatch.setenv("POSTTRAIN_WEBHOOK", url)
        assert not notify("promoted", "x", {})
        assert reached == []
        assert given[0] == given[1]
        assert "the webhook did not receive `promoted`: HTTP Error 307" in capsys.readouterr().out


def test_a_webhook_is_an_address_of_the_web(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for url in (f"file://{tmp_path}/x", "ftp://127.0.0.1/x"):
        monkeypatch.setenv("POSTTRAIN_WEBHOOK", url)
        assert not notify("failed", "x", {})


def test_private_files_are_private_from_their_first_byte(tmp_path: Path) -> None:
    from pipelines.runtime.credentials import write_private

    path = tmp_path / "secret"
    path.write_text("older")
    path.chmod(0o644)
    write_private(path, json.dumps({}))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
