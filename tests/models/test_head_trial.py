"""A trial chooses the functions that compute the head on a device: its kernels if they are right and faster, else single operators."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain import choices
from posttrain.models import head_tiles, head_trial, logprobs
from posttrain.models.head_tiles import SINGLE_OPERATORS, RowGradients, Sums, TileWork
from posttrain.models.head_trial import KERNELS, Kernels, choice
from posttrain.models.policy import head_name
from tests.models import small

CPU, WIDE = torch.device("cpu"), frozenset({torch.float32, torch.bfloat16})
SLOW = 0.02
"""Seconds by which a slow function is late: far more than a tile of the tests takes."""


def scan(product: Tensor, columns: Tensor, temperature: float | Tensor, sums: Sums) -> None:
    """Compute the sums by PyTorch's own reductions, without a running maximum of the tile's own."""
    logits = head_tiles.tempered(product.clone(), temperature)
    both = torch.logaddexp(sums.normaliser(), logits.logsumexp(-1))
    shares = (sums.normaliser() - both).exp(), (logits - both[:, None]).exp()
    weighted = (sums.weighted / sums.total).nan_to_num() * shares[0] + (shares[1] * logits).sum(-1)
    at = torch.arange(logits.shape[1]) == columns[:, None]
    sums.selected.copy_(torch.where(at.any(-1), torch.where(at, logits, 0).sum(-1), sums.selected))
    for kept, value in zip(sums[1:], (both, torch.ones_like(both), weighted), strict=True):
        kept.copy_(value)


def differentiate(product: Tensor, columns: Tensor, temperature: float | Tensor, rows: RowGradients) -> Tensor:
    """Write the gradient over the product, in its dtype."""
    return product.copy_(head_tiles.differentiate(product.clone(), columns, temperature, rows))


def add_in_float32(total: Tensor, left: Tensor, right: Tensor) -> None:
    total.addmm_(left.float(), right.float())


OWN = TileWork(scan, differentiate, add_in_float32)
"""Kernels of a pretended device, written in a different way than the single operators."""


def late(function: Callable[..., Any]) -> Callable[..., Any]:
    def slowly(*given: Any) -> Any:
        time.sleep(SLOW)
        return function(*given)

    return slowly


SLOW_OPERATORS = TileWork(*(late(function) for function in SINGLE_OPERATORS))


@pytest.fixture(autouse=True)
def small_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_trial, "TOKENS", 24)
    monkeypatch.setattr(head_trial, "REPEATS", 1)
    head_trial._choice.cache_clear()


def offer(monkeypatch: pytest.MonkeyPatch, work: TileWork, dtypes: frozenset[torch.dtype] = WIDE) -> None:
    monkeypatch.setattr(choices, "_MADE", {})
    monkeypatch.setitem(KERNELS, "cpu", lambda: Kernels("kernels", work, dtypes, (LookupError,)))


def chosen(dtype: torch.dtype = torch.bfloat16) -> tuple[TileWork, str]:
    return choice(CPU, dtype, hidden=4, vocabulary=50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_faster_of_two_right_ways_is_taken(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(head_trial, "SINGLE_OPERATORS", SLOW_OPERATORS)
        offer(patch, OWN)
        work, name = chosen(dtype)
    assert work[:2] == OWN[:2]
    assert name.startswith("kernels (")
    assert " ms a tile, single operators " in name
    if dtype == torch.bfloat16:
        assert work.add_product is add_in_float32
        assert "; products added in float32 (" in name
    offer(monkeypatch, TileWork(*(late(function) for function in OWN)))
    work, name = chosen(dtype)
    assert work == SINGLE_OPERATORS
    assert name.startswith("single operators (")


def test_both_parts_are_chosen_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, OWN._replace(scan=late(scan), differentiate=late(differentiate)))
    monkeypatch.setattr(
        head_trial, "SINGLE_OPERATORS", SINGLE_OPERATORS._replace(add_product=late(head_tiles.add_product))
    )
    work, name = chosen()
    assert work == TileWork(head_tiles.scan, head_tiles.differentiate, add_in_float32)
    assert "single operators (" in name
    assert "products added in float32 (" in name


def test_in_deterministic_mode_the_clock_has_no_say(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, TileWork(*(late(function) for function in OWN)))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    work, name = chosen()
    assert work.scan is not head_tiles.scan
    assert name.startswith("kernels (right; deterministic mode does not time them)")


def without_last_word(product: Tensor, columns: Tensor, temperature: float | Tensor, sums: Sums) -> None:
    scan(product[:, :-1] if product.shape[1] > 1 else product, columns, temperature, sums)


def without_temperature(product: Tensor, columns: Tensor, temperature: float | Tensor, sums: Sums) -> None:
    scan(product, columns, 1.0, sums)


def one_column_off(product: Tensor, columns: Tensor, temperature: float | Tensor, sums: Sums) -> None:
    scan(product, columns + 1, temperature, sums)


def forgetful(product: Tensor, columns: Tensor, temperature: float | Tensor, sums: Sums) -> None:
    sums.greatest.fill_(-torch.inf)
    sums.total.zero_()
    scan(product, columns, temperature, sums)


def without_bonus(product: Tensor, columns: Tensor, temperature: float | Tensor, rows: RowGradients) -> Tensor:
    return differentiate(product, columns, temperature, rows._replace(bonus=None))


def without_target(product: Tensor, columns: Tensor, temperature: float | Tensor, rows: RowGradients) -> Tensor:
    return differentiate(product, torch.full_like(columns, -1), temperature, rows)


def not_a_number(*given: Any) -> Tensor:
    return differentiate(*given).fill_(torch.nan)


def does_not_compile(*_: Any) -> None:
    raise LookupError("Failed to find C compiler.\nPlease specify via CC")


WRONG = {
    "last word": (OWN._replace(scan=without_last_word), "its normalisers differ"),
    "temperature": (OWN._replace(scan=without_temperature), "its logits differ"),
    "column": (OWN._replace(scan=one_column_off), "its logits differ"),
    "second tile": (OWN._replace(scan=forgetful), "its normalisers differ"),
    "bonus": (OWN._replace(differentiate=without_bonus), "its gradients differ"),
    "target": (OWN._replace(differentiate=without_target), "its gradients differ"),
    "not a number": (OWN._replace(differentiate=not_a_number), "by up to nan"),
    "compiler": (OWN._replace(scan=does_not_compile), "LookupError: Failed to find C compiler."),
    "signature": (OWN._replace(scan=lambda product: None), "TypeError: "),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_kernels_are_named_and_single_operators_compute(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work, words = WRONG[fault]
    offer(monkeypatch, work)
    taken, name = chosen(torch.float32)
    assert taken == SINGLE_OPERATORS
    assert name.startswith("single operators (kernels cannot be used here: ")
    assert words in name


@pytest.mark.parametrize("part", TileWork._fields)
def test_a_lack_of_memory_is_no_refusal(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    offer(monkeypatch, OWN._replace(**{part: refused}))
    with pytest.raises(RuntimeError, match="CUBLAS_STATUS_ALLOC_FAILED"):
        chosen()


def test_a_wrong_addition_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, OWN._replace(add_product=lambda total, left, right: total.copy_(left.float() @ right.float())))
    work, name = chosen()
    assert work.add_product is head_tiles.add_product
    assert "products added after rounding to bfloat16 (kernels cannot be used here: its sums of products differ" in name


def missing() -> Kernels:
    raise ModuleNotFoundError("No module named 'triton'")


@pytest.mark.parametrize(
    ("find", "words"),
    [
        (missing, "because there are no kernels here (ModuleNotFoundError: No module named 'triton')"),
        (lambda: Kernels("kernels", OWN, frozenset()), "because kernels do not take torch.float32"),
    ],
)
def test_a_device_without_kernels_has_single_operators(
    find: Callable[[], Kernels], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KERNELS, "cpu", find)
    assert chosen(torch.float32) == (SINGLE_OPERATORS, f"single operators, {words}")


def test_a_policy_is_computed_with_the_chosen_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary beyond one tile takes the work of the device, also under autocast in a pass with gradients."""
    calls = []

    def counted(*given: Any) -> None:
        calls.append(len(given))
        scan(*given)

    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=generator).requires_grad_() for n in (5, 50))
    targets = torch.randint(50, (5,), generator=generator)
    expected = logprobs.selected_logprobs(hidden, weight, None, targets, 0.7)
    monkeypatch.setattr(logprobs, "TILE_WORDS", 49)
    offer(monkeypatch, OWN._replace(scan=counted))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    name = choice(CPU, torch.float32, 4, 50).name
    calls.clear()
    found = logprobs.selected_logprobs(hidden, weight, None, targets, 0.7)
    assert len(calls) == 2
    assert name.startswith("kernels (right")
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
        grads = [torch.autograd.grad(each.sum(), (hidden, weight), retain_graph=True) for each in (one, other)]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        logprobs.selected_logprobs(hidden, weight, None, targets, 0.7)[0].sum().backward()
    assert len(calls) > 4


def test_the_journal_has_a_name_for_policies_only() -> None:
    assert head_name(small.policy(), CPU) == "single operators"
    assert head_name(small.scorer(), CPU) == ""
