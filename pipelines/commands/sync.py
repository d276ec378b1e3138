"""Copy the journals of this project into MLflow, and the answers that `posttrain serve` logged.

    posttrain sync              once: everything that is here and not yet there
    posttrain sync --wait 60    the same, trying again while the server is away
    posttrain sync --follow     keep doing so until SIGTERM, Ctrl-C or the end of a piped standard input

Nothing is lost while a tracking server is down: the journals hold everything, and each value is stored exactly once.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from pipelines.config.params import load_params
from pipelines.runtime import environment
from pipelines.runtime.command_line import command_parser, real, reports_errors
from pipelines.runtime.redaction import redact
from pipelines.tracking.projection import Projector
from pipelines.tracking.served import ServedTraces
from pipelines.tracking.source import RecordedRun, discover, load
from pipelines.tracking.store import ask, open_client, tracking_uri
from posttrain.errors import TrackingError

T = TypeVar("T")
_POLL_SECONDS, _LONGEST_REST_SECONDS, _LONGEST_OUTAGE_PAUSE_SECONDS = 1.0, 30.0, 8.0
_BEHIND_TRAINING = 10
_REST_FACTOR = 20
"""A follower rests this many times the duration of its last pass, so that it never competes with training."""


def catch_up(
    projector: Projector,
    *,
    first: str | None = None,
    recheck: bool = True,
    enough: Callable[[], bool] = lambda: False,
) -> dict[str, str]:
    """Copy every journal, then end stale runs; return the MLflow run id by run identity.

    `recheck=False` trusts this checkout's notes of earlier copies; `enough` is called between two journals and ends the pass if true.
    Raises TrackingError at the first call that the store does not complete, and after the pass if a journal is damaged.
    """
    problems: list[str] = []
    sources = discover(projector.project_root, problems)
    sources.sort(key=lambda source: source.identity != first)
    done: dict[str, str] = {}
    for source in sources:
        if enough():
            return done
        if recheck or source.identity == first or not projector.settled(source):
            done[source.identity] = _project(projector, source)
    _ask_store(projector, partial(projector.sweep, {source.identity for source in sources}))
    if done:
        _ask_store(projector, partial(projector.describe_experiment, sources))
    if problems:
        raise TrackingError("\n".join(problems))
    return done


def _project(projector: Projector, source: RecordedRun) -> str:
    """Copy one journal."""
    return _ask_store(projector, partial(projector.project, source))


def _ask_store(projector: Projector, call: Callable[[], T]) -> T:
    """Return the result of the call. Raises TrackingError, which explains that nothing is lost."""
    return ask(
        projector.client,
        call,
        "did not accept the values",
        "They are safe in the journal; `posttrain sync` copies them when it responds again.",
    )


def follow(project: Path, run: str | None, stop: threading.Event) -> None:
    """Keep the store up to date at low priority until `stop` is set; then copy once more at normal priority."""
    carrier = _JournalCopier(Projector(open_client(project), project), run)
    worker = threading.Thread(target=carrier.keep_up, args=(stop,), daemon=True)
    worker.start()
    worker.join()
    carrier.carry(lambda: False)


class _JournalCopier:
    """Copy journals, one pass at a time; report an outage once, and its end."""

    def __init__(self, projector: Projector, run: str | None) -> None:
        self._projector, self._run = projector, run
        self._down, self._whole = False, True

    def keep_up(self, stop: threading.Event) -> None:
        """Repeat passes until `stop` is set."""
        os.nice(_BEHIND_TRAINING)  # On Linux, this changes only this thread.
        pause = _POLL_SECONDS
        while not stop.is_set():
            began = time.monotonic()
            if self.carry(stop.is_set):
                rest = min(_REST_FACTOR * (time.monotonic() - began), _LONGEST_REST_SECONDS)
                pause = max(_POLL_SECONDS, rest)
            else:
                pause = min(2 * pause, _LONGEST_OUTAGE_PAUSE_SECONDS)
            stop.wait(pause)

    def carry(self, enough: Callable[[], bool]) -> bool:
        """Run one pass and return False while the store is down.

        The first pass covers every journal, and so does each pass if no run was named.
        """
        try:
            if self._whole or self._run is None:
                catch_up(self._projector, first=self._run, recheck=False, enough=enough)
                self._whole = enough()
            elif (source := _single(self._projector.project_root, self._run)) is not None:
                _project(self._projector, source)
        except TrackingError as error:
            if not self._down:
                print(f"tracking: {error}", file=sys.stderr, flush=True)
            self._down = True
            return False
        if self._down:
            print("tracking: MLflow responds again and has all records.", file=sys.stderr, flush=True)
        self._down = False
        return True


def _single(project: Path, run: str) -> RecordedRun | None:
    """Return the journal of one run, or None."""
    return load(environment.states(project) / run)


def _stop_event() -> threading.Event:
    """Return an event that SIGTERM, SIGINT, or the end of a piped standard input sets."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if stat.S_ISFIFO(os.fstat(0).st_mode):

        def wait_for_end() -> None:
            while os.read(0, 1024):
                pass
            stop.set()

        threading.Thread(target=wait_for_end, daemon=True).start()
    return stop


def synchronise(project: Path, wait_seconds: float) -> dict[str, str]:
    """Run one complete pass; while the store is down, retry until `wait_seconds` are over."""
    projector = Projector(open_client(project), project)
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            done = catch_up(projector)
            ServedTraces(project, load_params(project / "params.yaml").project.experiment).catch_up()
            return done
        except TrackingError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(min(_POLL_SECONDS, max(0.0, deadline - time.monotonic())))


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = command_parser("posttrain sync", __doc__)
    parser.add_argument("--follow", action="store_true", help="keep the store up to date until SIGTERM or Ctrl-C")
    parser.add_argument(
        "--wait",
        type=real(0, 1e7),
        default=0.0,
        metavar="SECONDS",
        help="retry for this many seconds while the store is down",
    )
    parser.add_argument("--run", metavar="NAME-KEY", help="with --follow: follow only this run")
    args = parser.parse_args(argv)
    project = environment.root()
    environment.require_writable(project)
    if args.follow:
        follow(project, args.run, _stop_event())
    else:
        runs = synchronise(project, args.wait)
        print(f"{len(runs)} runs are up to date in {redact(tracking_uri(project))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
