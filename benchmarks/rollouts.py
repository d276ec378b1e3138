"""Measure sampling: the native engine against transformers' `generate` and continuous batching, and against vLLM's CPU build.

    python benchmarks/rollouts.py [--quick] [--write] [--vllm /path/to/python]

All sides use the same model, prompts and number of answers, one thread and one process each, and take turns. The native engine has the
memory settings of the pipeline's steps; the other sides have their defaults. Rates are tokens per second of processor time, which is
less affected by other load than wall time; reported are medians, with minimum and maximum in parentheses. With bfloat16, the 30 M model
runs under autocast on both sides. Uneven answers end with the same probability at every token.
--quick: a short run, under a minute. --write: write benchmarks/rollouts.md and a plot of the native engine's time. --vllm: interpreter of
an environment with vLLM's CPU build.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # If this file is run as a script, the sides' module still belongs to a package.

import torch
import transformers

from benchmarks.peers.rollouts import Apart, Case, Side, Vllm, continuous, generate, native
from posttrain.models.allocator import keep_heap
from posttrain.models.tiny import TinyShape, tiny_model

SMALL = TinyShape(max_length=1024)
LARGE = TinyShape(hidden_size=512, intermediate_size=1792, layers=9, heads=8, kv_heads=4, max_length=1024)
STORIES = Path(__file__).resolve().parents[2] / "shared" / "data" / "stories260k"
EOS, MEAN_LENGTH = 5, 64
BOTH = ("generate_batch", "vllm")


@dataclass(frozen=True)
class Size:
    """Amount of work. lengths: prompt lengths, each with its target. uneven: prompts, rows at once, new tokens.

    large: prompts and new tokens for the 30 M model. shapes: prompts, samples and new tokens of the scaling curve.
    """

    prompts: int = 32
    new_tokens: int = 48
    lengths: tuple[tuple[int, float | None], ...] = ((8, 1.6), (128, 3.0), (256, None))
    uneven: tuple[int, int, int] = (16, 64, 256)
    large: tuple[int, int] = (4, 12)
    shapes: tuple[tuple[int, int, int], ...] = (
        *((16, samples, 32) for samples in (1, 2, 4, 8, 16)),
        *((count, 8, 32) for count in (8, 32, 64)),
        *((16, 8, new) for new in (16, 64, 128)),
    )
    repeats: int = 3
    models: tuple[TinyShape, TinyShape] = (SMALL, LARGE)


FULL = Size()
QUICK = Size(8, 24, ((8, 1.6), (128, 3.0)), (8, 32, 128), (4, 6), ((8, 1, 32), (8, 8, 32)), 1)
TINY = Size(
    2, 4, ((8, None),), (2, 8, 32), (1, 2), ((1, 2, 4),), 1, (replace(SMALL, hidden_size=16, intermediate_size=16),) * 2
)


@dataclass(frozen=True)
class Row:
    """One row of the table. bar: target of native's rate, as a multiple of `generate`'s. peers: further sides."""

    name: str
    model: Any
    case: Case
    bar: float | None = None
    peers: tuple[str, ...] = ()


def prompts(count: int, length: int, vocabulary: int = 250) -> list[list[int]]:
    made: list[list[int]] = torch.randint(
        6, vocabulary, (count, length), generator=torch.Generator().manual_seed(length)
    ).tolist()
    return made


def built_in(shape: TinyShape) -> Any:
    return tiny_model(shape, seed=0)[0].eval()


def ending(model: Any) -> Any:
    """Return the model with the same end-of-sequence probability at every token, so that answers have geometric lengths."""
    head = model.lm_head
    model.lm_head = torch.nn.Linear(head.in_features, head.out_features)
    with torch.no_grad():
        model.lm_head.weight.copy_(head.weight)
        model.lm_head.weight[EOS] = 0.0
        model.lm_head.bias.zero_()
        # The other logits of an untrained model are all close to 0.
        model.lm_head.bias[EOS] = torch.tensor(head.out_features / MEAN_LENGTH).log()
    return model


def rows(size: Size) -> Iterator[Row]:
    small, large = map(built_in, size.models)
    for length, bar in size.lengths:
        case = Case(prompts(size.prompts, length), 8, size.new_tokens)
        yield Row(f"0.3 M, prompts of {length}", small, case, bar, {8: BOTH[:1], 128: BOTH[1:]}.get(length, ()))
    count, at_once, new_tokens = size.uneven
    uneven = Case(prompts(count, 32), 8, new_tokens, eos=EOS, rows=at_once)
    yield Row("0.3 M, answers of uneven length", ending(built_in(size.models[0])), uneven, peers=BOTH[:1])
    if STORIES.is_dir() and size is FULL:
        stories = transformers.AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
        yield Row("stories260k, prompts of 128", stories, Case(prompts(size.prompts, 128), 8, size.new_tokens))
    for kind, bf16, bar in (("float32", False, None), ("bfloat16", True, 3.5)):
        case = Case(prompts(size.large[0], 128), 8, size.large[1], bf16=bf16)
        yield Row(f"30 M, prompts of 128, {kind}", large, case, bar, BOTH[1:] if bf16 and size is FULL else ())


def rate(side: Side) -> float:
    started = time.process_time()
    tokens = side()
    return tokens / (time.process_time() - started)


PEERS = {"generate": generate, "generate_batch": continuous}


def apart(row: Row) -> dict[str, Apart]:
    """Start transformers' sides of a row, each in its own process with Python's default memory settings."""
    names = ("generate", *(name for name in row.peers if name in PEERS))
    return {name: Apart(PEERS[name](row.model, row.case)) for name in names}


def measured(row: Row, peers: Mapping[str, Apart], python: str | None, repeats: int) -> dict[str, list[float]]:
    """Return the rates of all sides, taken in turns after one warm-up run each; the slow `generate_batch` runs only once."""
    side = native(row.model, row.case)
    sides: dict[str, Callable[[], float]] = {"native": lambda: rate(side)} | {n: peer.rate for n, peer in peers.items()}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    with contextlib.ExitStack() as stack:
        for peer in peers.values():
            stack.callback(peer.close)
        if python and "vllm" in row.peers:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            saved(row.model, Path(folder))
            child = Vllm(python, Path(folder), row.case)
            stack.callback(child.close)
            sides["vllm"], rates["vllm"] = child.rate, []
        for number in range(repeats + 1):
            for name, measure in sides.items():
                if name != "generate_batch" or number == 1:
                    rates[name] += [measure()][: int(number > 0)]
    return rates


def saved(model: Any, folder: Path) -> None:
    from posttrain.models.tiny import byte_tokenizer

    model.save_pretrained(folder)
    byte_tokenizer(model.config.max_position_embeddings).save_pretrained(folder)


def table(found: dict[str, tuple[Row, dict[str, list[float]]]]) -> str:
    lines = [
        "| case | answers x tokens | native | `generate` | ratio | bar | `generate_batch` | ratio | vLLM | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (row, rates) in found.items():
        case, ours = row.case, statistics.median(rates["native"])
        cells = [name, f"{len(case.prompts) * case.samples} x {case.new_tokens}", spread(rates["native"])]
        for side in ("generate", "generate_batch", "vllm"):
            cells += (
                [spread(rates[side]), f"{ours / statistics.median(rates[side]):.2f}"] if side in rates else ["", ""]
            )
            if side == "generate":
                cells.append("" if row.bar is None else f"{row.bar}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(rates: Sequence[float]) -> str:
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"


def curve(size: Size) -> list[Row]:
    """Measure growing prompts, samples and lengths with the 0.3 M model and 128-token prompts."""
    model = built_in(size.models[0])
    return [Row("", model, Case(prompts(count, 128), samples, new)) for count, samples, new in size.shapes]


def scaling(shapes: Sequence[tuple[Row, Mapping[str, Apart]]]) -> str:
    """Return a table with seconds of processor time."""
    lines = ["| prompts | answers each | new tokens | native, s | `generate`, s |", "|---|---|---|---|---|"]
    for row, peers in shapes:
        rates, case = measured(row, peers, None, 1), row.case
        count, samples, new = len(case.prompts), case.samples, case.new_tokens
        cells = [f"{count * samples * new / rates[side][0]:.3f}" for side in ("native", "generate")]
        lines.append(f"| {count} | {samples} | {new} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shares(model: Any, case: Case) -> dict[str, float]:
    """Return the share of the native engine's processor time by part; nested parts are counted once."""
    from posttrain.rollouts import native as module
    from posttrain.rollouts.decoder import Decoder
    from posttrain.rollouts.segments import Segment
    from posttrain.rollouts.slots import SlotLayer

    spent, stack = Counter[str](), [["", time.process_time()]]

    def switch(to: str | None) -> None:
        now = time.process_time()
        spent[str(stack[-1][0])] += now - float(stack[-1][1])
        if to is None:
            stack.pop()
            stack[-1][1] = now
        else:
            stack.append([to, now])

    def timed(owner: Any, name: str, part: str) -> None:
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            switch(part)
            try:
                return function(*args, **kwargs)
            finally:
                switch(None)

        patches.callback(setattr, owner, name, function)
        setattr(owner, name, watched)

    with contextlib.ExitStack() as patches:
        timed(Decoder, "enter", "prompts")
        timed(Decoder, "step", "layers without attention")
        timed(Segment, "attend", "attention")
        timed(SlotLayer, "update", "attention")
        timed(Decoder, "logits", "head")
        timed(module, "draw", "drawing")
        side = native(model, case)
        side()
        spent.clear()
        side()
    switch("end")
    spent["batching"] = spent.pop("")
    total = sum(spent.values())
    return {part: seconds / total for part, seconds in spent.items()}


