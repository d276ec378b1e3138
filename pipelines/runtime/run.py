"""Define the argument of a step's `run`: its context, its recorder and its outputs."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.runtime.context import RunContext
from pipelines.runtime.outputs import RunOutputs
from pipelines.runtime.recorder import RunRecorder


@dataclass(frozen=True)
class Run:
    """One run of one step. A helper takes only the part that it uses."""

    context: RunContext
    recorder: RunRecorder
    outputs: RunOutputs

    @classmethod
    def create(cls, context: RunContext) -> Run:
        """Create the recorder and the outputs of a context; both write to one journal."""
        recorder = RunRecorder(context)
        return cls(context, recorder, RunOutputs(recorder.journal, recorder.folder, records=context.records))
