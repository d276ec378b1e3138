import io

import pytest

from tasks.log import StageLog, progress_words


class Recorder:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.now = 0.0
        self.file = io.BytesIO()
        self.log = StageLog(self.lines.append, self.file, clock=lambda: self.now)


def test_progress_updates_are_thinned_and_whole_lines_are_not() -> None:
    it = Recorder()
    for second in range(100):
        it.now = float(second)
        it.log.feed(f"step {second}\r".encode())
    it.log.feed(b"\nfinished\n")
    assert it.lines == ["step 29", "step 59", "step 89", "step 99", "finished"]
    assert it.file.getvalue().count(b"\r") == 100


def test_a_line_end_torn_between_two_chunks_is_one_line_end() -> None:
    it = Recorder()
    for chunk in (b"one\r", b"\ntw", b"o\n", b"three"):
        it.log.feed(chunk)
    it.log.close()
    assert it.lines == ["one", "two", "three"]


def test_the_error_line_of_the_step_wins_over_what_follows_it() -> None:
    it = Recorder()
    it.log.feed(b"Running stage 'sft':\n> python -m pipelines.sft\nloss 1\nerror: no such column 'x'\ncleaning up\n")
    it.log.feed(b"ERROR: failed to reproduce 'sft': failed to run: python -m pipelines.sft, exited with 2\n")
    assert it.log.last_error() == "error: no such column 'x'"
    assert it.log.outcome == "ran"
    assert not it.log.transient


def test_a_traceback_ends_with_the_exception_and_a_silent_step_with_dvcs_word() -> None:
    it = Recorder()
    it.log.feed(b"Traceback (most recent call last):\n  File \"x\"\nValueError: bad\nERROR: failed to reproduce 'x'\n")
    assert it.log.last_error() == "ValueError: bad"
    silent = Recorder()
    silent.log.feed(b"> false\nERROR: failed to reproduce 'x': exited with 1\n")
    assert silent.log.last_error() == "failed to reproduce 'x': exited with 1"


def test_dvcs_own_reason_is_not_hidden_by_the_last_line_of_a_step_that_succeeded() -> None:
    """`models` may be a link to a different disk."""
    it = Recorder()
    it.log.feed(b"> python -m pipelines.base\nWriting model shards: 100%|##| 1/1\n")
    it.log.feed(b"ERROR: failed to reproduce 'base': '/p/models/base' is outside of git repository '/p'\n")
    assert it.log.last_error().endswith("'/p/models/base' is outside of git repository '/p'")


@pytest.mark.parametrize("status", ["-9", "137"])
def test_a_step_that_a_signal_ended_is_reported_by_the_signal(status: str) -> None:
    it = Recorder()
    it.log.feed(f"> x\nstep 3 of 9\nERROR: failed to reproduce 'x': failed to run: x, exited with {status}\n".encode())
    assert it.log.last_error() == "its process was ended by SIGKILL, which the kernel sends when the memory is full"


def test_dvcs_words_tell_the_outcome_and_its_advice_is_dropped() -> None:
    it = Recorder()
    it.log.feed(b"Stage 'a' didn't change, skipping\nData and pipelines are up to date.\n")
    assert (it.log.outcome, it.lines) == ("up-to-date", ["Stage 'a' didn't change, skipping"])
    it.log.feed(b"Stage 'a' is cached - skipping run, checking out outputs\nUse `dvc push` to send your updates\n")
    assert it.log.outcome == "restored"


def test_a_held_lock_is_transient_and_names_the_holder() -> None:
    it = Recorder()
    it.log.feed(b"ERROR: failed to reproduce 'a': '/w/a' is busy, it is being blocked by:\n  (PID 12): dvc repro a\n\n")
    assert it.log.transient
    assert it.log.dvc_error().endswith("(PID 12): dvc repro a")


def test_a_progress_bar_is_shown_in_words() -> None:
    assert (
        progress_words("align-grpo-0:  25%|##5       | 10/40 [00:12<00:36,  1.20s/step]") == "step 10 of 40, 00:36 left"
    )
    assert progress_words("no bar") is None
