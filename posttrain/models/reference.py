"""Log-probabilities of a frozen model, kept on disk: computed once for all runs that ask the same of the same model."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from posttrain.data.batches import share_of
from posttrain.data.tokens import Tokens
from posttrain.distributed import any_rank, gather_all
from posttrain.models.inference import token_logprobs
from posttrain.models.policy import Policy


@dataclass(frozen=True)
class ReferenceCache:
    """A folder of files that may be deleted at any time.

    model: digest of all but the tokens that the numbers depend on: weights, code, precision, size of batches. The tokens are what the
    template made of the data, cut to the length, so data, template and length count by every id. Processes share the work.
    """

    folder: Path
    model: str
    accelerator: Accelerator = field(default_factory=Accelerator)

    def logprobs(self, policy: Policy, tokens: Sequence[Tokens], budget: int, bf16: bool = False) -> list[np.ndarray]:
        """Of every response token, [time] float32 each; from disk where they are, else computed and kept."""
        lengths = [len(t.response) for t in tokens]
        path = self.folder / f"{_digest(self.model, tokens)}.safetensors"
        kept = _read(path, sum(lengths))
        if any_rank(self.accelerator, kept is None):
            policy.eval()
            computed = gather_all(
                self.accelerator,
                tokens,
                lambda own: [numbers.logprobs for numbers in token_logprobs(policy, own, budget, bf16=bf16)],
                partial(share_of, [[t] for t in tokens]),
            )
            kept = np.concatenate([np.zeros(0, dtype=np.float32), *computed])
            if self.accelerator.is_main_process:
                self._keep(path, kept)
        assert kept is not None
        return [kept[start:stop] for start, stop in pairwise(accumulate(lengths, initial=0))]

    def _keep(self, path: Path, logprobs: np.ndarray) -> None:
        """Whole or not at all, also where two runs keep the same."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        save_file({"logprobs": logprobs}, partial)
        os.replace(partial, path)


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
    return digest.hexdigest()