def picture(size: Size, path: Path) -> None:
    """Plot the parts of the native engine's time, one bar per case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from benchmarks.moe_gspo import smaller

    small, large = map(built_in, size.models)
    bars = {
        f"0.3 M, prompts of {n}": shares(small, Case(prompts(size.prompts, n), 8, size.new_tokens))
        for n, _ in size.lengths
    }
    for kind, bf16 in (("float32", False), ("bfloat16", True)):
        case = Case(prompts(size.large[0], 128), 8, size.large[1], bf16=bf16)
        bars[f"30 M, prompts of 128, {kind}"] = shares(large, case)
    parts = ("prompts", "layers without attention", "attention", "head", "drawing", "batching")
    colours = ("#999999", "#0072B2", "#D55E00", "#56B4E9", "#009E73", "#E69F00")
    figure, axis = pyplot.subplots(figsize=(9, 2.8), layout="constrained")
    left = [0.0] * len(bars)
    for part, colour in zip(parts, colours, strict=True):
        widths = [100 * shares_of.get(part, 0.0) for shares_of in bars.values()]
        axis.barh(list(bars), widths, left=left, color=colour, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.set_xlabel("% of the native engine's processor time", fontsize=8)
    axis.tick_params(labelsize=8)
    figure.legend(loc="outside upper center", ncols=len(parts), fontsize=7, frameon=False)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)
    smaller(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--quick", action="store_const", const=QUICK, dest="size", help="fewer and smaller cases, one repeat"
    )
    sizes.add_argument(
        "--tiny", action="store_const", const=TINY, dest="size", help="a few tokens, to see that all of it runs"
    )
    parser.add_argument("--write", action="store_true", help="write the tables and a picture of where the time goes")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="where to, with --write")
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of an environment with vLLM's CPU build")
    parser.set_defaults(size=FULL)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    found = {}
    with_peers, shapes = ([(row, apart(row)) for row in of] for of in (rows(args.size), curve(args.size)))
    keep_heap()  # Every step of the pipeline does the same.
    for row, peers in with_peers:
        found[row.name] = (row, measured(row, peers, args.vllm, args.size.repeats))
        medians = {side: round(statistics.median(rates)) for side, rates in found[row.name][1].items()}
        print(f"{row.name}: {medians}", file=sys.stderr, flush=True)
    report = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, {os.cpu_count()} cores, one thread;"
        f" tokens in a second of processor time.\n\n{table(found)}\n\n{scaling(shapes)}"
    )
    print(report)
    if args.write:
        from benchmarks.moe_gspo import write

        write(report, args.out)
        picture(args.size, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
