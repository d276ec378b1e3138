"""Write tables of the policy's answers during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipelines.runtime.recorder import RunRecorder
from posttrain.data.tokens import TextEncoder, Tokens
from posttrain.models.policy import Policy
from posttrain.models.shards import gathered
from posttrain.rollouts.engine import Request, SamplingSettings
from posttrain.rollouts.native import NativeEngine


class GreedySamples:
    """Every few steps, write greedy answers to the first prompts of the training table, next to the table's responses."""

    def __init__(
        self,
        recorder: RunRecorder,
        policy: Policy,
        encoder: TextEncoder,
        rows: Sequence[Tokens],
        every: int,
        shown: int,
    ) -> None:
        self.recorder, self.policy, self.encoder = recorder, policy, encoder
        self.rows, self.every = list(rows[:shown]), every
        self.engine = NativeEngine(policy.lm, encoder.ends)
        room = encoder.max_length - max(len(row.prompt) for row in self.rows)
        self.settings = SamplingSettings(min(room, max(len(row.response) for row in rows)), 0.0)

    def __call__(self, step: int) -> Mapping[str, float]:
        if step == 1 or step % self.every == 0:
            with gathered(self.policy):
                answers = self.engine.sample([Request(row.prompt, ((0,),)) for row in self.rows], self.settings)
            text = self.encoder.text
            self.recorder.table(
                "samples",
                step,
                [
                    {"prompt": text(row.prompt), "completion": text(answer.tokens), "table": text(row.response)}
                    for row, (answer,) in zip(self.rows, answers, strict=True)
                ],
            )
        return {}
