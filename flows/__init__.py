"""Prefect flows: they read the DAG from dvc.yaml and bring its stages up to date."""

import os

from pipelines.runtime.environment import quiet
from pipelines.runtime.garbage import collect_rarely
from pipelines.runtime.redaction import redact_log_records

quiet()
redact_log_records()
# Before Prefect is imported. Its own lines go to its server; the terminal shows one line per event (tasks.console).
os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
collect_rarely()
