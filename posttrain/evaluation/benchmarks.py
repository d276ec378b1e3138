"""Tasks of the package lm-eval (EleutherAI's harness) as an evaluation of our models: its tasks and metrics, our engine.

The extra: `pip install -c constraints.txt '.[benchmarks]'`. A task is one of the package by name, whose data comes from the hub, or a YAML
file of one's own, whose data may lie next to it. Scores agree with the harness's own `hf` model
(tests/evaluation/test_benchmarks.py).

Example:
    >>> score = BenchmarkScore("sums", "acc", 0.5, (1.0, 0.0))
    >>> score.is_mean, BenchmarkScore("text", "word_perplexity", 9.0, (), 0.2).is_mean
    (True, False)
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.data.batches import collate, micro_batches
from posttrain.data.tokens import TextEncoder, Tokens
from posttrain.data.transfer import to_host
from posttrain.errors import ConfigError
from posttrain.evaluation.harness import require_package
from posttrain.evaluation.statistics import Interval, Resampling, floats, mean_interval
from posttrain.models.packed import hidden_states
from posttrain.models.policy import Policy, scatter
from posttrain.rollouts.engine import Engine, Request, SamplingSettings

_NEW_TOKENS = 256
"""Length of an answer if the task names none, as in the harness."""
_TOLERANCE = 1e-6
_TILE = 2**26
"""Most logits at a time: 268 MB, and no table of all tokens and words."""


@dataclass(frozen=True)
class BenchmarkScore:
    """One metric of one task.

    Attributes:
        metric: its name; with the name of a filter after a dot, such as `exact_match.strict-match`.
        by_document: one value per document, if the metric is their mean; else ().
        error: the harness's standard error, NaN if it has none.
    """

    task: str
    metric: str
    value: float
    by_document: tuple[float, ...]
    error: float = math.nan

    @property
    def is_mean(self) -> bool:
        """Return True if the value is the mean over documents."""
        return bool(self.by_document)

    def interval(self, resampling: Resampling) -> Interval:
        """Return an interval over documents; from the harness's standard error if the metric is no mean."""
        if self.is_mean:
            return mean_interval(floats(list(self.by_document)), resampling)
        from statistics import NormalDist

        reach = NormalDist().inv_cdf(0.5 + resampling.confidence / 2) * self.error
        return Interval(self.value, self.value - reach, self.value + reach, 0, 0, "normal")


@dataclass(frozen=True)
class BenchmarkSettings:
    """Tasks and how they are asked.

    Attributes:
        folder: folder of one's own task files; None if there are none.
        limit: documents of each task; None is all.
        shots: examples before the question; None is the task's own number.
        chat: ask in the model's chat template.
    """

    tasks: Sequence[str]
    folder: Path | None
    limit: int | None
    shots: int | None
    chat: bool
    micro_batch_tokens: int
    bf16: bool = False


def benchmark(
    policy: Policy, engine: Engine, encoder: TextEncoder, settings: BenchmarkSettings
) -> list[BenchmarkScore]:
    """Return the scores of every task, in the order of tasks and metrics' names.

    Raises:
        ConfigError: the package is not installed, there is no such task, or its data cannot be read.
    """
    require_package()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder = settings.folder
    manager = TaskManager(include_path=None if folder is None else str(folder), verbosity="ERROR")
    if missing := [name for name in settings.tasks if name not in manager.all_tasks]:
        raise ConfigError(
            f"evaluation.benchmarks.tasks: lm-eval has no task {missing[0]!r}; write its file in {folder or 'a folder of tasks'}, or see"
            " the names with: lm_eval ls tasks"
        )
    try:
        found = simple_evaluate(
            model=_harness_model(policy, engine, encoder, settings),
            tasks=list(settings.tasks),
            num_fewshot=settings.shots,
            limit=settings.limit,
            apply_chat_template=settings.chat,
            task_manager=manager,
            bootstrap_iters=0 if settings.limit == 1 else 1000,
            log_samples=True,
        )
    # pyrefly: ignore[unreachable-except-clause]
    except (OSError, ConnectionError, ValueError) as error:
        offline = " HF_HUB_OFFLINE=0 allows downloads." if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise ConfigError(
            f"evaluation.benchmarks: {', '.join(settings.tasks)} cannot be run: {error}.{offline}"
        ) from error
    assert found is not None
    return [score for task in sorted(found["results"]) for score in _scores(task, found)]


def _scores(task: str, found: Mapping[str, Any]) -> list[BenchmarkScore]:
    results, samples = found["results"][task], found.get("samples", {}).get(task, [])
    scores = []
    for key in sorted(results):
        metric, comma, filtered = key.partition(",")
        value = results[key]
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = results.get(f"{metric}_stderr,{filtered}")
        own = [s.get(metric) for s in samples if s.get("filter", "none") == filtered]
        numbers = [float(x) for x in own if isinstance(x, int | float)]
        mean = len(numbers) == len(own) > 0 and abs(sum(numbers) / len(numbers) - value) <= _TOLERANCE
        name = metric if filtered == "none" else f"{metric}.{filtered}"
        known = float(error) if isinstance(error, int | float) else math.nan
        scores.append(BenchmarkScore(task, name, float(value), tuple(numbers) if mean else (), known))
    return scores


