"""The process of `ProcessEngine`: it holds a plain copy of the policy and samples with the weights that each request names.

It reads lines of JSON from standard input. A reply is a line of JSON and, after a request for answers, the arrays of
`posttrain.rollouts.packing`. Anything else that is printed goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, Any, cast

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from posttrain.choices import follow, made
from posttrain.errors import PosttrainError, memory_fault
from posttrain.guard import signal_at_parents_death
from posttrain.models.allocator import keep_heap
from posttrain.models.kernels import set_kernels
from posttrain.rollouts.engine import Request, SamplingSettings
from posttrain.rollouts.native import NativeEngine
from posttrain.rollouts.packing import packed, to_bytes
from posttrain.rollouts.shared_memory import Entry, SharedTensors

NO_MEMORY = (
    "the memory did not suffice for the sampling process ({lack}). It holds a second copy of the model: end other processes, lower"
    " prompts_per_step, samples_per_prompt or max_new_tokens, or set rollouts.staleness: 0, and run again"
)


def model_request(lm: PreTrainedModel) -> dict[str, Any]:
    """Return the class and configuration from which `build` makes an ordinary model of the same architecture."""
    kind, config = type(lm), lm.config
    return {
        "model": [kind.__module__, kind.__qualname__],
        "config": [
            type(config).__module__,
            type(config).__qualname__,
            json.loads(config.to_json_string(use_diff=False)),
        ],
    }


def build(request: Mapping[str, Any]) -> PreTrainedModel:
    """Return the model of `model_request`; its weights are arbitrary."""
    module, name = request["model"]
    config_module, config_name, values = request["config"]
    kind: Any = getattr(importlib.import_module(module), name)
    config: Any = getattr(importlib.import_module(config_module), config_name).from_dict(values)
    return cast(PreTrainedModel, kind(config).eval().requires_grad_(False))


class _Sampler:
    """A model, its engine, and the memory in which the trainer leaves weights."""

    def __init__(self, start: Mapping[str, Any]) -> None:
        torch.set_num_threads(start["threads"])
        set_kernels(start["deterministic"])
        follow(start["choices"])
        self.lm = build(start)
        whole = SharedTensors([Entry(*entry) for entry in start["whole"]["layout"]], start["whole"]["descriptor"])
        for name, tensor in [*self.lm.named_parameters(remove_duplicate=False), *self.lm.named_buffers()]:
            # a buffer that the class computes, such as the rotary frequencies, does not travel
            if name in whole.tensors:
                tensor.data = tensor.data.to(whole.tensors[name].dtype)
        self._load(whole)
        whole.close()
        self.lm.to(start["device"])
        layout = [Entry(*entry) for entry in start["layout"]]
        self.slots = [SharedTensors(layout, descriptor) for descriptor in start["slots"]]
        self.engine = NativeEngine(self.lm, start["ends"], bf16=start["bf16"])
        self.probe, self.bf16 = start["probe"], start["bf16"]

    def _load(self, weights: SharedTensors) -> None:
        # a tied weight has two names, and either of them may have travelled
        held = {**dict(self.lm.named_parameters(remove_duplicate=False)), **dict(self.lm.named_buffers())}
        with torch.no_grad():
            for name, tensor in weights.tensors.items():
                if name in held:
                    held[name].copy_(tensor)

    def answer(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Load the weights of the slot, and return the probe's log-probabilities and the answers."""
        self._load(self.slots[request["slot"]])
        asked = [Request(tuple(prompt), tuple(map(tuple, seeds))) for prompt, seeds in request["requests"]]
        settings = SamplingSettings(request["max_new_tokens"], request["temperature"])
        answers = to_bytes(packed(self.engine.sample(asked, settings)))
        probe = probe_logprobs(self.lm, self.probe, self.bf16)
        return {"probe": probe, "choices": made(), "bytes": len(answers)}, answers


@torch.no_grad()
def probe_logprobs(lm: PreTrainedModel, ids: Sequence[int], bf16: bool) -> list[float]:
    """Return the log-probability of every id but the first, from a plain forward pass.

    Example:
        >>> from posttrain.models.tiny import TinyShape, tiny_model
        >>> lm, _ = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
        >>> found = probe_logprobs(lm, [5, 6, 7], bf16=False)
        >>> len(found), all(value < 0 for value in found)
        (2, True)
    """
    training = lm.training
    lm.eval()
    row = torch.tensor([list(ids)], device=lm.device)
    with torch.autocast(lm.device.type, torch.bfloat16, enabled=bf16):
        logits = lm(input_ids=row, use_cache=False).logits[0, :-1].float()
    lm.train(training)
    values: list[float] = logits.log_softmax(-1).gather(-1, row[0, 1:, None])[:, 0].tolist()
    return values


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Answer until the trainer closes the pipe."""
    sampler: _Sampler | None = None
    for line in requests:
        payload = b""
        try:
            request = json.loads(line)
            if sampler is None:
                sampler, header = _Sampler(request), dict[str, Any]()
            else:
                header, payload = sampler.answer(request)
        except PosttrainError as error:
            header = {"error": str(error)}
        except Exception as error:
            if (lack := memory_fault(error)) is None:
                raise
            header = {"error": NO_MEMORY.format(lack=lack)}
        try:
            replies.write(json.dumps(header).encode() + b"\n" + payload)
            replies.flush()
        except BrokenPipeError:  # the trainer has been killed
            with suppress(BrokenPipeError):
                replies.close()
            return


def main() -> None:
    """Run in the process: set it up, then serve its parent."""
    signal_at_parents_death(signal.SIGKILL)
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    keep_heap()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    serve(requests, replies)


if __name__ == "__main__":
    main()
