"""Measure a GPU: agreement with the CPU, every kind of training, the head, transfers of weights, and deterministic mode.

    python benchmarks/gpu.py                      # all cases at the shapes of Qwen3 0.6 B and 4 B, random weights
    python benchmarks/gpu.py --shapes 0.6B --cases sft-2k,dpo-2k
    python benchmarks/gpu.py --write              # keep the numbers of this GPU in benchmarks/gpu/NAME.json
    python benchmarks/gpu.py --tiny               # the same code in seconds, also on a CPU

Needs only torch (tried: 2.11, 2.13), transformers (5.17, 5.23), accelerate and safetensors. Prints tables; --out and --write write JSON
after each case, next to the numbers that the file has of the same device and PyTorch: a run that is cut short keeps its numbers, and
several commands can share the parts. A part that fails leaves the others. Layers are recomputed if the plan does not fit the GPU otherwise.

If numbers of this GPU are kept, each case is compared with them, and more than 5 % fewer tokens a second or more memory is an alarm; so is
a peak that `posttrain plan` misses by more than 10 %, an attention kernel that the GPU refuses, a part that fails, numbers far from the
CPU's, and a deterministic run that differs. With alarms the exit status is 1. On a CPU the "device" is the CPU itself: bfloat16 autocast is
compared with float32, and no memory is measured.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare GPU box has no installed package

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import PreTrainedModel, Qwen3ForCausalLM

from benchmarks.gpu_cases import BUDGET, CASES, NO_EOS, SHAPES, TINY, Case, Group, Shape, groups_of, measured, tiny
from benchmarks.gpu_curve import KINDS, determinism
from benchmarks.gpu_head import head_alarms, head_table, heads
from benchmarks.gpu_transfer import table, transfers
from posttrain.data.batches import collate
from posttrain.data.tokens import Tokens
from posttrain.files import write_atomic
from posttrain.models.inference import token_logprobs
from posttrain.models.kernels import set_kernels
from posttrain.models.packed import REFUSED
from posttrain.models.policy import Policy
from posttrain.planning import sizes
from posttrain.rollouts.decoder import Decoder
from posttrain.rollouts.engine import Request, SamplingSettings
from posttrain.rollouts.native import NativeEngine
from posttrain.settings import OptimizerSettings
from posttrain.text import reason_of
from posttrain.training.supervised import Example, SupervisedObjective
from posttrain.training.trainer import Trainer

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "B200": 2250.0}
"""Dense bfloat16 TFLOP/s from NVIDIA's data sheets."""
KEPT = Path(__file__).with_name("gpu")
"""Folder with the numbers of each GPU that was measured."""
SLOWER, UNPLANNED = 0.05, 0.10
"""Shares by which a number may be worse than the kept one, and by which a peak may differ from the plan."""
FARTHEST = {"float32": 1e-3, "bfloat16": 0.2, "sampling": 1e-3}
"""Largest differences of a log-probability from the CPU's in float32, by precision, and of sampling from training."""
SAMPLED = 40
"""Tokens of an answer in the comparison of sampling with training."""
BY_OFFSETS = "by offsets"
"""Words in the name of the attention that a GPU should have; a model that fails its trial there is computed over padded rows."""
CURVES, TRANSFERS, HEAD = "curves", "transfers", "head"
"""Names that select deterministic mode, weights' ways to a process that samples, and the head, next to the cases."""
OTHERS = (CURVES, TRANSFERS, HEAD)


def main() -> int:
    args = parsed()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_kernels(deterministic=False)  # as in a stage
    if args.tiny:
        torch.set_num_threads(1)
    names = args.cases.split(",") if args.cases else [*CASES, *OTHERS]
    shapes = ["tiny"] if args.tiny else args.shapes.split(",")
    if unknown := [name for name in names if name not in (*CASES, *OTHERS)] + [s for s in shapes if s not in SHAPES]:
        sys.exit(f"error: no case or shape {unknown[0]!r}; there are: {', '.join([*CASES, *OTHERS, *SHAPES])}")
    found: dict[str, Any] = {"device": describe(device), "torch": torch.__version__, "peak_tflops": known_peak(device)}
    kept = KEPT / f"{slug(found['device'])}.json"
    against = args.against or (kept if kept.exists() and not args.write else None)
    earlier = json.loads(against.read_text(encoding="utf-8")) if against else {}

    written = [*([args.out] if args.out else []), *([kept] if args.write else [])]
    found = joined(found, written)

    def save() -> None:
        for path in written:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, (json.dumps(found, indent=1) + "\n").encode())

    measure(found, device, names, shapes, args, save)
    print(tables(found))
    raised = alarms(found, earlier)
    for line in raised:
        print(f"alarm: {line}")
    return 1 if raised else 0


