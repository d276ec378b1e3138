"""The public functions give the same numbers whatever the caller has set in torch, and in threads; some models are refused."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

import posttrain as pt
from posttrain.errors import ConfigError, PosttrainError

SMALL = {"hidden_size": 16, "intermediate_size": 16, "layers": 1, "heads": 2, "kv_heads": 1}
ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c"}]


def lengths(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def trained(model: pt.Model | None = None, **changes: Any) -> tuple[float, float, list[str]]:
    """Return a loss of imitation, one of GRPO, and sampled answers."""
    model = model or pt.tiny(seed=0, **SMALL)
    settings = {"steps": 2, "learning_rate": 0.01, "batch_size": 2} | changes
    said = model.generate(["a", "b"], max_new_tokens=4, temperature=1.0)
    imitated = pt.train(model, "sft", ROWS, **settings)[-1]["loss"]
    sampled = pt.train(model, "grpo", ["a", "b"], reward=lengths, samples=2, max_new_tokens=4, **settings)[-1]["loss"]
    return imitated, sampled, said


@contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def expected() -> tuple[float, float, list[str]]:
    return trained()


@pytest.mark.parametrize(
    "surroundings",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: default_type(torch.float64),
        lambda: default_type(torch.bfloat16),
        lambda: torch.device("meta"),
    ],
    ids=["no_grad", "inference_mode", "float64", "bfloat16", "meta"],
)
def test_what_the_caller_has_set_in_torch_changes_nothing(
    surroundings: Callable[[], AbstractContextManager[Any]], expected: Any
) -> None:
    with surroundings():
        assert trained() == expected


def test_threads_draw_and_train_the_same_models(expected: Any) -> None:
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(trained())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 3


def test_a_model_is_not_trained_twice_at_once() -> None:
    model = pt.tiny(seed=0, **SMALL)

    def training(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
        with contextlib.suppress(ZeroDivisionError):
            pt.train(model, "sft", ROWS, steps=1, learning_rate=0.01, batch_size=1)
        return [0.0] * len(completions)

    with pytest.raises(PosttrainError, match="this model is being trained at the moment"):
        pt.train(model, "grpo", ["a"], reward=training, steps=1, learning_rate=0.01, batch_size=1)
    assert trained(model)[0] > 0


def frozen(model: torch.nn.Module) -> object:
    return model.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            torch.nn.Module.half,
            "has weights of torch.float16, in which small updates are rounded away; call model.lm.float",
        ),
        (torch.nn.Module.bfloat16, "has weights of torch.bfloat16"),
        (frozen, "has no weight with requires_grad"),
        (lambda model: model.to("meta"), "on the device `meta`"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(change: Callable[[Any], object], message: str) -> None:
    model = pt.tiny(seed=0, **SMALL)
    change(model.lm)
    with pytest.raises(PosttrainError, match=message):
        trained(model) if message.startswith("has no weight") else pt.train(
            model, "sft", ROWS, steps=1, learning_rate=0.01, batch_size=1
        )


def test_autocast_is_refused() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ConfigError, match=r"inside torch\.autocast"):
        trained()


def test_a_teacher_stays_trainable() -> None:
    teacher, model = pt.tiny(seed=1, **SMALL), pt.tiny(seed=0, **SMALL)
    pt.train(
        model, "distill", ["a"], teacher=teacher, steps=1, learning_rate=0.01, batch_size=1, samples=2, max_new_tokens=2
    )
    assert all(weight.requires_grad for weight in teacher.lm.parameters())


def test_a_reward_that_changes_torch_for_the_process_changes_no_number(
    expected: tuple[float, float, list[str]],
) -> None:
    """Before, a function that leaves gradients off ended training in an exception of torch."""

    def careless(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.set_num_threads(torch.get_num_threads() + 1)
        return lengths(prompts, completions)

    threads, model = torch.get_num_threads(), pt.tiny(seed=0, **SMALL)
    settings = {"steps": 2, "learning_rate": 0.01, "batch_size": 2}
    pt.train(model, "sft", ROWS, **settings)
    history = pt.train(model, "grpo", ["a", "b"], reward=careless, samples=2, max_new_tokens=4, **settings)
    assert history[-1]["loss"] == expected[1]
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, torch.float32)
    assert torch.is_grad_enabled()
    assert torch.get_default_device() == torch.device("cpu")
