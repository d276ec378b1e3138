"""Sampling: the native engine against transformers' `generate`, in one run, alternating, one thread, same model and prompts.

    python benchmarks/rollouts.py [--repeats 5]

Prints a table of medians with their spread. Every answer is sampled to full length (no end of sequence), so the work is the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from posttrain.models.tiny import TinyShape, tiny_model
from posttrain.rollouts.engine import Request, SamplingSettings
from posttrain.rollouts.native import NativeEngine

NO_EOS = -1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=48)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, _ = tiny_model(TinyShape(max_length=1024), seed=0)
    model.eval()
    print(
        f"torch {torch.__version__}, {args.prompts} prompts x {args.samples} samples x {args.new_tokens} new tokens, one thread\n"
    )
    print("| prompt tokens | native, tokens/s | generate, tokens/s | ratio |\n|---|---|---|---|")
    for length in (8, 128, 256):
        prompts = torch.randint(3, 250, (args.prompts, length), generator=torch.Generator().manual_seed(length))
        rates: dict[str, list[float]] = {"native": [], "generate": []}
        for _ in range(args.repeats):
            rates["native"].append(_rate(_native(model, prompts, args.samples, args.new_tokens)))
            rates["generate"].append(_rate(_generate(model, prompts, args.samples, args.new_tokens)))
        native, generate = rates["native"], rates["generate"]
        ratio = statistics.median(native) / statistics.median(generate)
        print(f"| {length} | {_spread(native)} | {_spread(generate)} | {ratio:.2f} |", flush=True)


def _native(model: object, prompts: torch.Tensor, samples: int, new_tokens: int) -> Callable[[], int]:
    engine = NativeEngine(model, NO_EOS)  # type: ignore[arg-type]
    rows = prompts.tolist()
    requests = [Request(tuple(row), tuple((0, i, j) for j in range(samples))) for i, row in enumerate(rows)]

    def run() -> int:
        answers = engine.sample(requests, SamplingSettings(new_tokens, 1.0))
        return sum(len(c.tokens) for group in answers for c in group)

    return run


def _generate(model: object, prompts: torch.Tensor, samples: int, new_tokens: int) -> Callable[[], int]:
    options = {
        "do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens,
        "num_return_sequences": samples, "attention_mask": torch.ones_like(prompts), "output_scores": False,
    }  # fmt: skip

    def run() -> int:
        with torch.no_grad():
            output = model.generate(prompts, **options)  # type: ignore[attr-defined]
        return int((output.shape[1] - prompts.shape[1]) * output.shape[0])

    return run


def _rate(run: Callable[[], int]) -> float:
    started = time.perf_counter()
    tokens = run()
    return tokens / (time.perf_counter() - started)


def _spread(rates: list[float]) -> str:
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"


if __name__ == "__main__":
    main()