def joined(found: dict[str, Any], written: list[Path]) -> dict[str, Any]:
    """Return the numbers that earlier commands have written on the same device with the same PyTorch, or `found`."""
    for path in written:
        if path.exists():
            known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if all(known.get(name) == value for name, value in found.items()):
                return known
    return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a model and batches that a CPU computes in seconds")
    parser.add_argument("--shapes", default="0.6B,4B", help="separated by commas")
    parser.add_argument(
        "--cases",
        default="",
        help=f"separated by commas, `{CURVES}` for deterministic mode, `{TRANSFERS}` for weights, `{HEAD}`; default: all",
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of a case after the first")
    parser.add_argument("--out", type=Path, help="write the numbers to this file, next to those of other parts")
    parser.add_argument(
        "--write", action="store_true", help="keep them in benchmarks/gpu, next to those of other parts"
    )
    parser.add_argument("--against", type=Path, help="compare with the numbers in this file")
    return parser.parse_args()


def measure(
    found: dict[str, Any],
    device: torch.device,
    names: list[str],
    shapes: list[str],
    args: argparse.Namespace,
    save: Callable[[], None],
) -> None:
    """Add the numbers of all parts to `found`, and call `save` after each."""
    if "error" in found.get("agreement", {"error": "none yet"}):
        found["agreement"] = attempted(lambda: agreement(device, SHAPES[shapes[0]], args.tiny))
    found.setdefault("cases", {})
    for shape in shapes:
        model = sizes(SHAPES[shape].config())
        for name in (name for name in names if name not in OTHERS):
            case, budget = (tiny(CASES[name]), BUDGET // TINY) if args.tiny else (CASES[name], BUDGET)
            numbers = attempted(lambda: measured(case, SHAPES[shape], model, device, budget, args.repeats))  # noqa: B023
            found["cases"][f"{shape}/{name}"] = numbers
            print(f"{shape}/{name}: {numbers}", file=sys.stderr, flush=True)
            save()
            gc.collect()
            if device.type == "cuda":
                attempted(lambda: torch.cuda.empty_cache() or {})  # raises if a case has lost the device
    if HEAD in names:
        found["head"] = heads(device, args.tiny, args.repeats, attempted)
        save()
    if TRANSFERS in names:
        found["transfers"] = transfers(device, shapes[0], args.repeats, attempted)
        save()
    if CURVES in names:
        found["deterministic"] = {kind: attempted(lambda: determinism(kind, args.tiny)) for kind in KINDS}  # noqa: B023
    save()


def attempted(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a part's numbers, or its `error`: on a new device anything may fail, and the other parts are still worth their time."""
    try:
        return part()
    except Exception as error:
        traceback.print_exc()
        return {"error": reason_of(error)}


def agreement(device: torch.device, shape: Shape, small: bool) -> dict[str, dict[str, Any]]:
    """Compare one SFT step on the device, with prompts that answers share, with the CPU in float32, and sampling with training."""
    config = replace(shape, layers=2, vocabulary=min(shape.vocabulary, 8000)).config()
    start = Qwen3ForCausalLM(config).eval()
    groups = groups_of(Case("sft", 4, 8, 40 if small else 120, answers=2), config.vocab_size)
    rows = [Tokens(prompt, answer) for prompt, answers in groups for answer in answers]
    loss, norm, reference = one_step(copy.deepcopy(start), torch.device("cpu"), rows, bf16=False)
    found: dict[str, dict[str, Any]] = {}
    for bf16 in (False, True):
        own_loss, own_norm, logprobs = one_step(copy.deepcopy(start), device, rows, bf16)
        found["bfloat16" if bf16 else "float32"] = {
            "logprob": float((logprobs - reference).abs().max()),
            "loss": abs(own_loss - loss) / abs(loss),
            "grad_norm": abs(own_norm - norm) / norm,
        }
    found["sampling"] = sampled(start.to(device), groups)
    return found


def sampled(lm: PreTrainedModel, groups: Sequence[Group]) -> dict[str, Any]:
    """Return how far log-probabilities of sampled tokens are from training's, in float32, and why steps are not recorded, if so."""
    engine = NativeEngine(lm, NO_EOS)
    requests = [Request(prompt, seeds=((i, 0), (i, 1))) for i, (prompt, _) in enumerate(groups)]
    answers = engine.sample(requests, SamplingSettings(SAMPLED, 1.0))
    pairs = [(r.prompt, answer) for r, found in zip(requests, answers, strict=True) for answer in found]
    trained = token_logprobs(Policy(lm), [Tokens(prompt, answer.tokens) for prompt, answer in pairs], BUDGET)
    own = np.concatenate([answer.logprobs for _, answer in pairs])
    assert isinstance(engine.decoder, Decoder), engine.decoder
    gap = np.abs(own - np.concatenate([each.logprobs for each in trained])).max()
    padded = "" if engine.decoder.shared else "prompts are not shared by their answers"
    return {"logprob": float(gap), "refused": engine.decoder.runner.refusal or padded}


def one_step(
    lm: PreTrainedModel, device: torch.device, rows: list[Tokens], bf16: bool
) -> tuple[float, float, torch.Tensor]:
    AcceleratorState._reset_state(reset_partial_state=True)  # one precision a process otherwise
    policy = Policy(lm).to(device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        logprobs = policy(collate(rows).to(device)).logprobs.float().cpu()
    precision = Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=device.type == "cpu")
    trainer: Trainer[Any] = Trainer(
        policy, OptimizerSettings(1e-5), total_steps=100, micro_batch_tokens=4096, accelerator=precision
    )
    metrics = trainer.update([Example(row) for row in rows], SupervisedObjective())
    return metrics["loss"], metrics["grad_norm"], logprobs


def alarms(found: Mapping[str, Any], kept: Mapping[str, Any]) -> list[str]:
    """Return the numbers that are worse than the kept ones or the plan, kernels that are not used, and deterministic runs that differ."""
    agreed, curves = found["agreement"], found.get("deterministic", {})
    whole = {"agreement": agreed, **{f"weights by {way}": part for way, part in found.get("transfers", {}).items()}}
    whole |= {f"deterministic {kind}": curve for kind, curve in curves.items()}
    raised = [f"{name}: {part['error']}" for name, part in whole.items() if "error" in part]
    raised += [
        f"{precision}: a log-probability differs by {agreed[precision]['logprob']:.2g}"
        for precision, farthest in FARTHEST.items()
        if not agreed.get(precision, {"logprob": 0.0})["logprob"] <= farthest
    ]
    raised += [f"sampling: {reason}" for reason in [agreed.get("sampling", {}).get("refused")] if reason]
    for name, case in found["cases"].items():
        raised += case_alarms(name, case, kept.get("cases", {}).get(name, {}))
    raised += head_alarms(found.get("head", {}), kept.get("head", {}))
    return raised + [
        f"deterministic {kind}: same again {curve['same_again']}, after a kill {curve['same_after_kill']}"
        for kind, curve in curves.items()
        if "error" not in curve and not (curve["same_again"] and curve["same_after_kill"])
    ]


def case_alarms(name: str, case: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Return the numbers of a case that are worse than the kept ones or the plan, and a kernel that is not used."""
    if "error" in case:
        return [] if "error" in before else [f"{name}: {case['error']}"]
    raised = []
    if REFUSED in case["attention"] or (case["peak_gib"] is not None and BY_OFFSETS not in case["attention"]):
        raised.append(f"{name}: {case['attention']}")
    if (speed := before.get("tokens_per_second")) and case["tokens_per_second"] < (1 - SLOWER) * speed:
        raised.append(f"{name}: {case['tokens_per_second']:,.0f} tokens/s, and {speed:,.0f} are kept")
    peak, planned = case["peak_gib"], case["predicted_gib"]
    if peak is None:
        return raised
    if (less := before.get("peak_gib")) and peak > (1 + SLOWER) * less:
        raised.append(f"{name}: a peak of {peak:.2f} GiB, and {less:.2f} are kept")
    if abs(peak - planned) > UNPLANNED * planned:
        raised.append(f"{name}: a peak of {peak:.2f} GiB, and the plan is {planned:.2f}")
    return raised


def tables(found: Mapping[str, Any]) -> str:
    """Return the numbers as Markdown."""
    lines = [f"{found['device']}, torch {found['torch']}, bfloat16 autocast, random weights", ""]
    lines += ["| precision | log-probability | loss, relative | gradient norm, relative |", "|---|---|---|---|"]
    for precision, far in found["agreement"].items():
        if precision == "error":
            lines.append(f"| {far} | | | |")
            continue
        if precision == "sampling":
            lines.append(f"| float32, sampling from training | {far['logprob']:.2g} | | |")
            continue
        lines.append(f"| {precision} | {far['logprob']:.2g} | {far['loss']:.2g} | {far['grad_norm']:.2g} |")
    lines += [
        "",
        "| case | tokens/s | TFLOP/s | MFU | peak GiB | planned GiB | recomputed | attention |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, case in found["cases"].items():
        if "error" in case:
            lines.append(f"| {name} | {case['error']} | | | | | | |")
            continue
        work, limit, peak = case["tflops"], found["peak_tflops"], case["peak_gib"]
        cells = [
            f"{case['tokens_per_second']:,.0f}",
            "" if work is None else f"{work:.3g}",
            "" if work is None or limit is None else f"{work / limit:.1%}",
            "" if peak is None else f"{peak:.2f}",
            f"{case['predicted_gib']:.2f}",
            "layers" if case["recomputed"] else "",
            case["attention"],
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += head_table(found["head"]) if "head" in found else []
    lines += table(found["transfers"]) if "transfers" in found else []
    for kind, curve in found.get("deterministic", {}).items():
        if "error" in curve:
            lines += ["", f"Deterministic {kind}: {curve['error']}"]
            continue
        lines += [
            "",
            f"Deterministic {kind}, {curve['steps']} steps: the same numbers again: {curve['same_again']}; after a SIGKILL, resumed at step"
            f" {curve['resumed_at']}: {curve['same_after_kill']}; {curve['times_as_slow']:.2f} times the seconds of a step",
        ]
    return "\n".join(lines)


def known_peak(device: torch.device) -> float | None:
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in describe(device)), None)


def describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(0) if device.type == "cuda" else "CPU"


def slug(name: str) -> str:
    """Return the name of a file for a device.

    Example:
        >>> slug("NVIDIA H200")
        'nvidia-h200'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
