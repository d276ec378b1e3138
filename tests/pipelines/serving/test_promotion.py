"""200 requests at once while `python -m flows.promote` changes the champion, against the real commands, registry and DVC cache."""

from __future__ import annotations

import asyncio
import http.client
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

import posttrain as pt
from pipelines.commands.serve import SECRET
from pipelines.promotion.registry import Registry, Version
from pipelines.runtime import credentials
from pipelines.serving.server import VERSION_HEADER
from posttrain import network
from posttrain.guard import signal_at_parents_death
from tests import coroutines
from tests.pipelines.serving.test_server import SIZES
from tests.workspace import dvc

REQUESTS = 200


def registered(project: Path, registry: Registry, seed: int) -> Version:
    """Return a version whose weights are in DVC's cache."""
    folder = f"models/align/grpo-{seed}"
    pt.tiny(seed=seed, **SIZES).save(project / folder)
    dvc(project, "add", "-q", folder)
    text = (project / f"{folder}.dvc").read_text()
    md5, size, files = (re.search(rf"{name}: (\S+)", text)[1] for name in ("md5", "size", "nfiles"))  # type: ignore[index]
    entry = {"md5": md5, "size": size, "nfiles": files}
    return registry.register_entry(f"grpo-{seed}", folder, entry, {}, "test")


@pytest.mark.slow
@pytest.mark.servers
def test_no_request_fails_while_a_promotion_happens(
    workspace: Path, root: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(root))
    shutil.copy(root / "params.yaml", workspace)
    shutil.copy(empty_store, workspace / "mlflow.db")
    registry = Registry(workspace, "posttrain")
    first, second = (registered(workspace, registry, seed) for seed in (0, 1))

    def promote(version: Version) -> None:
        command = [sys.executable, "-m", "flows.promote", str(version.number)]
        done = subprocess.run(command, cwd=workspace, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    promote(first)
    port, log = network.free_port(), workspace / "serve.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.commands", "serve", "--port", str(port)],
            cwd=workspace, stdout=output, stderr=subprocess.STDOUT, preexec_fn=signal_at_parents_death,
        )  # fmt: skip
    try:
        up = network.wait_until(lambda: "Ctrl-C stops" in log.read_text(), lambda: process.poll() is None, 120)
        assert up, log.read_text()
        key = credentials.secret(workspace, SECRET)
        assert stays_open(port, key), "a client that keeps a connection would find it closed with its next request"
        answers = coroutines.run(requests(f"http://127.0.0.1:{port}", key, lambda: promote(second)))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    assert len(answers) >= REQUESTS
    names = [answer.headers[VERSION_HEADER] for answer in answers]
    assert set(names) == {f"version {each.number}, md5 {each.md5}" for each in (first, second)}
    assert [answer.json()["system_fingerprint"] for answer in answers] == names
    assert f"the champion is now version {second.number}" in log.read_text()


def stays_open(port: int, key: str) -> bool:
    """Return True if a connection can be used again after 6 s: clients such as httpx and OpenAI's keep theirs for 5 s."""
    connection = http.client.HTTPConnection(network.HOST, port, timeout=60)
    try:
        for pause in (6, 0):
            connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
            connection.getresponse().read()
            time.sleep(pause)
    except (http.client.HTTPException, ConnectionError):
        return False
    finally:
        connection.close()
    return True


async def requests(base: str, key: str, promote: Callable[[], None]) -> list[httpx.Response]:
    """Keep 200 requests in flight from before the promotion until the new version has answered 200."""
    headers = {"Authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=REQUESTS)
    answers: list[httpx.Response] = []
    async with httpx.AsyncClient(base_url=base, headers=headers, timeout=300, limits=limits) as client:
        begun = asyncio.get_running_loop().run_in_executor(None, promote)

        async def ask(i: int) -> None:
            while True:
                body = {"model": "champion", "prompt": f"{i}=", "max_tokens": 8, "seed": i}
                answer = await client.post("/v1/completions", json=body)
                answers.append(answer)
                newest = answers[-1].headers.get(VERSION_HEADER) != answers[0].headers.get(VERSION_HEADER)
                if answer.status_code != 200 or newest:
                    return

        await asyncio.gather(*(ask(i) for i in range(REQUESTS)))
        await begun
    return answers
