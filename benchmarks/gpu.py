"""Measure a GPU: agreement with the CPU, SFT and GRPO throughput, model FLOP utilisation, rollouts per second, peak memory.

    python benchmarks/gpu.py                      # a randomly initialised Qwen3 with 0.6 B parameters (0.75 B with its untied head)
    python benchmarks/gpu.py --tiny               # the same code in seconds, also on a CPU
    python benchmarks/gpu.py --layers 36 --hidden 2560 --intermediate 9728 --heads 32      # 4 B

Needs only torch, transformers, accelerate and safetensors. Prints a Markdown table, and writes it with --out. On a CPU the "device" is
the CPU itself: bfloat16 autocast is compared with float32.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare GPU box has no installed package

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from posttrain.algorithms import PRESETS
from posttrain.data.batches import collate
from posttrain.data.tokens import TextEncoder, Tokens
from posttrain.models.policy import Policy
from posttrain.models.tiny import byte_tokenizer
from posttrain.planning import sizes
from posttrain.rewards.sources import FunctionReward
from posttrain.rollouts.engine import SamplingSettings
from posttrain.rollouts.groups import GroupSampler, GroupSettings, Problem
from posttrain.rollouts.native import NativeEngine
from posttrain.settings import OptimizerSettings
from posttrain.training.experience import ExperienceSource
from posttrain.training.onpolicy import OnPolicyObjective
from posttrain.training.supervised import Example, SupervisedObjective
from posttrain.training.trainer import Trainer

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "B200": 2250.0}
"""Dense bfloat16 TFLOP/s from NVIDIA's data sheets."""
NO_EOS = -1


@dataclass(frozen=True)
class Work:
    """Sizes of the timed work."""

    batch: int
    length: int
    prompts: int
    samples: int
    prompt: int
    new_tokens: int
    repeats: int


