"""The kernel of a device is tried before its first use. Attention with masks computes in place of one that is absent or wrong."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from posttrain.data.batches import collate
from posttrain.data.layout import attended_parts
from posttrain.data.tokens import Tokens
from posttrain.models import flash, refusals
from posttrain.models.kernel_trial import refusal_of
from posttrain.models.kernels import PLAIN, Scores
from posttrain.models.packed import _attended
from posttrain.models.varlen import KERNELS, Kernel
from tests.models import varlen_reference as reference

CPU, SINKS = torch.device("cpu"), torch.zeros(4)
Forward = tuple[Tensor, Tensor, Tensor]


def not_causal(*given: Any) -> Forward:
    return reference.forward(*given[:7], False, given[8], [-1, -1])


def without_offsets(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, key_starts: Tensor, *rest: Any
) -> Forward:
    ends = starts[[0, -1]], key_starts[[0, -1]]
    return reference.forward(query, key, value, *ends, len(query), len(key), *rest[2:])


def with_a_wrong_normaliser(*given: Any) -> Forward:
    output, normaliser, state = reference.forward(*given)
    return output, normaliser + 0.5, state


def not_a_number(*given: Any) -> Forward:
    output, normaliser, state = reference.forward(*given)
    return output.clone().fill_(torch.nan), normaliser, state


def for_newer_devices(*_: Any) -> Forward:
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nException raised from mha_fwd")


def without_gradient_of_keys(*given: Any) -> tuple[Tensor, ...]:
    found = reference.backward(*given)
    return found[0], torch.zeros_like(found[1]), found[2]


WRONG: dict[str, tuple[Callable[..., Any], Callable[..., Any], str]] = {
    "not causal": (not_causal, reference.backward, "it differs from attention with masks by"),
    "without offsets": (without_offsets, reference.backward, "it differs"),
    "normaliser": (with_a_wrong_normaliser, reference.backward, "it differs"),
    "not a number": (not_a_number, reference.backward, "it differs from attention with masks by nan"),
    "old device": (
        for_newer_devices,
        reference.backward,
        "RuntimeError: FlashAttention only supports Ampere GPUs or newer.",
    ),
    "gradient": (reference.forward, without_gradient_of_keys, "it differs"),
    "other signature": (lambda query: query, reference.backward, "TypeError: "),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scores", [PLAIN, Scores(window=4), Scores(sinks=SINKS), Scores(window=4, sinks=SINKS)])
def test_a_right_kernel_is_used(scores: Scores, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "cpu", lambda: reference.REFERENCE)
    assert refusal_of(CPU, dtype, (4, 2, 8), scores) == ""


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_kernel_is_named_and_masks_compute_instead(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, backward, words = WRONG[fault]
    monkeypatch.setitem(KERNELS, "cpu", lambda: Kernel(forward, backward))
    assert refusal_of(CPU, torch.float32, (4, 2, 8)).startswith(words)
    batch = collate([Tokens((5, 6), (7, 8)), Tokens((5, 6), (9,))])
    states = [
        torch.randn(len(batch.input_ids), heads, 8, generator=torch.Generator().manual_seed(heads))
        for heads in (4, 2, 2)
    ]
    found, expected = (_attended(attended_parts(batch.families, by), *states, PLAIN)[0] for by in (True, False))
    assert torch.equal(found, expected)


def raising(error: Exception) -> Callable[..., Forward]:
    def forward(*_: Any) -> Forward:
        raise error

    return forward


def with_a_false_assertion(*_: Any) -> Forward:
    """Fail in a line of this package."""
    code = compile("assert not 'as expected'", str(refusals.PACKAGE / "models" / "kernel.py"), "exec")
    return eval(code)  # type: ignore[no-any-return]


ENDS: dict[str, tuple[Callable[..., Any], str]] = {
    "memory": (raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")), "CUDA out of memory"),
    "memory of the driver": (raising(RuntimeError("CUDA error: out of memory")), "out of memory"),
    "memory of cuBLAS": (
        raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x")),
        "ALLOC_FAILED",
    ),
    "memory of the machine": (raising(MemoryError("cannot allocate")), "cannot allocate"),
    "lost device": (raising(RuntimeError("CUDA error: an illegal memory access was encountered")), "illegal memory"),
    "own assertion": (with_a_false_assertion, "^$"),
}


@pytest.mark.parametrize("fault", ENDS)
def test_errors_that_masks_would_only_hide_end_the_run(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, words = ENDS[fault]
    monkeypatch.setitem(KERNELS, "cpu", lambda: Kernel(forward, reference.backward))
    with pytest.raises((RuntimeError, MemoryError, AssertionError), match=words):
        refusal_of(CPU, torch.float32, (4, 2, 8))


def test_a_refusal_names_the_line_that_called_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "cpu", lambda: Kernel(raising(AssertionError("head size")), reference.backward))
    reason = refusal_of(CPU, torch.float32, (4, 2, 8))
    assert re.fullmatch(r"AssertionError: head size, at posttrain/models/varlen\.py:\d+", reason)


def test_hooks_of_recomputed_layers_do_not_run_in_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def recompute(_: object) -> Tensor:
        raise AssertionError("the backward pass of the trial has started that of the model")

    monkeypatch.setitem(KERNELS, "cpu", lambda: reference.REFERENCE)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, recompute), torch.no_grad():
        assert refusal_of(CPU, torch.float32, (2, 2, 8)) == ""


@dataclasses.dataclass
class Versions:
    """PyTorch's choice of versions on a GPU."""

    chosen: str | None = None

    def use(self, name: str) -> None:
        self.chosen = name

    def restore(self) -> None:
        self.chosen = None


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Versions:
    made = Versions()
    monkeypatch.setattr(nn.attention, "activate_flash_attention_impl", made.use)
    monkeypatch.setattr(nn.attention, "restore_flash_attention_impl", made.restore)
    monkeypatch.setattr(nn.attention, "current_flash_attention_impl", lambda: made.chosen)
    monkeypatch.setattr(flash, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return made


def test_hopper_takes_version_3_until_its_trial_fails(versions: Versions, monkeypatch: pytest.MonkeyPatch) -> None:
    flash.use_newest()
    assert (versions.chosen, flash.version()) == ("FA3", " 3")

    def forward(*given: Any) -> Forward:
        return not_causal(*given) if versions.chosen else reference.forward(*given)

    monkeypatch.setitem(KERNELS, "cpu", lambda: Kernel(forward, reference.backward))
    assert refusal_of(CPU, torch.float32, (4, 2, 8)) == ""
    assert (versions.chosen, flash.version()) == (None, "")


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        (torch.cuda, "get_device_capability", lambda: (8, 0)),
        (torch.cuda, "is_available", lambda: False),
        (flash, "find_spec", lambda _: None),
        (nn.attention, "activate_flash_attention_impl", None),
    ],
)
def test_elsewhere_version_2_stays(
    versions: Versions, place: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, name, value)
    flash.use_newest()
    assert versions.chosen is None


def test_a_package_that_does_not_fit_leaves_version_2(versions: Versions, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        versions.use(name)
        raise ImportError("undefined symbol")

    monkeypatch.setattr(nn.attention, "activate_flash_attention_impl", broken)
    flash.use_newest()
    assert versions.chosen is None
