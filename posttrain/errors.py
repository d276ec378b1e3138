"""Everything this project raises on purpose.

PosttrainError
├── ConfigError        a parameter is unknown, of the wrong type, or without effect
├── DataError          a record, table or column cannot be used
│   └── LeakageError   training data share prompts with evaluation data
├── ModelError         a model folder, tokenizer or vocabulary cannot be used
├── RewardError        a reward function failed or answered nonsense
│   └── RewardTimeoutError  it took longer than it may
├── RolloutError       sampling could not deliver what was asked of it
│   ├── ServerError         an inference server is gone, hung or broken
│   └── StaleWeightsError   an inference server answers with other weights than the policy's
├── NumericalError     a number of the training is beyond what it may be
│   └── NotFiniteError NaN or infinity in a loss, gradient or reward
├── CheckpointError    a checkpoint is torn, foreign or unreadable
├── TrackingError      the journal or its projection into MLflow cannot be read or written
├── OrchestrationError a stage or flow could not be run
└── Interrupted        a signal asked the run to stop; a checkpoint was written

Commands catch PosttrainError at the edge, print its one paragraph and exit with `exit_code`.
"""

from collections.abc import Sequence


class PosttrainError(Exception):
    """Base of the tree. The message says what happened, why, and what to do next."""

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


class RolloutError(PosttrainError):
    pass


class ServerError(RolloutError):
    pass


class StaleWeightsError(RolloutError):
    pass


class NumericalError(PosttrainError):
    exit_code = 3


class NotFiniteError(NumericalError):
    """`ids` names the rows that were at hand."""

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
