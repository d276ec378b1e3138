"""Sample in a second process on this machine, with weights that travel through shared memory and are proven by a probe.

Each request names the snapshot of the weights that it is made with. Answers depend on weights, prompt and seed, and not on the progress of
the trainer. On a CPU they are the answers of `NativeEngine` on the same weights, to the bit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.choices import follow, made
from posttrain.errors import RolloutError, StaleWeightsError
from posttrain.models.plain import plain_state, trained_names
from posttrain.models.reach import probe_ids
from posttrain.rollouts.engine import Completion, Request, SamplingSettings, end_ids
from posttrain.rollouts.packing import from_bytes, unpacked
from posttrain.rollouts.sampling_process import model_request, probe_logprobs
from posttrain.rollouts.shared_memory import SharedTensors, entries
from posttrain.rollouts.tolerance import BFLOAT16, FLOAT32

PROBE_TOKENS = 32
OWN = "sampling process: "
"""Begin of the names of that process's choices among the trainer's, whose GPU may have less free memory."""


@dataclass(frozen=True)
class Snapshot:
    """The policy's weights at one moment: a slot of shared memory, and the probe's log-probabilities with them."""

    slot: int
    probe: tuple[float, ...]


class ProcessEngine:
    """Samples with snapshots of `lm`. At most `slots` snapshots exist at once; a further one waits until the oldest has been used.

    Example:
        >>> from posttrain.models.tiny import TinyShape, tiny_model
        >>> model, tokenizer = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
        >>> engine = ProcessEngine(model, tokenizer.eos_token_id, slots=1)
        >>> engine.process is None  # it starts with the first snapshot
        True
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        ends: int | Iterable[int],
        slots: int,
        bf16: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare the engine.

        Args:
            slots: number of snapshots that shared memory holds; each is as large as the trained weights.
            environment: variables of the process, such as CUDA_VISIBLE_DEVICES.
        """
        self.lm, self.ends, self.bf16 = lm, end_ids(ends), bf16
        self.environment = dict(environment or {})
        self.process: subprocess.Popen[bytes] | None = None
        self.memory: list[SharedTensors] = []
        self.free: SimpleQueue[int] = SimpleQueue()
        self.slots = slots
        text = lm.config.get_text_config()
        self.probe = probe_ids(min(PROBE_TOKENS, _context(text)), text.vocab_size)

    def snapshot(self, settings: SamplingSettings) -> Snapshot:
        """Copy the present weights to shared memory. It waits if `slots` snapshots are still unused.

        Raises:
            RolloutError: the process cannot be started, or there is no memory left.
        """
        state = _distinct(plain_state(self.lm, next(self.lm.parameters()).dtype))
        if self.process is None:
            self._start(state)
        slot = self.free.get()
        with torch.no_grad():
            for name, tensor in self.memory[slot].tensors.items():
                tensor.copy_(state[name])
        return Snapshot(slot, tuple(probe_logprobs(self.lm, self.probe, self.bf16)))

    def sample_with(
        self, taken: Snapshot, requests: Sequence[Request], settings: SamplingSettings
    ) -> list[list[Completion]]:
        """Return the completions of each request under the weights of `taken`, in order, one per seed. The snapshot is used up.

        Raises:
            RolloutError: the process has ended, or prompt and answer exceed the context.
            StaleWeightsError: the process computes other log-probabilities for the probe than the policy did.
        """
        asked = {
            "slot": taken.slot,
            "requests": [[request.prompt, request.seeds] for request in requests],
            "max_new_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
        }
        try:
            header, content = self._exchange(asked)
        finally:
            self.free.put(taken.slot)
        follow({OWN + name: value for name, value in header["choices"].items()})
        self._prove(header["probe"], taken.probe)
        return unpacked(from_bytes(content))

    def close(self) -> None:
        """End the process and give the memory back."""
        if self.process is not None:
            _kill(self.process)
        for memory in self.memory:
            memory.close()
        self.memory = []

    def _start(self, state: Mapping[str, Tensor]) -> None:
        changing = trained_names(self.lm)
        layout = entries({name: tensor for name, tensor in state.items() if name in changing})
        try:
            whole = SharedTensors(entries(state))
            self.memory = [SharedTensors(layout) for _ in range(self.slots)]
        except OSError as error:
            raise RolloutError(
                f"no memory for the weights of a sampling process ({error}); free some, or set staleness: 0"
            ) from error
        for name, tensor in whole.tensors.items():
            tensor.copy_(state[name])
        descriptors = [memory.descriptor for memory in (whole, *self.memory)]
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "posttrain.rollouts.sampling_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": paths} | self.environment,
            pass_fds=descriptors,
            start_new_session=True,
        )
        weakref.finalize(self, _kill, self.process)
        self._exchange(
            {
                **model_request(self.lm),
                "whole": {"layout": entries(state), "descriptor": whole.descriptor},
                "layout": layout,
                "slots": descriptors[1:],
                "ends": self.ends,
                "bf16": self.bf16,
                "device": device_of_sampler(self.lm.device, self.environment.get("CUDA_VISIBLE_DEVICES")),
                "threads": torch.get_num_threads(),
                "deterministic": torch.are_deterministic_algorithms_enabled(),
                "probe": self.probe,
                "choices": {k.removeprefix(OWN): v for k, v in made().items() if k.startswith(OWN)},
            }
        )
        whole.close()
        for slot in range(self.slots):
            self.free.put(slot)

    def _exchange(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Send a request; return the reply's header and its arrays."""
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
            header: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else {}
            content = process.stdout.read(header.get("bytes", 0))
        except (OSError, ValueError) as error:  # the pipe broke or was closed
            raise RolloutError(_ended(process)) from error
        if "error" in header:
            raise RolloutError(header["error"])
        if not line.endswith(b"\n") or len(content) < header.get("bytes", 0):
            raise RolloutError(_ended(process))
        return header, content

    def _prove(self, found: Sequence[float], expected: Sequence[float]) -> None:
        difference = np.abs(np.asarray(found) - np.asarray(expected))
        tolerance = BFLOAT16 if self.bf16 else FLOAT32
        if not (difference.mean() <= tolerance.mean and difference.max() <= tolerance.largest):
            raise StaleWeightsError(
                f"the sampling process computes other log-probabilities than the policy did with the same weights: the probe's tokens"
                f" differ by {difference.mean():.3g} nats on average and {difference.max():.3g} at most"
                f" ({tolerance.mean:g} and {tolerance.largest:g} are allowed). {type(self.lm).__name__} cannot be copied through its"
                " configuration and weights; set staleness: 0"
            )


