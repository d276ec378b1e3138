"""Passwords of this project's own servers: made once, kept in .posttrain/secrets, readable by their owner only."""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
from pathlib import Path

from posttrain.errors import ConfigError

FOLDER = Path(".posttrain/secrets")
SERVING = Path(".posttrain/serve.lock")
"""Held by `make serve`; holds the address of its Prefect server."""
USER = "posttrain"
ADMIN = "admin"
_AUTH = "PREFECT_API_AUTH_STRING"


def secret(project: Path, name: str) -> str:
    """Return the secret of that name, made if there is none. Raises ConfigError if other users may read it."""
    path = project / FOLDER / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(0o700)
        made = path.with_name(f".{name}.{os.getpid()}")
        write_private(made, secrets.token_urlsafe(24) + "\n")
        try:
            os.link(made, path)  # unlike a rename, it keeps the secret of a command that was faster
        except FileExistsError:
            pass
        finally:
            made.unlink()
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ConfigError(
            f"{path} can be read by other users, who could then start runs as you. Remove it and start the servers again:"
            " they make a new one."
        )
    found = path.read_bytes().decode("utf-8", "replace").strip()
    if not found:
        raise ConfigError(f"{path} is empty, so nothing would be protected. Remove it and start the servers again.")
    if not (found.isascii() and found.isprintable()):
        raise ConfigError(f"{path} is damaged, as after a power cut. Remove it and start the servers again.")
    return found


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, from its first byte on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(text)


def prefect_auth(project: Path) -> str:
    """Return `user:password` of Prefect's API: PREFECT_API_AUTH_STRING, or the project's own."""
    return os.environ.get(_AUTH) or f"{USER}:{secret(project, 'prefect')}"


def prefect_client(auth: str) -> dict[str, str]:
    """Return the environment of a process that uses our Prefect server."""
    return {_AUTH: auth, "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED": "true"}


def prefect_server(auth: str, port: int) -> dict[str, str]:
    """Return the environment of our Prefect server: a password, CSRF tokens, and no origin but its own pages."""
    origins = f"http://127.0.0.1:{port},http://localhost:{port}"
    return prefect_client(auth) | {
        "PREFECT_SERVER_API_AUTH_STRING": auth,
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": origins,
        # with only `--port`, its pages call port 4200
        "PREFECT_SERVER_UI_API_URL": f"http://127.0.0.1:{port}/api",
    }


def mlflow_server(config: Path, database: str, password: str, flask_key: str) -> dict[str, str]:
    """Return the environment of an MLflow server with accounts. `config` is written, `database` keeps the accounts."""
    write_private(
        config,
        f"[mlflow]\ndefault_permission = NO_PERMISSIONS\ndatabase_uri = {database}\nadmin_username = {ADMIN}\n"
        "authorization_function = pipelines.tracking.mlflow_requests:authenticate\nauth_cache_ttl_seconds = 60\n",
    )
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": flask_key,
    }


def mlflow_options(port: int) -> list[str]:
    """Return the options of an MLflow server with accounts that answers to its own address only (no DNS rebinding)."""
    hosts = f"127.0.0.1:{port},localhost:{port}"
    return ["--app-name", "basic-auth", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
            "--allowed-hosts", hosts]  # fmt: skip


def running_prefect(project: Path) -> str | None:
    """Return the address of the Prefect server of this project's `make serve`, or None if it is not running."""
    path = project / SERVING
    if not path.is_file():
        return None
    with path.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip() or None
    return None
