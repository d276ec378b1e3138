"""KTO: rows, batches and objective of single answers with a label (objectives/preference.py).

Example:
    The partner of an answer is the next answer to a different prompt:

    >>> a, b, c = Tokens((1,), (4,)), Tokens((1,), (5,)), Tokens((2,), (6,))
    >>> [partner.response for partner in mismatched([a, b, c], max_length=8)]
    [(6,), (6,), (4,)]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from accelerate import Accelerator
from torch import nn

from posttrain.algorithms.specs import Unpaired
from posttrain.data.batches import EpochOrder, share_of
from posttrain.data.tokens import Tokens
from posttrain.distributed import gather_all
from posttrain.errors import DataError
from posttrain.models.inference import token_logprobs
from posttrain.models.policy import Policy
from posttrain.objectives.preference import unpaired_loss
from posttrain.objectives.reduce import masked_sum, row_sums
from posttrain.training.preference import Answer, with_reference
from posttrain.training.routing import add_routing
from posttrain.training.source import StepData
from posttrain.training.sums import Terms
from posttrain.training.supervised import EpochSource


@dataclass(frozen=True)
class LabelledAnswer:
    """An answer with thumbs up (`desirable`) or down.

    Attributes:
        partner: the row's prompt with the answer to a different prompt; the KL is measured on it.
        baseline: z0 of the row's batch, set by `UnpairedSource`.
    """

    answer: Answer
    desirable: bool
    partner: Answer
    baseline: float = 0.0


def mismatched(tokens: Sequence[Tokens], max_length: int) -> list[Tokens]:
    """Return each row's prompt with the answer of the next row, in a circle, that has a different prompt.

    Args:
        max_length: the model's context; a longer pair loses the end of its answer, whose log-probability would mean nothing.

    Raises:
        DataError: all rows have the same prompt.
    """
    count = len(tokens)
    following = next((i for i in range(count) if tokens[i].prompt != tokens[-1].prompt), None)
    if following is None:
        raise DataError(
            f"all {count} labelled answers have the same prompt, but KTO measures its KL on answers to other prompts;"
            " add rows with a second prompt"
        )
    partners: list[Tokens] = []
    for i in reversed(range(count)):
        if i + 1 < count and tokens[i + 1].prompt != tokens[i].prompt:
            following = i + 1
        other, room = tokens[following], max_length - len(tokens[i].prompt)
        weights = None if other.weights is None else other.weights[:room]
        partners.append(Tokens(tokens[i].prompt, other.response[:room], tokens[i].id, weights))
    return partners[::-1]


class UnpairedSource(EpochSource[LabelledAnswer]):
    """Shuffled epochs. Each batch gets its z0 = max(0, mean log-ratio of its partners) under the weights before the update.

    It is measured over the whole batch, so it does not depend on micro-batches or processes.
    """

    def __init__(
        self,
        rows: Sequence[LabelledAnswer],
        order: EpochOrder,
        policy: Policy,
        accelerator: Accelerator,
        micro_batch_tokens: int,
        bf16: bool = False,
    ) -> None:
        super().__init__(rows, order)
        self.policy, self.accelerator = policy, accelerator
        self.micro_batch_tokens, self.bf16 = micro_batch_tokens, bf16

    def next(self, step: int) -> StepData[LabelledAnswer]:
        rows = [self.rows[i] for i in self.order.indices(step)]
        baseline = self.baseline([row.partner for row in rows])
        return StepData([[replace(row, baseline=baseline) for row in rows]], {"unpaired/baseline": baseline})

    def baseline(self, partners: Sequence[Answer]) -> float:
        """Return z0 of a batch."""
        self.policy.eval()
        tokens = [partner.tokens for partner in partners]
        measured = gather_all(
            self.accelerator,
            tokens,
            lambda own: token_logprobs(self.policy, own, self.micro_batch_tokens, bf16=self.bf16),
            partial(share_of, [[t] for t in tokens]),
        )
        sums = [
            float((m.logprobs.astype("float64") - p.ref_logprobs).sum())
            for m, p in zip(measured, partners, strict=True)
        ]
        return max(0.0, sum(sums) / len(sums))


class UnpairedObjective:
    """One loss for each labelled answer, averaged over the batch."""

    def __init__(self, spec: Unpaired) -> None:
        self.spec = spec

    def sequences(self, row: LabelledAnswer) -> Sequence[Tokens]:
        return (row.answer.tokens,)

    def counts(self, rows: Sequence[LabelledAnswer]) -> Mapping[str, float]:
        return {
            "answers": float(len(rows)),
            "desirable": float(sum(row.desirable for row in rows)),
            "undesirable": float(sum(not row.desirable for row in rows)),
            "tokens": float(sum(row.answer.tokens.loss_tokens for row in rows)),
        }

    def terms(self, model: nn.Module, rows: Sequence[LabelledAnswer]) -> Terms:
        device = next(model.parameters()).device
        added = {
            "baseline": torch.tensor([row.baseline for row in rows], dtype=torch.float64),
            "desirable": torch.tensor([row.desirable for row in rows]),
        }
        batch, columns = with_reference([row.answer for row in rows], added, device)
        output, desirable = model(batch), columns["desirable"]
        log_ratio = row_sums(output.logprobs - columns["reference"], batch.mask)
        baseline = columns["baseline"].to(log_ratio.dtype)
        loss = unpaired_loss(log_ratio, baseline, desirable, self.spec).sum()
        terms = Terms(
            losses={"answers": (loss, "answers", 1.0)},
            metrics={"entropy": (masked_sum(output.entropy, batch.mask), "tokens")},
        )
        reward = self.spec.beta * log_ratio
        present = {row.desirable for row in rows}
        for name, given, members in (("desirable", True, desirable), ("undesirable", False, ~desirable)):
            if given in present:
                terms.metrics[f"unpaired/{name}_reward"] = (torch.where(members, reward, 0.0).sum(), name)
        add_routing(terms, output.routing, batch.mask, "tokens")
        return terms