def _harness_model(policy: Policy, engine: Engine, encoder: TextEncoder, settings: BenchmarkSettings) -> Any:
    """Return the model as the harness asks it: log-probabilities by one forward pass, texts by the engine."""
    from lm_eval.api.model import TemplateLM

    class HarnessModel(TemplateLM):
        tokenizer = encoder.tokenizer
        tokenizer_name = "posttrain"

        @property
        def eot_token_id(self) -> int:
            eos = encoder.tokenizer.eos_token_id
            return int(encoder.ends[0] if eos is None else eos)

        @property
        def prefix_token_id(self) -> int:
            bos = encoder.tokenizer.bos_token_id
            return int(self.eot_token_id if bos is None else bos)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            special = add_special_tokens
            if special is None:  # a chat template may have written it already
                special = not string.startswith(str(encoder.tokenizer.decode([self.prefix_token_id])))
            return list(encoder.tokenizer(string, add_special_tokens=special)["input_ids"])

        def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
            text = encoder.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
            return str(text)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            return continuations(policy, pairs, encoder.max_length, settings.micro_batch_tokens, settings.bf16)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            return [self._rolling(request.args[0]) for request in requests]

        def _rolling(self, text: str) -> float:
            from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, encoder.max_length, 1)
            pairs = [make_disjoint_window(window) for window in windows]
            found = continuations(policy, pairs, encoder.max_length, settings.micro_batch_tokens, settings.bf16)
            return sum(value for value, _ in found)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return generations(engine, encoder, [(self.tok_encode(r.args[0]), r.args[1]) for r in requests])

    return HarnessModel()


def generations(
    engine: Engine, encoder: TextEncoder, asked: Sequence[tuple[list[int], Mapping[str, Any]]]
) -> list[str]:
    """Return the text after every context, up to the first of its task's stops. A long context loses its start."""
    settings = [_sampling(given) for _, given in asked]
    texts = [""] * len(asked)
    for wanted in dict.fromkeys(settings):
        places = [place for place, own in enumerate(settings) if own == wanted]
        room = encoder.max_length - wanted.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"evaluation.benchmarks: a task asks for {wanted.max_new_tokens} tokens, and the context of the model is"
                f" {encoder.max_length}; lower max_gen_toks in its generation_kwargs"
            )
        requests = [Request(tuple(asked[place][0][-room:]), ((0, place),)) for place in places]
        for place, (completion,) in zip(places, engine.sample(requests, wanted), strict=True):
            texts[place] = _cut(encoder.text(completion.tokens), asked[place][1].get("until") or [])
    return texts


def _sampling(given: Mapping[str, Any]) -> SamplingSettings:
    """Return the sampling settings of a task's generation_kwargs: greedy unless it samples."""
    heat = float(given.get("temperature") or 0.0)
    sampled = bool(given.get("do_sample", heat > 0))
    tokens = int(given.get("max_gen_toks") or given.get("max_new_tokens") or _NEW_TOKENS)
    return SamplingSettings(tokens, (heat or 1.0) if sampled else 0.0)


def _cut(text: str, stops: str | Sequence[str]) -> str:
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.partition(stop)[0] if stop else text
    return text


@torch.no_grad()
def continuations(
    policy: Policy,
    pairs: Sequence[tuple[list[int], list[int]]],
    longest: int,
    micro_batch_tokens: int,
    bf16: bool = False,
) -> list[tuple[float, bool]]:
    """Return the log-probability of every continuation after its context, and whether each of its tokens is the most probable one.

    Contexts lose their start if more than `longest` tokens would be read, as in the harness; the last token is not read.
    """
    rows = []
    for context, continuation in pairs:
        whole = (context + continuation)[-(longest + 1) :]
        rows.append(Tokens(tuple(whole[: -len(continuation)]), tuple(whole[-len(continuation) :])))
    found = [(0.0, False)] * len(rows)
    device = next(policy.parameters()).device
    for group in micro_batches([[row] for row in rows], micro_batch_tokens) if rows else []:
        batch = collate([rows[i] for i in group]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            hidden = hidden_states(policy.lm, batch, policy.packs, batch.predicting())
            source, targets = (one.flatten().index_select(0, batch.trained) for one in (batch.source, batch.targets))
            scores = _token_scores(policy.lm.get_output_embeddings(), hidden.index_select(0, source), targets)
        # [rows]: sums over each row's tokens, which travel together
        sums = (scatter(each, batch).sum(1) for each in scores)
        values, misses = (each.tolist() for each in to_host([*sums]))
        for i, value, missed in zip(group, values, misses, strict=True):
            found[i] = (value, missed == 0)
    return found


def _token_scores(head: Any, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's log-probability, and 1 if a different token is more probable, else 0; both [tokens]."""
    logprobs, missed = [], []
    step = max(1, _TILE // head.weight.shape[0])
    for own, said in zip(hidden.split(step), targets.split(step), strict=True):
        logits = head(own).float()
        logprobs.append(logits.gather(1, said[:, None])[:, 0] - logits.logsumexp(-1))
        missed.append((logits.argmax(-1) != said).float())
    return torch.cat(logprobs), torch.cat(missed)
