"""Tasks of lm-eval on our models: the numbers of the harness's own model, offline, from files. Skipped without the extra."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from posttrain.data.tokens import TextEncoder
from posttrain.errors import ConfigError
from posttrain.evaluation import benchmarks
from posttrain.evaluation.benchmarks import (
    BenchmarkScore,
    BenchmarkSettings,
    benchmark,
    continuations,
    generations,
)
from posttrain.evaluation.harness import require_package
from posttrain.evaluation.statistics import Resampling
from posttrain.models.folders import load_encoder, load_policy, save_model
from posttrain.models.policy import Policy
from posttrain.models.tiny import TinyShape, tiny_model
from posttrain.rollouts.native import NativeEngine
from tests.models import small

installed = pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra 'benchmarks' is not installed")
absent = pytest.mark.skipif(find_spec("lm_eval") is not None, reason="the extra 'benchmarks' is installed")
SHAPE = TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1, max_length=64)

CHOICE = """
task: mine_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}} "
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
TEXT = """
task: mine_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
generation_kwargs: {{until: ["\\n"], max_gen_toks: 5, do_sample: false}}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[label]}}}}"
metric_list: [{{metric: exact_match}}]
"""
ROLLING = """
task: mine_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{long}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of tasks with their data: eight documents."""
    rows = [
        {"question": f"{n}+{n}=", "choices": [str(2 * n), str(n), "none"], "label": n % 3, "long": "abc " * 5 * n + "."}
        for n in range(1, 9)
    ]
    data = tmp_path / "tasks" / "data.jsonl"
    data.parent.mkdir()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, text in (("choice", CHOICE), ("text", TEXT), ("rolling", ROLLING)):
        (data.parent / f"{name}.yaml").write_text(text.format(file=data), encoding="utf-8")
    return data.parent


@absent
def test_without_the_extra_it_says_what_to_type() -> None:
    with pytest.raises(ConfigError, match=r"pip install -c constraints.txt '.\[benchmarks\]'"):
        require_package()


def test_a_continuations_log_probability_is_the_sum_over_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = small.language_model()
    policy = Policy(lm)
    # the last three are answers to one question, which is computed once for them
    question = [3 + i % 20 for i in range(20)]
    pairs = [([5, 6, 7], [8, 9]), ([5], [6]), ([9] * 70, [4, 4, 4]), *((question, [7, i]) for i in (4, 5, 6))]
    monkeypatch.setattr(benchmarks, "_TILE", 2 * lm.config.vocab_size)  # two tokens at a time
    found = continuations(policy, pairs, longest=64, micro_batch_tokens=80)
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        whole = (context + continuation)[-65:]
        with torch.no_grad():
            logits = lm(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)
        own = logits[-len(continuation) :]
        assert value == pytest.approx(sum(float(own[i, t]) for i, t in enumerate(continuation)), abs=1e-4)
        assert greedy == all(int(own[i].argmax()) == t for i, t in enumerate(continuation))
    # the most probable token after a context is its greedy continuation
    with torch.no_grad():
        best = int(lm(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax())
    assert continuations(policy, [([5, 6, 7], [best])], 64, 80)[0][1]


def test_texts_end_at_the_tasks_stops_and_long_contexts_lose_their_start() -> None:
    model, tokenizer = tiny_model(SHAPE, seed=0)
    encoder = TextEncoder(tokenizer, 64)
    engine = NativeEngine(model, [])
    ids = list(encoder.prompt("2+2="))
    (whole,) = generations(engine, encoder, [(ids, {"max_gen_toks": 6})])
    assert len(whole) > 1
    stop = whole[1]
    (cut,) = generations(engine, encoder, [(ids, {"max_gen_toks": 6, "until": [stop]})])
    assert cut == whole.partition(stop)[0]
    long = [5] * 100
    assert generations(engine, encoder, [(long, {"max_gen_toks": 6})]) == generations(
        engine, encoder, [(long[-58:], {"max_gen_toks": 6})]
    )
    with pytest.raises(ConfigError, match="asks for 64 tokens, and the context of the model is 64"):
        generations(engine, encoder, [(ids, {"max_gen_toks": 64})])


def test_intervals_are_over_documents_or_from_the_harness_error() -> None:
    draws = Resampling(confidence=0.95)
    share = BenchmarkScore("t", "acc", 0.5, (1.0, 0.0, 1.0, 0.0)).interval(draws)
    assert (share.value, share.method, share.n) == (0.5, "Wilson", 4)
    normal = BenchmarkScore("t", "ppl", 9.0, (), 0.5).interval(draws)
    assert (normal.low, normal.high) == pytest.approx((9 - 0.98, 9 + 0.98), abs=1e-3)
    assert math.isnan(BenchmarkScore("t", "ppl", 9.0, ()).interval(draws).low)


@installed
def test_scores_are_those_of_the_harness_own_model(folder: Path, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = tiny_model(SHAPE, seed=3)
    save_model(model, tokenizer, tmp_path / "m", "")
    names = ["mine_choice", "mine_rolling", "mine_text"]
    lm, encoder = load_policy(tmp_path / "m"), load_encoder(tmp_path / "m")
    settings = BenchmarkSettings(names, folder, None, None, False, 512)
    ours = benchmark(Policy(lm), NativeEngine(lm, encoder.ends), encoder, settings)
    theirs = simple_evaluate(
        model=HFLM(pretrained=str(tmp_path / "m"), device="cpu", batch_size=4, max_length=64, logits_cache=False),
        tasks=names, task_manager=TaskManager(include_path=str(folder)), bootstrap_iters=0,
    )["results"]  # fmt: skip
    compared = {(score.task, score.metric): score.value for score in ours}
    assert sorted(compared) == [
        ("mine_choice", "acc"), ("mine_choice", "acc_norm"), ("mine_rolling", "byte_perplexity"), ("mine_text", "exact_match"),
    ]  # fmt: skip
    for (task, metric), value in compared.items():
        assert value == pytest.approx(theirs[task][f"{metric},none"], rel=1e-5), (task, metric)
    by_name = {(score.task, score.metric): score for score in ours}
    assert len(by_name["mine_choice", "acc"].by_document) == 8
    assert not by_name["mine_rolling", "byte_perplexity"].is_mean
    limited = benchmark(
        Policy(lm),
        NativeEngine(lm, encoder.ends),
        encoder,
        BenchmarkSettings(["mine_choice"], folder, 3, None, False, 512),
    )
    assert len(limited[0].by_document) == 3


@installed
def test_tasks_that_do_not_exist_or_have_no_data_are_named(folder: Path) -> None:
    model, tokenizer = tiny_model(SHAPE, seed=0)
    encoder = TextEncoder(tokenizer, 64)
    engine = NativeEngine(model, encoder.ends)
    with pytest.raises(ConfigError, match="lm-eval has no task 'mine_chioce'"):
        benchmark(Policy(model), engine, encoder, BenchmarkSettings(["mine_chioce"], folder, None, None, False, 512))
    (folder / "data.jsonl").unlink()
    with pytest.raises(ConfigError, match="mine_choice cannot be run"):
        benchmark(Policy(model), engine, encoder, BenchmarkSettings(["mine_choice"], folder, None, None, False, 512))
