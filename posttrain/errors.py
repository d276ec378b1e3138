"""All exceptions that this project raises on purpose.

PosttrainError
├── ConfigError        a parameter is unknown, has the wrong type, or has no effect
├── DataError          a record, table or column cannot be used
│   └── LeakageError   training data share prompts with evaluation data
├── ModelError         a model folder, tokenizer or vocabulary cannot be used
├── RewardError        a reward function failed or returned an invalid value
│   └── RewardTimeoutError  it exceeded its time limit
├── JudgeError         a model that judges answers could not be asked
├── RolloutError       sampling could not deliver what was requested
│   ├── ServerError         an inference server is gone, hung or broken
│   └── StaleWeightsError   an inference server uses other weights than the policy's
├── NumericalError     a training metric exceeded its limit
│   └── NotFiniteError NaN or infinity in a loss, gradient or reward
├── CheckpointError    a checkpoint is damaged, foreign or unreadable
├── TrackingError      the journal or its projection into MLflow cannot be read or written
├── OrchestrationError a stage or flow could not be run
└── Interrupted        a signal asked the run to stop; a checkpoint was written

Commands catch PosttrainError at the edge, print its one paragraph and exit with `exit_code`.

Example:
    >>> try:
    ...     raise NotFiniteError("the loss is nan", ["row 7"])
    ... except PosttrainError as error:
    ...     print(error, error.exit_code, error.ids)
    the loss is nan 3 ('row 7',)
"""

import re
from collections.abc import Sequence


class PosttrainError(Exception):
    """Base of the tree. The message states what happened, why it matters, and what to type."""

    exit_code = 2


class ConfigError(PosttrainError):
    pass


class DataError(PosttrainError):
    pass


class LeakageError(DataError):
    pass


class ModelError(PosttrainError):
    pass


class RewardError(PosttrainError):
    pass


class RewardTimeoutError(RewardError):
    pass


class JudgeError(PosttrainError):
    pass


class JudgeTimeoutError(JudgeError):
    pass


class RolloutError(PosttrainError):
    pass


class ServerError(RolloutError):
    pass


class StaleWeightsError(RolloutError):
    pass


class NumericalError(PosttrainError):
    exit_code = 3


class NotFiniteError(NumericalError):
    """NaN or infinity; `ids` names the rows involved."""

    def __init__(self, message: str, ids: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.ids = tuple(ids)


class CheckpointError(PosttrainError):
    pass


class TrackingError(PosttrainError):
    pass


class OrchestrationError(PosttrainError):
    pass


class Interrupted(PosttrainError):
    exit_code = 143


_REFUSED = re.compile(
    r"DefaultCPUAllocator: (?:can't allocate memory|not enough memory)|CUDA(?: error:)? out of memory|_STATUS_ALLOC_FAILED"
)
"""How torch reports a lack of memory without a separate type: on the CPU, by the driver, and by cuBLAS and cuDNN."""


def memory_fault(error: BaseException) -> str | None:
    """Return in words that the memory of the machine or of its GPU did not suffice; None for other errors. Needs no torch."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _REFUSED.search(text):
        return text[:200] or "out of memory"
    return None
