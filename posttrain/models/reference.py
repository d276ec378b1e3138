"""Log-probabilities of a frozen model, cached on disk and shared by all runs with the same model and tokens.

Example:
    >>> import tempfile
    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> model, _ = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
    >>> cache = ReferenceCache(Path(tempfile.mkdtemp()), model="tiny-0")
    >>> first = cache.logprobs(Policy(model), [Tokens((5,), (6, 7))], micro_batch_tokens=64)
    >>> again = cache.logprobs(Policy(model), [Tokens((5,), (6, 7))], micro_batch_tokens=64)
    >>> bool((first[0] == again[0]).all()), len(list(cache.folder.iterdir()))
    (True, 1)
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from posttrain.data.batches import share_of
from posttrain.data.tokens import Tokens
from posttrain.distributed import any_rank, gather_all
from posttrain.files import write_atomic
from posttrain.models.inference import token_logprobs
from posttrain.models.policy import Policy


@dataclass(frozen=True)
class ReferenceCache:
    """A cache folder; its files may be deleted at any time. Processes share the computation.

    Attributes:
        model: digest of everything except the tokens that the log-probabilities depend on: weights, code, precision, batch size. Tokens
            enter the file's digest id by id, so that data, template and truncation count too.
    """

    folder: Path
    model: str
    accelerator: Accelerator = field(default_factory=Accelerator)

    def logprobs(
        self, policy: Policy, tokens: Sequence[Tokens], micro_batch_tokens: int, bf16: bool = False
    ) -> list[np.ndarray]:
        """Return the log-probabilities of every response token, [time] float32 each, from disk or computed and stored.

        Args:
            micro_batch_tokens: most tokens of one forward pass.
        """
        lengths = [len(t.response) for t in tokens]
        path = self.folder / f"{_digest(self.model, tokens)}.safetensors"
        kept = _read(path, sum(lengths))
        if any_rank(self.accelerator, kept is None):
            policy.eval()
            computed = gather_all(
                self.accelerator,
                tokens,
                lambda own: [
                    numbers.logprobs for numbers in token_logprobs(policy, own, micro_batch_tokens, bf16=bf16)
                ],
                partial(share_of, [[t] for t in tokens]),
            )
            kept = np.concatenate([np.zeros(0, dtype=np.float32), *computed])
            if self.accelerator.is_main_process:
                self._keep(path, kept)
        assert kept is not None
        return [kept[start:stop] for start, stop in pairwise(accumulate(lengths, initial=0))]

    def _keep(self, path: Path, logprobs: np.ndarray) -> None:
        """Write atomically, so that two runs may store the same file."""
        write_atomic(path, save({"logprobs": logprobs}))


def _read(path: Path, count: int) -> np.ndarray | None:
    if not path.exists():
        return None
    try:
        logprobs: np.ndarray = load_file(path)["logprobs"]
    except (SafetensorError, KeyError, OSError) as error:
        print(f"{path} is damaged ({error}); computing it again", file=sys.stderr)
        return None
    return logprobs if len(logprobs) == count else None


def _digest(model: str, tokens: Sequence[Tokens]) -> str:
    digest = hashlib.sha256(model.encode())
    for t in tokens:
        digest.update(np.array([len(t.prompt), len(t.response), *t.prompt, *t.response], dtype=np.int64).tobytes())
        if t.weights is not None:
            # tokens that carry no loss are kept as 0
            digest.update(np.array([weight != 0 for weight in t.weights]).tobytes())
    return digest.hexdigest()
