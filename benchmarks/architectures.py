"""Compare every causal architecture of transformers, tiny and random, with this library; write the table docs/models.md.

    python benchmarks/architectures.py [--only gpt2 mamba] [--write]

Each model is saved and loaded as users do it. Compared with transformers' own forward pass: log-probabilities, the log-probabilities that
sampling reports, a reward model's scores, the merged adapter, gradients with and without activation checkpointing, and the parameters
that `posttrain plan` counts. A model whose configuration needs more than small numbers here is listed as not tried.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)
from transformers.utils import logging

from benchmarks.architecture_sizes import tiny_settings
from posttrain.data.batches import collate
from posttrain.data.tokens import Tokens
from posttrain.errors import PosttrainError
from posttrain.models.checkpointing import recompute_layers
from posttrain.models.folders import load_policy, save_model
from posttrain.models.inference import scores
from posttrain.models.lora import Adapter, LoraSettings
from posttrain.models.policy import Policy, Scorer
from posttrain.models.reach import probe_ids
from posttrain.models.scorers import load_scorer, start_scorer
from posttrain.models.tiny import byte_tokenizer
from posttrain.planning import sizes, training
from posttrain.rollouts.engine import Request, SamplingSettings
from posttrain.rollouts.native import NativeEngine

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
LIMIT = 1e-4
"""Greatest difference that counts as agreement: nats, or a share of the largest score or gradient."""
MOST_PARAMETERS = 4_000_000
COLUMNS = ("log-probabilities", "samples", "scores", "merged adapter", "checkpointing", "plan")
HEAD = """# Architectures

Made by `python benchmarks/architectures.py --write`: a tiny random model of every causal architecture of transformers {version} whose
configuration can be made small, compared with transformers' own forward pass, with rows longer than any attention window. A cell is
the greatest difference: in nats for log-probabilities, samples and the merged adapter, as a share of the largest value for scores and
gradients (checkpointing), in parameters for the plan. At most 1e-4 counts as agreement. *generate*: sampled by transformers' `generate`,
which is slower. *refused*: the stage stops with the words shown below, before anything is trained.

"""


@dataclass
class Row:
    """One architecture's results: a difference, or the words of a refusal, for each column."""

    kind: str
    refused: str = ""
    cells: dict[str, float | str] = field(default_factory=dict)
    generate: bool = False
    faults: list[str] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        """Return True if no value differs by more than the limit."""
        return all(isinstance(cell, str) or cell <= LIMIT for cell in self.cells.values())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names of architectures, as in `model_type`")
    parser.add_argument("--write", action="store_true", help="write the table to docs/models.md")
    args = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found: list[Row | str] = []
    for kind in args.only or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        found.append(measured(kind))
        show(found[-1])
        gc.collect()
    if args.write:
        PAGE.write_text(page(found), encoding="utf-8")


def show(row: Row | str) -> None:
    """Print a line as soon as it is known, and the words of refusals and faults."""
    print(row if isinstance(row, str) else line(row), flush=True)
    if isinstance(row, Row):
        for said in [row.refused, *row.faults, *(c for c in row.cells.values() if isinstance(c, str))]:
            print(f"    {said}" if said else "", end="\n" if said else "", flush=True)


def measured(kind: str) -> Row | str:
    """Return the results of one architecture, or the reason why it was not tried."""
    try:
        model = tiny(kind)
    except Exception as error:  # many configurations have their own rules for the sizes that fit together
        return f"{kind}: not tried ({type(error).__name__}: {' '.join(str(error).split())[:100]})"
    if model is None:
        return f"{kind}: not tried (its configuration does not become small)"
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(StringIO()):
        path = Path(folder) / "lm"
        save_model(model, byte_tokenizer(128), path, "")
        return compared(kind, path)


def tiny(kind: str) -> Any:
    """Return a random model of this architecture, None if it is not tiny. Weights are large enough that every token counts."""
    errors = []
    for settings in tiny_settings(kind):
        try:
            config = AutoConfig.for_model(kind, **settings)
            with torch.device("meta"):
                count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            return random_model(config) if count <= MOST_PARAMETERS else None
        except Exception as error:  # many configurations have their own rules for which numbers fit together
            errors.append(error)
    raise errors[0]


