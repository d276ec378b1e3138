"""Run PostgreSQL from the distribution's packages: one private cluster on the loopback address, with a password."""

from __future__ import annotations

import hashlib
import os
import pwd
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from posttrain.errors import OrchestrationError

DATABASES = ("prefect", "mlflow", "mlflow_auth")
ROLE = "posttrain"


class Postgres:
    """One cluster in the topology's folder `home`. PostgreSQL refuses to run as root, so root's cluster belongs to the user `postgres`."""

    def __init__(self, home: Path, port: int, password: str) -> None:
        self.port, self.password = port, password
        self.user = "postgres" if os.geteuid() == 0 else None
        self.data = _data_folder(home)

    def command(self) -> list[str]:
        """Return the server's command line."""
        options = {"listen_addresses": "127.0.0.1", "port": str(self.port), "unix_socket_directories": ""}
        return [program("postgres"), "-D", str(self.data), *(f"-c{name}={value}" for name, value in options.items())]

    def environment(self) -> dict[str, str]:
        """Return the environment of all PostgreSQL programs, with the password."""
        return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8", "PGPASSWORD": self.password}

    def create(self) -> None:
        """Create the cluster if it does not exist."""
        if (self.data / "PG_VERSION").is_file():
            return
        self.data.mkdir(parents=True, exist_ok=True)
        self.data.chmod(0o700)
        secret = self.data.with_name(self.data.name + ".password")
        secret.touch(mode=0o600)
        secret.write_text(self.password + "\n", encoding="utf-8")
        if self.user:
            owner = pwd.getpwnam(self.user)
            for path in (self.data, secret):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        try:
            self.run(["initdb", "-D", str(self.data), "-U", ROLE, "--auth=scram-sha-256", f"--pwfile={secret}",
                       "--encoding=UTF8", "--locale=C.UTF-8"])  # fmt: skip
        finally:
            secret.unlink()

    def create_databases(self) -> None:
        """Create the missing databases. Raises OrchestrationError if the cluster has a different password."""
        try:
            existing = self.run(
                [*self.client("psql"), "-AtX", "-d", "postgres", "-c", "SELECT datname FROM pg_database"]
            )
        except OrchestrationError as error:
            if "password authentication failed" not in str(error):
                raise
            raise OrchestrationError(
                f"the databases in {self.data} were created with a different password, probably by an earlier workspace at this"
                " path. To keep them, restore its .posttrain/servers/secrets.json; else remove the folder, or set POSTTRAIN_PGDATA"
                " to a different folder."
            ) from error
        for name in DATABASES:
            if name not in existing.split():
                self.run([*self.client("createdb"), name])

    def query(self, database: str, statement: str) -> str:
        """Return the single value of a statement."""
        return self.run([*self.client("psql"), "-AtX", "-d", database, "-c", statement]).strip()

    def client(self, name: str) -> list[str]:
        """Return the start of a client program's command line; `environment` has PGPASSWORD."""
        return [name, "-h", "127.0.0.1", "-p", str(self.port), "-U", ROLE]

    def healthy(self) -> bool:
        """Return True if the server accepts connections."""
        done = subprocess.run([program("pg_isready"), *self.client("")[1:]], capture_output=True, check=False)
        return done.returncode == 0

    def uri(self, database: str, driver: str, *, password: bool = True) -> str:
        """Return a database's address. Omit the password on a command line, which every user of the machine can read."""
        secret = f":{self.password}" if password else ""
        return f"postgresql+{driver}://{ROLE}{secret}@127.0.0.1:{self.port}/{database}"

    def run(self, command: Sequence[str], *, source: Path | None = None, output: Path | None = None) -> str:
        """Run one of PostgreSQL's programs with `source` as input; write its output to `output`, or return it."""
        done = subprocess.run(
            [program(command[0]), *command[1:]],
            cwd="/",
            env=self.environment(),
            user=self.user,
            group=self.user,
            extra_groups=[] if self.user else None,
            # The user postgres cannot open files of the current user.
            input=source.read_bytes() if source else None,
            capture_output=True,
            check=False,
        )
        if done.returncode:
            raise OrchestrationError(f"{command[0]} failed: {(done.stderr or done.stdout).decode().strip()}")
        if output:
            partial = output.with_name(output.name + ".part")
            partial.touch(mode=0o600)
            partial.write_bytes(done.stdout)
            partial.replace(output)
            return ""
        return done.stdout.decode()


def program(name: str) -> str:
    """Return the path of a PostgreSQL program: Debian's newest version, else the one on PATH."""
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
    found = str(places[-1]) if places else shutil.which(name)
    if found is None:
        raise OrchestrationError(
            f"PostgreSQL's {name} is not installed. On Debian and Ubuntu: sudo apt-get install postgresql; or use infra/compose.yaml."
        )
    return found


def _data_folder(home: Path) -> Path:
    """Return the cluster's folder. The user postgres cannot enter root's home, so root's cluster is in the distribution's folder."""
    if os.geteuid():
        return home / "postgres"
    name = hashlib.sha256(str(home.absolute()).encode()).hexdigest()[:12]
    return Path(os.environ.get("POSTTRAIN_PGDATA") or f"/var/lib/postgresql/posttrain-{name}")
