"""Measure how long new weights take to reach a process that samples, its proof included, at the shapes of two models on a CPU.

    python benchmarks/transfer.py                       # SmolLM2-135M and Qwen3-0.6B, bfloat16, every way

A trainer publishes its weights as for a vLLM server that it starts (posttrain/rollouts/vllm/published.py). The receiving process loads them
by vLLM's worker extension into a transformers model, and both compute the log-probabilities of a probe. Weights are random. Printed are the
fastest of some repeats in seconds of processor time on one thread, which a busy machine does not change: publish (copy to memory), load
(send, read and copy), probe (in both processes, one after the other). The sum is the wall time of an idle machine. `nccl` is Gloo here, and
`ipc` maps a CPU's storage; benchmarks/gpu.py times both on GPUs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script

from posttrain.models.lora import Adapter
from posttrain.models.reach import probe_ids
from posttrain.rollouts.sampling_process import probe_logprobs
from posttrain.rollouts.tolerance import BFLOAT16
from posttrain.rollouts.vllm.published import Published
from posttrain.rollouts.vllm.worker.posttrain_receiver import Receiver
from posttrain.settings import LoraSettings

PROBE_TOKENS = 32
WAYS = {"memory": "memory", "HTTP": "stream:127.0.0.1:0", "nccl (Gloo)": "nccl", "ipc (mapped)": "ipc"}


def model(name: str) -> PreTrainedModel:
    """Return a model of a public shape with random weights, in bfloat16."""
    torch.manual_seed(0)
    if name == "135m":
        small = LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True,
        )  # fmt: skip
        return LlamaForCausalLM(small).to(torch.bfloat16).eval()
    config = Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).to(torch.bfloat16).eval()


class Worker(Receiver):
    """Takes weights as vLLM's worker does."""

    def __init__(self, lm: PreTrainedModel) -> None:
        self.lm, self.device = lm, lm.device
        self.held = dict(lm.named_parameters(remove_duplicate=False))

    @torch.no_grad()
    def reload_weights(self, weights_iterator: Iterator[tuple[str, Tensor]]) -> None:
        """Copy the weights into the model."""
        for name, tensor in weights_iterator:
            self.held[name].copy_(tensor)

    def probe(self) -> list[float]:
        """Return the log-probabilities of the probe."""
        return probe_logprobs(self.lm, probe_ids(PROBE_TOKENS, self.lm.config.vocab_size), bf16=False)


def serve(lm: PreTrainedModel) -> None:
    """Call the method that each line of standard input names; print its result and the seconds of processor time."""
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.zero_()
    worker = Worker(lm)
    print("ready", flush=True)
    for line in sys.stdin:
        call, began = json.loads(line), time.process_time()
        found = getattr(worker, call["method"])(**call["kwargs"])
        print(json.dumps([found, time.process_time() - began]), flush=True)


class Process:
    """A process that receives weights.

    Attributes:
        spent: its seconds of processor time.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.running: Any = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.spent = 0.0
        self._line()

    def call(self, method: str, **arguments: Any) -> Any:
        """Return the result of a method of Worker."""
        print(json.dumps({"method": method, "kwargs": arguments}), file=self.running.stdin, flush=True)
        found, seconds = json.loads(self._line())
        self.spent += seconds
        return found

    def _line(self) -> str:
        """Return the next line of its output."""
        line: str = self.running.stdout.readline()
        if not line:
            raise RuntimeError(f"the receiving process ended with status {self.running.wait()}; its error is above")
        return line

    def take(self, published: Published, version: int) -> dict[str, Any]:
        """Bring a version to the process."""
        sources = published.sources(version)
        if published.sender is None:
            return self.call("posttrain_load", sources=sources)
        results = published.sender.send(
            "process",
            sources,
            lambda: [self.call("posttrain_groups")],
            lambda announced: [self.call("posttrain_load", sources=announced)],
        )
        return results[0]

    def close(self) -> None:
        """End the process."""
        self.running.stdin.close()
        self.running.wait()


def measure(name: str, repeats: int) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Yield the way, the trained weights, and the seconds of each part."""
    lm = model(name)
    process = Process([sys.executable, __file__, "--receive", name])
    for trained in ("all weights", "adapter of rank 16"):
        if trained != "all weights":
            Adapter(lm, LoraSettings(16, 32.0))
        for way, transfer in WAYS.items():
            published = Published(lm, torch.bfloat16, transfer)
            parts = [transferred(lm, published, process, version) for version in range(repeats)]
            published.close()
            yield way, trained, {part: min(each[part] for each in parts) for part in parts[0]}
    process.close()


def transferred(
    lm: PreTrainedModel, published: Published, process: Process, version: int, wall: bool = False
) -> dict[str, float]:
    """Change the trained weights, bring them to the other process and prove them.

    Args:
        wall: wall time, in place of the sum of both processes' processor time.
    """
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.01)
    clock = time.perf_counter if wall else lambda: time.process_time() + process.spent
    times = [clock()]
    published.remove(version)
    published.take(version)
    times.append(clock())
    found = process.take(published, version)
    if "error" in found:
        raise RuntimeError(found["error"])
    times.append(clock())
    own = probe_logprobs(lm, probe_ids(PROBE_TOKENS, lm.config.vocab_size), bf16=False)
    served = process.call("probe")
    times.append(clock())
    publish, load, probe = (after - before for before, after in pairwise(times))
    gap = (torch.tensor(own) - torch.tensor(served)).abs()
    assert gap.mean() < BFLOAT16.mean, gap
    seconds = {"publish": publish, "load": load, "probe": probe, "total": times[-1] - times[0]}
    return seconds | {"MiB": found["bytes"] / 2**20, "gap": float(gap.max())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["135m", "0.6b"], choices=["135m", "0.6b"])
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--receive", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.receive:
        serve(model(args.receive))
        return 0
    print("| model | way | trained | MiB | publish | load | probe | total |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in args.models:
        for way, trained, found in measure(name, args.repeats):
            seconds = " | ".join(f"{found[part]:.2f}" for part in ("publish", "load", "probe", "total"))
            print(f"| {name} | {way} | {trained} | {found['MiB']:.0f} | {seconds} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