def device_of_sampler(trainer: torch.device, visible: str | None) -> str:
    """Return the device of a trainer's sampling process: the trainer's, or its share of those that the process sees.

    Args:
        visible: CUDA_VISIBLE_DEVICES of the process; None if it is the trainer's.

    Example:
        Four trainers on GPUs 0 to 3, whose sampling processes have two other GPUs:

        >>> [device_of_sampler(torch.device("cuda", i), "4,5") for i in range(4)]
        ['cuda:0', 'cuda:1', 'cuda:0', 'cuda:1']
        >>> device_of_sampler(torch.device("cuda", 3), None), device_of_sampler(torch.device("cuda", 3), "")
        ('cuda:3', 'cpu')
    """
    if trainer.type != "cuda" or (visible is not None and visible.strip() in ("", "-1")):
        return "cpu"
    index = trainer.index or 0
    return f"cuda:{index if visible is None else index % len(visible.split(','))}"


def _context(config: Any) -> int:
    from posttrain.settings import context_limit

    return context_limit(config.to_dict()) or PROBE_TOKENS


def _distinct(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return every weight once: tied weights have several names."""
    found: dict[tuple[int, torch.Size], str] = {}
    for name in sorted(state):
        found.setdefault((state[name].data_ptr(), state[name].shape), name)
    return {name: state[name] for name in found.values()}


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process with all its children, and wait until it has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ended(process: subprocess.Popen[bytes]) -> str:
    status = process.wait()
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return f"the sampling process {how}. Run the same command again: it resumes from its last checkpoint"