def random_model(config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2 and "norm" not in name:
                weight.normal_(0.0, 0.6 * weight.shape[-1] ** -0.5)
            elif weight.dim() == 1 and name.endswith(("bias", "sinks")):
                weight.normal_(0.0, 0.1)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    return model


def compared(kind: str, path: Path) -> Row:
    row = Row(kind)
    try:
        lm = load_policy(path)
    except PosttrainError as error:
        row.refused = str(error).replace(f"{path}: ", "")
        return row
    except Exception as error:
        row.cells = dict.fromkeys(COLUMNS, float("inf"))
        row.faults.append(f"load: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return row
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    checks: dict[str, Callable[[], float]] = {
        "log-probabilities": lambda: of_logprobs(Policy(lm), theirs),
        "samples": lambda: of_samples(lm, theirs, row),
        "scores": lambda: of_scores(path),
        "merged adapter": lambda: of_merge(path),
        "checkpointing": lambda: of_checkpointing(path),
        "plan": lambda: of_plan(lm),
    }
    for name, check in checks.items():
        try:
            row.cells[name] = check()
        except PosttrainError as error:
            row.cells[name] = re.sub(rf"{path.parent}/\w+: ", "", str(error))
        except Exception as error:  # a fault of this library, to be mended; the other columns are still measured
            row.cells[name] = float("inf")
            row.faults.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return row


def rows(vocabulary: int) -> list[Tokens]:
    """Return rows of different lengths, two with the same prompt; the first one is beyond every window."""
    ids = probe_ids(90, vocabulary)
    return [
        Tokens(ids[:30], ids[30:]),
        Tokens(ids[:30], ids[40:55]),
        Tokens(ids[60:63], ids[63:80]),
        Tokens(ids[5:6], ids[6:8]),
    ]


@torch.no_grad()
def own_logprobs(theirs: Any, row: Tokens) -> torch.Tensor:
    """Return each response token's log-probability from transformers' forward pass."""
    table = theirs(input_ids=torch.tensor([row.prompt + row.response]), use_cache=False).logits[0].log_softmax(-1)
    return table[len(row.prompt) - 1 : -1].gather(-1, torch.tensor(row.response)[:, None])[:, 0]


@torch.no_grad()
def of_logprobs(policy: Policy, theirs: Any) -> float:
    batch = rows(vocabulary(theirs))
    found = policy(collate(batch)).logprobs
    return max(difference(found[i, : len(row.response)], own_logprobs(theirs, row)) for i, row in enumerate(batch))


def of_samples(lm: Any, theirs: Any, row: Row) -> float:
    ids = probe_ids(90, vocabulary(theirs))
    requests = [Request(ids[:40], ((0,), (1,))), Request(ids[50:59], ((2,),))]
    engine = NativeEngine(lm, ())
    answers = engine.sample(requests, SamplingSettings(12, 1.0))
    row.generate = engine.confirmed > 0
    return max(
        difference(torch.tensor(answer.logprobs), own_logprobs(theirs, Tokens(request.prompt, answer.tokens)))
        for request, group in zip(requests, answers, strict=True)
        for answer in group
    )


@torch.no_grad()
def of_scores(path: Path) -> float:
    """Compare a saved scorer with transformers' class, or, if there is none, with the head on transformers' trunk."""
    started = start_scorer(path)
    started.score.weight.normal_(0.0, 0.5)
    folder = path.with_name("rm")
    save_model(started, byte_tokenizer(128), folder, "", {"pad_token_id": 0})
    loaded = load_scorer(folder)
    batch = rows(vocabulary(loaded))
    found = torch.tensor(scores(Scorer(loaded), batch, 999))
    if has_transformers_class(loaded):
        theirs = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        own = [theirs(input_ids=ids(row), use_cache=False).logits[0, 0] for row in batch]
    else:  # transformers has no such class for this architecture, or one with a different kind of head
        trunk = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().base_model
        own = [loaded.score(trunk(input_ids=ids(row), use_cache=False).last_hidden_state[0, -1])[0] for row in batch]
    expected = torch.stack(own)
    return difference(found, expected) / max(1.0, float(expected.abs().max()))


def has_transformers_class(scorer: Any) -> bool:
    """Return True if transformers itself loads the folder with this class."""
    kind = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(scorer.config), None)
    return kind is not None and type(scorer) is kind


def ids(row: Tokens) -> torch.Tensor:
    return torch.tensor([row.prompt + row.response])


def of_merge(path: Path) -> float:
    """Compare the adapted model in training with the merged one that transformers loads from the folder."""
    lm = load_policy(path)
    adapter = Adapter(lm, LoraSettings(rank=2, alpha=4))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in lm.named_parameters():
            if "lora_B" in name:
                weight.normal_(0.0, 0.1)
        batch = rows(vocabulary(lm))
        adapted = Policy(lm)(collate(batch)).logprobs
    adapter.merge()
    folder = path.with_name("merged")
    save_model(lm, byte_tokenizer(128), folder, "", adapter=adapter)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return max(difference(adapted[i, : len(r.response)], own_logprobs(theirs, r)) for i, r in enumerate(batch))


def of_checkpointing(path: Path) -> float:
    """Compare gradients of recomputed layers with those of transformers' forward pass."""
    theirs, lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), load_policy(path)
    recompute_layers(lm)
    batch = rows(vocabulary(lm))
    policy = Policy(lm).train()
    policy(collate(batch)).logprobs.sum().backward()
    for row in batch:
        table = theirs(input_ids=ids(row), use_cache=False).logits[0].log_softmax(-1)
        table[len(row.prompt) - 1 : -1].gather(-1, torch.tensor(row.response)[:, None]).sum().backward()
    own, found = dict(theirs.named_parameters()), dict(lm.named_parameters())
    largest = max(float(w.grad.abs().max()) for w in own.values() if w.grad is not None)
    return max(difference(gradient(found[n]), gradient(w)) for n, w in own.items() if n in found) / max(1.0, largest)


