"""An inbox in a store: one object that the key may not read or copy stops none of the others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipelines.commands import intake
from pipelines.commands.intake import take_in
from pipelines.config.params import load_params
from pipelines.data.inbox import StoreInbox
from tests.pipelines.commands.test_inbox_nights import problem
from tests.pipelines.commands.test_intake import folder

__all__ = ["folder"]


class Guarded(MemoryFileSystem):
    """A store in memory whose key may list everything, may not read objects named `secret`, and may not copy those named `fixed`."""

    protocol = "guarded"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("guarded://")))

    def info(self, path: str, **options: Any) -> Any:
        if "secret" in path:
            raise PermissionError("Forbidden")
        return super().info(path, **options)

    def cp_file(self, path1: str, path2: str, **options: Any) -> None:
        if "fixed" in path1:
            raise PermissionError("Forbidden")
        super().cp_file(path1, path2, **options)


@pytest.fixture
def store() -> Iterator[Guarded]:
    fsspec.register_implementation("guarded", Guarded, clobber=True)
    yield Guarded()
    Guarded.store.clear()


def test_an_object_that_the_key_may_not_read_or_copy_stops_nothing(folder: Path, store: Guarded) -> None:
    store.pipe_file("/inbox/problems/a-secret.jsonl", b"{}")
    store.pipe_file("/inbox/problems/b-fixed.jsonl", b'{"bad": 1}\n')
    store.pipe_file("/inbox/problems/c-bad.jsonl", b'{"bad": 1}\n')
    store.pipe_file("/inbox/problems/d-good.jsonl", json.dumps(problem("good")).encode())
    for night in range(2):
        entries = take_in(load_params(folder / "params.yaml"), StoreInbox("guarded://inbox"))
        found = {entry.file: (entry.outcome, entry.reason) for entry in entries}
        assert found["problems/a-secret.jsonl"][0] == "left"
        assert found["problems/a-secret.jsonl"][1].startswith("the key of this user may not read it")
        assert found["problems/b-fixed.jsonl"][0] == "left"
        assert (
            "it is refused, and the key of this user may not copy it to quarantined"
            in found["problems/b-fixed.jsonl"][1]
        )
        if night == 0:
            assert found["problems/c-bad.jsonl"][0] == "quarantined"
            assert found["problems/d-good.jsonl"] == ("accepted", "")
        else:
            assert len(found) == 2
    assert sorted(store.store) == [
        "/inbox/problems/a-secret.jsonl",
        "/inbox/problems/b-fixed.jsonl",
        "/inbox/quarantined/problems/c-bad.jsonl",
        "/inbox/quarantined/problems/c-bad.jsonl.reason.txt",
    ]


def test_an_inbox_that_contains_a_remote_of_dvc_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every object of the models would be moved to quarantine."""
    (folder / ".dvc").mkdir(exist_ok=True)
    (folder / "shared").mkdir()
    for inbox, remote in (
        ("s3://bucket", "s3://bucket/dvc"),
        ("s3://bucket/dvc", "s3://bucket/dvc/"),
        ("shared", "../shared/store"),
        (f"file://{folder}/shared", f"{folder}/shared"),
    ):
        (folder / ".dvc" / "config").write_text(f"['remote \"store\"']\n    url = {remote}\n")
        assert intake.main(["--inbox", inbox]) == 2
        assert f"it contains DVC's remote {remote}" in capsys.readouterr().err
        intake.refuse_remotes(folder, "s3://bucket/inbox")
        intake.refuse_remotes(folder, str(folder / "inbox"))