def main() -> None:
    args = parsed()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = configuration(args)
    work = Work(4, 64, 2, 4, 24, 8, 2) if args.tiny else Work(16, 1024, 32, 8, 256, 256, 4)
    lines = [
        f"{describe(device)}, torch {torch.__version__}, {sizes(config).parameters:,} parameters, bfloat16 autocast\n"
    ]
    lines += ["| what | number |", "|---|---|"]
    for name, value in [*agreement(device, config, args.tiny), *throughput(device, config, work)]:
        lines.append(f"| {name} | {value} |")
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print("\n" + text)
    if args.out:
        args.out.write_text(
            f"# GPU\n\n    python benchmarks/gpu.py {' '.join(sys.argv[1:])}\n\n{text}", encoding="utf-8"
        )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a model and batches that a CPU computes in seconds")
    parser.add_argument("--out", type=Path, help="write the table to this file")
    for name, value in (("hidden", 1024), ("layers", 28), ("intermediate", 3072), ("heads", 16), ("kv-heads", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()


def configuration(args: argparse.Namespace) -> Qwen3Config:
    shape = (
        (64, 2, 128, 4, 2) if args.tiny else (args.hidden, args.layers, args.intermediate, args.heads, args.kv_heads)
    )
    hidden, layers, intermediate, heads, kv_heads = shape
    return Qwen3Config(
        vocab_size=500 if args.tiny else 151_936, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=intermediate,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=16 if args.tiny else 128, max_position_embeddings=4096,
        tie_word_embeddings=False,
    )  # fmt: skip


def agreement(device: torch.device, config: Qwen3Config, tiny: bool) -> list[tuple[str, str]]:
    """Compare loss, gradient norm and log-probabilities of one SFT step: on the CPU in float32, and on the device."""
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size = 2, min(config.vocab_size, 8000)
    start = Qwen3ForCausalLM(small)
    rows = texts(4, 48 if tiny else 128, small.vocab_size, 8)
    reference = one_step(copy.deepcopy(start), torch.device("cpu"), rows, bf16=False)
    found = []
    for bf16 in (False, True):
        loss, norm, logprobs = one_step(copy.deepcopy(start), device, rows, bf16)
        worst = float((logprobs - reference[2]).abs().max())
        kind = "bfloat16" if bf16 else "float32"
        found.append(
            (f"CPU float32 against {device.type} {kind}: largest difference of a log-probability", f"{worst:.2g}")
        )
        found.append((f"… loss, gradient norm ({reference[0]:.5f}, {reference[1]:.4f})", f"{loss:.5f}, {norm:.4f}"))
    return found


def one_step(
    lm: PreTrainedModel, device: torch.device, rows: list[Tokens], bf16: bool
) -> tuple[float, float, torch.Tensor]:
    policy = Policy(lm).to(device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        logprobs = policy(collate(rows).to(device)).logprobs.float().cpu()
    metrics = trainer(policy, bf16, device, 4096).update([Example(row) for row in rows], SupervisedObjective())
    return metrics["loss"], metrics["grad_norm"], logprobs


def throughput(device: torch.device, config: Qwen3Config, work: Work) -> list[tuple[str, str]]:
    lm = Qwen3ForCausalLM(config).to(device)
    policy = Policy(lm)
    rows = [Example(row) for row in texts(work.batch, work.length, config.vocab_size, work.length // 8)]
    taught = trainer(policy, True, device, work.batch * work.length)
    seconds, peak = timed(lambda: taught.update(rows, SupervisedObjective()), device, work.repeats)
    tokens = work.batch * work.length
    found = [
        (f"SFT, {work.batch} x {work.length} tokens: tokens/s", f"{tokens / seconds:,.0f}"),
        ("SFT: model FLOP utilisation", utilisation(device, config, tokens / seconds, work.length)),
        ("SFT: peak memory", peak),
    ]
    found += uneven(taught, device, config, work)
    engine = NativeEngine(lm, NO_EOS, bf16=True)
    source, objective = group_source(policy, config, engine, work)
    seconds, peak = timed(lambda: source.sampler.sample(), device, work.repeats)
    sampled = work.prompts * work.samples * work.new_tokens
    shape = f"{work.prompts} prompts of {work.prompt} tokens x {work.samples} answers of {work.new_tokens}"
    found += [(f"rollouts, {shape}: tokens/s", f"{sampled / seconds:,.0f}"), ("rollouts: peak memory", peak)]
    learner = trainer(policy, True, device, 32_768)

    def step() -> None:
        for batch in source.next(0).batches:
            learner.update(batch, objective)

    seconds, peak = timed(step, device, work.repeats)
    found += [
        ("GRPO step (sample, reference, update): seconds", f"{seconds:.2f}"),
        ("GRPO: sampled tokens/s, end to end", f"{sampled / seconds:,.0f}"),
        ("GRPO: peak memory", peak),
    ]
    return found


def uneven(taught: Trainer[Any], device: torch.device, config: Qwen3Config, work: Work) -> list[tuple[str, str]]:
    """Time SFT on rows of different lengths. Kernels that prepare for a shape, or fall back to a mask, lose time only here."""
    fractions = [2 ** (-3 * i / (2 * work.batch - 1)) for i in range(2 * work.batch)]  # from 1 to 1/8 of the length
    lengths = [max(8, round(work.length * fraction)) for fraction in fractions]
    rows = [Example(texts(1, length, config.vocab_size, length // 4)[0]) for length in lengths]
    seconds, peak = timed(lambda: taught.update(rows, SupervisedObjective()), device, work.repeats)
    tokens, context = sum(lengths), sum(length**2 for length in lengths) // sum(lengths)
    name = f"SFT, {len(rows)} rows of {min(lengths)} to {max(lengths)} tokens"
    return [
        (f"{name}: tokens/s", f"{tokens / seconds:,.0f}"),
        (f"{name}: model FLOP utilisation", utilisation(device, config, tokens / seconds, context)),
        (f"{name}: peak memory", peak),
    ]


def group_source(
    policy: Policy, config: Qwen3Config, engine: NativeEngine, work: Work
) -> tuple[ExperienceSource, OnPolicyObjective]:
    spec = PRESETS["grpo"]
    encoder = TextEncoder(byte_tokenizer(4096), 4096)
    prompts = texts(4 * work.prompts, work.prompt + 1, 250, 1)
    problems = [Problem(str(i), row.prompt, {}) for i, row in enumerate(prompts)]
    sampler = GroupSampler(
        problems, engine, encoder, [FunctionReward("bytes", bytes_of)], {"bytes": 1.0}, spec,  # type: ignore[arg-type]
        GroupSettings(work.prompts, work.samples, SamplingSettings(work.new_tokens, 1.0)), 0, Accelerator(),
    )  # fmt: skip
    objective = OnPolicyObjective(spec, work.new_tokens, 1.0)  # type: ignore[arg-type]
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    source = ExperienceSource(spec, policy, reference, sampler, objective, micro_batch_tokens=32_768, bf16=True)  # type: ignore[arg-type]
    return source, objective


def bytes_of(prompts: Any, completions: Any, **_: Any) -> list[float | None]:
    return [float(sum(text.encode()) % 7) for text in completions]


def trainer(policy: Policy, bf16: bool, device: torch.device, budget: int) -> Trainer[Any]:
    AcceleratorState._reset_state(reset_partial_state=True)  # one precision a process otherwise
    precision = Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=device.type == "cpu")
    return Trainer(policy, OptimizerSettings(1e-5), total_steps=100, micro_batch_tokens=budget, accelerator=precision)


def texts(rows: int, length: int, vocabulary: int, prompt: int) -> list[Tokens]:
    ids = torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(length))
    split = length - 1 if prompt == 1 else prompt
    return [Tokens(tuple(row[:split]), tuple(row[split:])) for row in ids.tolist()]


def timed(run: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, str]:
    """Return the median seconds of a call after one warm-up call, and the peak device memory."""
    run()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        wait(device)
        started = time.perf_counter()
        run()
        wait(device)
        seconds.append(time.perf_counter() - started)
    peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else "not measured on a CPU"
    return sorted(seconds)[len(seconds) // 2], peak


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def utilisation(device: torch.device, config: Qwen3Config, tokens_per_second: float, length: int) -> str:
    """Return the FLOP utilisation of forward and backward.

    It counts 6 FLOP per parameter and token, and 6 x layers x query width x length for causal attention (arXiv 2204.02311).
    """
    known = [peak for name, peak in PEAK_TFLOPS.items() if name in describe(device)]
    embedding = config.vocab_size * config.hidden_size
    model = sizes(config)
    flop = 6 * (model.parameters - embedding) + 6 * model.layers * model.query_width * length
    achieved = flop * tokens_per_second / 1e12
    return f"{achieved:.1f} TFLOP/s" + (f", {100 * achieved / known[0]:.1f} % of {known[0]:.0f}" if known else "")


def describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(0) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    main()