def gradient(weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def of_plan(lm: Any) -> float:
    planned = sizes(lm.config)
    assert training(planned, micro_batch_tokens=100).total > 0
    return float(abs(planned.parameters - sum(p.numel() for p in lm.parameters())))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    worst = float((found - expected).abs().max())
    return worst if worst == worst else float("inf")


def vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def line(row: Row) -> str:
    """Return the row of the table."""
    name = f"`{row.kind}`"
    if row.refused:
        return f"| {name} | refused |" + " |" * (len(COLUMNS) - 1)
    cells = ["refused" if isinstance(row.cells[c], str) else f"{row.cells[c]:.0e}" for c in COLUMNS]
    if row.generate:
        cells[1] += " *generate*"
    mark = "" if row.agrees else " **differs**"
    return f"| {name}{mark} | " + " | ".join(cells) + " |"


def page(found: Sequence[Row | str]) -> str:
    """Return docs/models.md."""
    import transformers

    tried = [row for row in found if isinstance(row, Row)]
    whole = [
        row
        for row in tried
        if not row.refused and row.agrees and not any(isinstance(c, str) for c in row.cells.values())
    ]
    parts = [row for row in tried if not row.refused and any(isinstance(c, str) for c in row.cells.values())]
    refused = [row for row in tried if row.refused]
    counts = (
        f"{len(tried)} architectures were tried: {len(whole)} agree in everything, {len(parts)} agree and are refused in a part,"
        f" {len(refused)} are refused, {sum(not row.agrees for row in tried)} differ.\n"
    )
    table = [f"| architecture | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|", *map(line, tried)]
    words = [f"* `{row.kind}`: {row.refused}" for row in refused]
    words += [f"* `{row.kind}`, {c}: {said}" for row in parts for c, said in row.cells.items() if isinstance(said, str)]
    others = [f"* {text}" for text in found if isinstance(text, str)]
    head = HEAD.format(version=transformers.__version__) + counts
    return "\n".join([head, *table, "\n## Refused, in these words\n", *words, "\n## Not tried\n", *others, ""])


if __name__ == "__main__":
    main()
