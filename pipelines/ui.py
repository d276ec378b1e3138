"""Show the runs of this project: an MLflow server on this machine only, and the links worth opening.

    python -m pipelines.ui [--port 5000]

Catches up with the journals first. Ctrl-C stops the server. With MLFLOW_TRACKING_URI set to a server, only the links to
that server are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import urlopen

from pipelines import environment
from pipelines.config import load_params
from pipelines.process import die_with_parent
from pipelines.redaction import redact
from pipelines.sync import synchronise
from pipelines.tracking.store import artifact_root, experiment_id, open_client, tracking_uri
from posttrain.errors import Interrupted, PosttrainError, TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient

_HOST = "127.0.0.1"
_START_SECONDS = 60.0


def links(client: MlflowClient, base: str, experiment: str) -> dict[str, str]:
    """What to open, by name: the experiment, and the comparison of the newest align run per algorithm and seed."""
    found = {"experiment": f"{base}/#/experiments/{experiment}"}
    newest: dict[str, str] = {}
    for run in client.search_runs([experiment], "tags.stage = 'align'", order_by=["attributes.start_time ASC"]):
        newest[run.info.run_name] = run.info.run_id
    if newest:
        runs = json.dumps([newest[name] for name in sorted(newest)])
        found["comparison of the align runs"] = (
            f"{base}/#/compare-runs?runs={quote(runs)}&experiments={quote(json.dumps([experiment]))}"
        )
    return found


def server_command(project: Path, port: int) -> list[str]:
    """An MLflow server over the project's store, reachable from this machine only."""
    store = ["--backend-store-uri", tracking_uri(project), "--no-serve-artifacts"]
    store += ["--default-artifact-root", artifact_root(project).as_uri()]
    return [sys.executable, "-m", "mlflow", "server", *store, "--host", _HOST, "--port", str(port), "--workers", "1"]


def free_port(wanted: int) -> int:
    """The port, if nobody listens there; any free one for 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, wanted))
        except OSError as error:
            raise TrackingError(
                f"port {wanted} on {_HOST}: {error.strerror}. Stop what listens there, or take a free one: --port 0"
            ) from None
        return int(probe.getsockname()[1])


def serve(project: Path, port: int) -> None:
    """Run the server until Ctrl-C or SIGTERM, then stop it with everything it started."""
    base = f"http://{_HOST}:{port}"
    found = _links(project, base)
    server = subprocess.Popen(
        server_command(project, port), cwd=project, start_new_session=True, preexec_fn=die_with_parent
    )
    try:
        _wait_until_up(server, base)
        print(f"MLflow answers at {base} (Ctrl-C stops it)\n{found}", flush=True)
        code = server.wait()
        raise TrackingError(f"the MLflow server ended with exit code {code}; its messages are above.")
    finally:
        _stop(server)


def _stop(server: subprocess.Popen[bytes]) -> None:
    for number, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(server.pid, number)
            server.wait(seconds)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _wait_until_up(server: subprocess.Popen[bytes], base: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise TrackingError(
                f"the MLflow server did not start (exit code {server.returncode}); its messages are above."
            )
        try:
            with urlopen(f"{base}/health", timeout=2):
                return
        except (URLError, OSError):
            time.sleep(0.2)
    raise TrackingError(f"the MLflow server did not answer at {base} within {_START_SECONDS:.0f} s.")


def _links(project: Path, base: str) -> str:
    """The links as text, after catching up with the journals."""
    synchronise(project, 0.0)
    client = open_client(project)
    experiment = experiment_id(client, load_params(project / "params.yaml").project.experiment, project)
    return "\n".join(f"{name}:\n  {link}" for name, link in links(client, base, experiment).items())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.ui", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=5000, help="port on 127.0.0.1; 0 takes a free one (default: 5000)")
    args = parser.parse_args(argv)
    environment.quiet()
    project = environment.root()
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    try:
        uri = tracking_uri(project)
        if uri.startswith(("http://", "https://")):
            print(_links(project, redact(uri).rstrip("/")))
        else:
            serve(project, free_port(args.port))
    except Interrupted:
        return 0
    except PosttrainError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        return error.exit_code
    return 0


def _interrupt(*_: object) -> None:
    raise Interrupted("stopped")


if __name__ == "__main__":
    sys.exit(main())
