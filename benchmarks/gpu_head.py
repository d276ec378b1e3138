"""Time the fused head forward and backward with entropy, for benchmarks/gpu.py: as chosen on the device, by single operators, and Liger's.

The shape is that of Liger's own benchmarks: 131,072 words, 8,192 tokens, hidden states of 4,096 in bfloat16. Liger's fused cross-entropy
(`pip install liger-kernel`) has no entropy, and computes its gradient in the forward pass. The others compute the logits twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu_cases import GIB, timed
from posttrain.models.head_trial import KERNELS, choice
from posttrain.models.logprobs import selected_logprobs
from posttrain.models.packed import REFUSED

CHOSEN, PLAIN, LIGER = "chosen", "single operators", "Liger"
SLOWER = 0.05
"""Share by which the chosen head may be slower than the kept one."""


class Shape(NamedTuple):
    """Sizes of a head and its input."""

    tokens: int = 8192
    words: int = 131_072
    hidden: int = 4096


TINY = Shape(64, 9000, 32)


def heads(
    device: torch.device, small: bool, repeats: int, attempted: Callable[[Callable[[], dict[str, Any]]], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return milliseconds, TFLOP/s of the products and peak memory of each way."""
    shape = TINY if small else Shape()
    found = {CHOSEN: attempted(lambda: own(device, shape, repeats))}
    with patch.dict(KERNELS, clear=True):
        found[PLAIN] = attempted(lambda: own(device, shape, repeats))
    if device.type == "cpu" or find_spec("liger_kernel") is None:
        found[LIGER] = {"skipped": "needs a GPU" if device.type == "cpu" else "pip install liger-kernel"}
    else:
        found[LIGER] = attempted(lambda: liger(device, shape, repeats))
    return found


def own(device: torch.device, shape: Shape, repeats: int) -> dict[str, Any]:
    """Return the numbers of the project's head, the name of its functions, and its gradients' norms."""
    hidden, weight, targets = given(device, shape)
    name = choice(device, weight.dtype, shape.hidden, shape.words).name

    def run() -> None:
        hidden.grad = weight.grad = None
        logprobs, entropy = selected_logprobs(hidden, weight, None, targets, 1.0)
        (logprobs.sum() + 0.01 * entropy.sum()).backward()

    return numbers(run, device, shape, repeats, 4) | {"name": name} | norms(hidden, weight)


def liger(device: torch.device, shape: Shape, repeats: int) -> dict[str, Any]:
    """Return the numbers of Liger's fused cross-entropy, without entropy."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    hidden, weight, targets = given(device, shape)

    def run() -> None:
        hidden.grad = weight.grad = None
        loss = liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="sum")
        (-loss).backward()

    return numbers(run, device, shape, repeats, 3) | {"name": "cross-entropy without entropy"} | norms(hidden, weight)


def given(device: torch.device, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, a head with logits of about 1, and targets."""
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": device, "dtype": torch.bfloat16}
    hidden = torch.randn(shape.tokens, shape.hidden, **options).requires_grad_()
    weight = torch.randn(shape.words, shape.hidden, **options).mul_(shape.hidden**-0.5).requires_grad_()
    return hidden, weight, torch.randint(shape.words, (shape.tokens,), generator=generator, device=device)


def numbers(run: Callable[[], None], device: torch.device, shape: Shape, repeats: int, products: int) -> dict[str, Any]:
    seconds, peak = timed(run, device, repeats)
    work = 2 * products * shape.tokens * shape.words * shape.hidden
    return {"ms": 1e3 * seconds, "tflops": work / seconds / 1e12, "peak_gib": None if peak is None else peak / GIB}


def norms(hidden: Tensor, weight: Tensor) -> dict[str, float]:
    """Return the norms of the gradients; the project's two ways have the same up to rounding."""
    found = {"of_hidden": hidden.grad, "of_weight": weight.grad}
    return {name: float(torch.linalg.vector_norm(grad.float())) for name, grad in found.items() if grad is not None}


def head_alarms(found: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Return errors, kernels that the device refuses, gradients that differ, and a chosen head that is slower than the other or before."""
    raised = [f"head by {way}: {part['error']}" for way, part in found.items() if "error" in part]
    ours, plain = found.get(CHOSEN, {}), found.get(PLAIN, {})
    if "ms" not in ours:
        return raised
    if REFUSED in ours["name"]:
        raised.append(f"head: {ours['name']}")
    if (kept := before.get(CHOSEN, {}).get("ms")) and ours["ms"] > (1 + SLOWER) * kept:
        raised.append(f"head: {ours['ms']:.3g} ms, and {kept:.3g} are kept")
    if "ms" in plain:
        if ours["peak_gib"] is not None and ours["ms"] > (1 + SLOWER) * plain["ms"]:
            raised.append(f"head: {ours['ms']:.3g} ms as chosen, {plain['ms']:.3g} by single operators")
        raised += [
            f"head: gradient norms {name} of {ours[name]:.5g} as chosen, {plain[name]:.5g} by single operators"
            for name in ("of_hidden", "of_weight")
            if not abs(ours[name] - plain[name]) <= 1e-3 * plain[name]
        ]
    return raised


def head_table(found: Mapping[str, Any]) -> list[str]:
    """Return the numbers as lines of Markdown."""
    lines = ["", "| head | ms | TFLOP/s of products | peak GiB | how |", "|---|---|---|---|---|"]
    for way, part in found.items():
        if "ms" not in part:
            lines.append(f"| {way} | {part.get('skipped') or part['error']} | | | |")
            continue
        peak = "" if part["peak_gib"] is None else f"{part['peak_gib']:.2f}"
        lines.append(f"| {way} | {part['ms']:.3g} | {part['tflops']:.3g} | {peak} | {part['name']} |")
    return lines
