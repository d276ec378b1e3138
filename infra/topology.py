"""Define the five processes of one project: their commands, and the environment for commands that use them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

import psutil
from alembic.script import ScriptDirectory

from infra.postgres import Postgres
from infra.processes import Processes, Service
from pipelines.runtime import credentials, environment
from pipelines.runtime.garbage import library_command
from pipelines.runtime.process import Lock
from pipelines.tracking.server import SERVER
from posttrain import network
from posttrain.errors import OrchestrationError
from posttrain.files import read_json, replace
from tasks.process import child_environment

BUCKET = "posttrain"
STORE_KEY = "posttrain-store-key"
ADMIN = credentials.ADMIN
LOST_SECRETS = "It holds the passwords of the databases: restore it from a back-up. Without one, remove it together with the databases."
ORDER = ("postgres", "s3", "mlflow", "prefect", "worker")


class Topology:
    """The five processes of one project. `home` holds pids, logs and secrets."""

    def __init__(self, project: Path, home: Path | None = None, first_port: int | None = None) -> None:
        self.project = project.absolute()
        self.home = home or self.project / ".posttrain" / "servers"
        self.processes = Processes(self.home, self.project)
        self.secrets = self._secrets()
        first = first_port or _first_port()
        self.ports = {name: first + i for i, name in enumerate(ORDER[:4])}
        self.postgres = Postgres(self.home, self.ports["postgres"], self.secrets["postgres"])

    def url(self, name: str) -> str:
        """Return the address of a server."""
        return f"http://127.0.0.1:{self.ports[name]}"

    def client_environment(self) -> dict[str, str]:
        """Return the variables that a command needs to use these servers."""
        return {
            "PREFECT_API_URL": f"{self.url('prefect')}/api",
            **credentials.prefect_client(f"{credentials.USER}:{self.secrets['prefect']}"),
            "POSTTRAIN_PROJECT": str(self.project),
            "MLFLOW_TRACKING_URI": self.url("mlflow"),
            "MLFLOW_TRACKING_USERNAME": ADMIN,
            "MLFLOW_TRACKING_PASSWORD": self.secrets["mlflow"],
            "AWS_ENDPOINT_URL_S3": self.url("s3"),
            "AWS_ACCESS_KEY_ID": STORE_KEY,
            "AWS_SECRET_ACCESS_KEY": self.secrets["s3"],
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def services(self) -> list[Service]:
        """Return the five services in the order of their start."""
        here = {**child_environment(), **environment.QUIET, **self.client_environment()}
        python = [sys.executable, "-m"]
        return [
            Service("postgres", self.postgres.command(), self.postgres.environment(), self.postgres.healthy,
                    user=self.postgres.user, port=self.ports["postgres"]),
            Service("s3", [*python, "infra.s3", str(self.ports["s3"]), str(self.home / "s3")], here,
                    lambda: responds(self.url("s3")), port=self.ports["s3"]),
            Service("mlflow", [*python, SERVER, "server", *credentials.mlflow_options(self.ports["mlflow"])],
                    here | self._mlflow(), lambda: responds(f"{self.url('mlflow')}/health"), port=self.ports["mlflow"]),
            Service("prefect", library_command("prefect", "server", "start", "--host", "127.0.0.1", "--port",
                                               str(self.ports["prefect"])),
                    here | self._prefect(), lambda: responds(f"{self.url('prefect')}/api/health"), port=self.ports["prefect"]),
            Service("worker", [*python, "flows.worker"], here | {"PREFECT_UI_URL": self.url("prefect")},
                    self._worker_polls),
        ]  # fmt: skip

    def up(self) -> None:
        """Start the services that are not running: the database first, the worker last, the others in parallel."""
        self.write_environment()
        self.postgres.create()
        began = time.monotonic()
        for name in self.ports:
            self._require_port(name)
        for names in (("postgres",), ("s3", "mlflow", "prefect"), ("worker",)):
            for name in names:
                self._before(name)
                self.processes.start(self.service(name))
            for name in names:
                self.processes.wait(self.service(name))
                self._after(name)
                print(f"  {name:<9} is running ({time.monotonic() - began:.1f} s)", flush=True)

    def start(self, name: str) -> None:
        """Start one service."""
        if name in self.ports:
            self._require_port(name)
        if name == "postgres":
            self.postgres.create()  # before the first `up` there is none
        self.processes.start(self.service(name))
        self.processes.wait(self.service(name))
        self._after(name)

    def _require_port(self, name: str) -> None:
        """Raise OrchestrationError if a different program listens at the port of a service that is not running."""
        if self.processes.pid(name) is not None:
            return
        try:
            network.free_port(self.ports[name])
        except OSError as error:
            raise OrchestrationError(
                f"port {self.ports[name]} on {network.HOST}, for {name}: {error.strerror}. Stop what listens there, or choose four other"
                f" ports by the first of them: POSTTRAIN_PORTS={self.ports[ORDER[0]] + 10} make up (and the same for `make status`"
                " and `make down`)"
            ) from None

    def _before(self, name: str) -> None:
        """Prepare the start of a service."""
        if name == "mlflow" and self.processes.pid("mlflow") is None:
            self._upgrade_mlflow()
        if name == "worker":
            self.deploy()

    def _after(self, name: str) -> None:
        """Finish the start of a service."""
        if name == "postgres":
            self.postgres.create_databases()
        if name == "s3":
            self._prepare_store()

    def service(self, name: str) -> Service:
        """Return one service by its name."""
        return next(service for service in self.services() if service.name == name)

    def down(self, names: Sequence[str] = ORDER) -> None:
        """Stop the services in reverse order."""
        for name in sorted(names, key=ORDER.index, reverse=True):
            print(
                f"  {name:<9} {'stopped' if self.processes.stop(name, self._stop_signal(name)) else 'was not running'}"
            )

    def deploy(self) -> None:
        """Deploy prefect.yaml and its work pool to the server."""
        done = subprocess.run(
            [sys.executable, "-m", "flows.deploy"], cwd=self.project, capture_output=True, text=True, check=False,
            env={**child_environment(), **environment.QUIET, **self.client_environment()},
        )  # fmt: skip
        if done.returncode:
            raise OrchestrationError(done.stderr.removeprefix("error: ").strip())

    def _upgrade_mlflow(self) -> None:
        """Upgrade MLflow's tables: its server refuses tables of an older version, and creates tables only in an empty database."""
        found = self.postgres.query("mlflow", "SELECT to_regclass('alembic_version') IS NOT NULL")
        if found != "t":
            return
        installed = self.postgres.query("mlflow", "SELECT version_num FROM alembic_version")
        package = importlib.util.find_spec("mlflow")
        assert package is not None
        assert package.origin is not None
        required = ScriptDirectory(str(Path(package.origin).parent / "store" / "db_migrations")).get_current_head()
        if installed == required:
            return
        print("  mlflow    upgrades its tables", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "mlflow", "db", "upgrade", self.postgres.uri("mlflow", "psycopg2", password=False)],
            env={**child_environment(), **environment.QUIET, **self.postgres.environment()},
            cwd=self.project, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise OrchestrationError(f"`mlflow db upgrade` failed:\n{(done.stdout + done.stderr)[-2000:]}")

    def write_environment(self) -> Path:
        """Write the file to source before commands that use the servers, and return its path."""
        path = self.home / "env"
        lines = [f"export {name}={shlex.quote(value)}" for name, value in self.client_environment().items()]
        credentials.write_private(path, "\n".join(lines) + "\n")
        return path

    def _mlflow(self) -> dict[str, str]:
        accounts = credentials.mlflow_server(
            self.home / "mlflow-auth.ini",
            self.postgres.uri("mlflow_auth", "psycopg2"),
            self.secrets["mlflow"],
            self.secrets["flask"],
        )
        return accounts | {
            "MLFLOW_BACKEND_STORE_URI": self.postgres.uri("mlflow", "psycopg2"),
            "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{BUCKET}/mlflow",
            "MLFLOW_S3_ENDPOINT_URL": self.url("s3"),
        }

    def _prefect(self) -> dict[str, str]:
        auth = f"{credentials.USER}:{self.secrets['prefect']}"
        return credentials.prefect_server(auth, self.ports["prefect"]) | {
            "PREFECT_API_DATABASE_CONNECTION_URL": self.postgres.uri("prefect", "asyncpg")
        }

    def _prepare_store(self) -> None:
        """Create the bucket, and set it as this project's default DVC remote (.dvc/config.local, which git ignores)."""
        import boto3

        keys = self.client_environment()
        client = boto3.client(
            "s3", endpoint_url=self.url("s3"), region_name=keys["AWS_DEFAULT_REGION"],
            aws_access_key_id=keys["AWS_ACCESS_KEY_ID"], aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        )  # fmt: skip
        if BUCKET not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
            client.create_bucket(Bucket=BUCKET)
        if (self.project / ".dvc").is_dir():
            self._set_remote(keys)

    def _set_remote(self, keys: dict[str, str]) -> None:
        """Write the DVC remote with the store's keys."""
        from dvc.config import Config

        local = self.project / ".dvc" / "config.local"
        if not local.is_file():
            credentials.write_private(local, "")  # it is going to hold the store's key
        with Config(str(self.project / ".dvc")).edit("local") as config:
            config["remote"]["servers"] = {
                "url": f"s3://{BUCKET}/dvc",
                "endpointurl": self.url("s3"),
                "access_key_id": keys["AWS_ACCESS_KEY_ID"],
                "secret_access_key": keys["AWS_SECRET_ACCESS_KEY"],
                "region": keys["AWS_DEFAULT_REGION"],
            }
            config["core"]["remote"] = "servers"
        local.chmod(0o600)

    def _secrets(self) -> dict[str, str]:
        """Load the passwords, and generate them at the first call."""
        path = self.home / "secrets.json"

        def read() -> dict[str, str]:
            return read_json(path, LOST_SECRETS) if path.is_file() else {}

        def missing() -> list[str]:
            return [name for name in ("postgres", "mlflow", "flask", "s3", "prefect") if name not in found]

        found = read()
        if missing():
            with Lock(
                self.home / "secrets.lock"
            ):  # two first calls at once would start servers with different passwords
                found = read()
                found |= {name: secrets.token_urlsafe(24) for name in missing()}
                made = path.with_name(".secrets.json")
                credentials.write_private(made, json.dumps(found))
                replace(made, path)
        return found

    def _worker_polls(self) -> bool:
        """Return True if the worker is polling. It has no port, so this checks that Prefect's worker has replaced the start-up process."""
        pid = self.processes.pid("worker")
        return pid is not None and "worker" in " ".join(psutil.Process(pid).cmdline()[2:5])

    def _stop_signal(self, name: str) -> int:
        """Return the signal that stops a service. PostgreSQL's fast shutdown is INT: it does not wait for clients."""
        return signal.SIGINT if name == "postgres" else signal.SIGTERM


def _first_port() -> int:
    """Return the first of the four ports. Raises OrchestrationError if POSTTRAIN_PORTS is not valid."""
    text = os.environ.get("POSTTRAIN_PORTS", "15430")
    if not re.fullmatch("[0-9]{4,5}", text) or not 1024 <= int(text) <= 65532:
        raise OrchestrationError(
            f"POSTTRAIN_PORTS = {text[:40]!r}: must be the first of four ports, from 1024 to 65532"
        )
    return int(text)


def responds(url: str) -> bool:
    """Return True if a server responds at the URL."""
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError as error:
        return error.code < 500
    # HTTPException: a probe of an unused port may connect to itself.
    except (urllib.error.URLError, OSError, HTTPException):
        return False
    return True
