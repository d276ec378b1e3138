"""Attention by offsets: the layout, the merge of a shared prompt, its gradient, whole models, and PyTorch's own operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from posttrain.data.batches import collate
from posttrain.data.layout import Family, attended_parts, ending, predicting
from posttrain.data.offsets import OFFSETS, ByOffsets, Segment, by_offsets
from posttrain.data.tokens import Tokens
from posttrain.models.inference import token_logprobs
from posttrain.models.kernels import PLAIN, Scores
from posttrain.models.packed import _attended, attention_name
from posttrain.models.varlen import KERNELS, varlen_attention
from tests.data.test_layout import seen
from tests.models import small
from tests.models.varlen_reference import REFERENCE
from tests.training.cases import case, probe

PROMPT = (5, 6, 7, 8)
ROWS = [
    Tokens(PROMPT, (9, 2)),
    Tokens((4, 4, 4), (2,)),
    Tokens(PROMPT, (3, 3, 3)),
    Tokens((5,), ()),
    Tokens((6, 7), (1,) * 9),
]
MASKS = "scaled dot-product attention with masks"
a_prompt = st.sampled_from([(3,), (4, 5), (5, 6, 7, 8), (6,) * 9, (7,) * 30])
batches = st.lists(st.builds(Tokens, a_prompt, st.lists(st.just(9), max_size=14).map(tuple)), min_size=1, max_size=9)


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU take offsets, in any dtype, through the reference kernel."""
    monkeypatch.setitem(KERNELS, "cpu", lambda: REFERENCE)
    monkeypatch.setitem(OFFSETS, "cpu", frozenset({torch.float32}))


def visible(layout: ByOffsets) -> dict[int, list[int]]:
    """Return the tokens that each query sees, read from the offsets; no token is seen twice."""
    found: dict[int, list[int]] = {}
    own, shared, window = layout.own, layout.shared, layout.window
    for query, keys in _pairs(own.query_starts, own.key_starts):
        for i in range(query.start, query.stop):
            last = keys.stop - (query.stop - 1 - i)  # causal, aligned at the ends
            found[int(own.queries[i])] = own.keys[keys.start : last].tolist()[0 if window is None else -window :]
    for query, keys in _pairs(shared.query_starts, shared.key_starts) if shared else ():
        for i in range(query.start, query.stop):
            token = int(own.queries[shared.queries[i]])
            found[token] = shared.keys[keys].tolist() + found[token]
    return {token: sorted(keys) for token, keys in found.items()}


def _pairs(query_starts: Tensor, key_starts: Tensor) -> list[tuple[slice, slice]]:
    q, k = query_starts.tolist(), key_starts.tolist()
    return [(slice(q[i], q[i + 1]), slice(k[i], k[i + 1])) for i in range(len(q) - 1)]


@given(rows=batches)
@settings(max_examples=60, deadline=None)
def test_offsets_show_each_token_the_keys_that_the_masks_show(rows: list[Tokens]) -> None:
    families = collate(rows).families
    for find in (lambda *a: attended_parts(*a), lambda *a: predicting(*a).parts, lambda *a: ending(*a).parts):
        masked, by = find(families), find(families, True)
        assert [visible(layout) for layout in by] == ([seen(masked)] if masked else [])
        for layout in by:
            assert layout.in_order == (
                layout.own.queries.tolist() == layout.own.keys.tolist() == list(range(len(layout.own.keys)))
            )


def states(tokens: int, dtype: torch.dtype = torch.float64, size: int = 8) -> list[Tensor]:
    """Four heads of queries over two of keys and values, and a gradient from above."""
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(tokens, heads, size, generator=generator, dtype=torch.float64).mul_(2).to(dtype).requires_grad_()
        for heads in (4, 2, 2)
    ]


def written_out(rows: list[Tokens], query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """Attention of each token of a flat batch by itself, over the keys of its row up to it, as the formula says."""
    outputs = torch.zeros_like(query)
    sinks = torch.full((4,), -torch.inf, dtype=query.dtype) if scores.sinks is None else scores.sinks
    for token, keys in seen(attended_parts(collate(rows).families)).items():
        keys = keys if scores.window is None else keys[-scores.window :]
        for head in range(4):
            products = key[keys, head // 2] @ query[token, head] * (scores.scaling or query.shape[-1] ** -0.5)
            if scores.softcap is not None:
                products = scores.softcap * torch.tanh(products / scores.softcap)
            weights = torch.cat([products, sinks[head : head + 1]]).softmax(0)[:-1]
            outputs[token, head] = weights @ value[keys, head // 2]
    return outputs


@pytest.mark.parametrize("offsets", [True, False])
@pytest.mark.parametrize(
    "scores",
    [
        Scores(window=3),
        Scores(0.7, window=2),
        Scores(sinks=torch.tensor([0.3, -2.0, 5.0, 1.0])),
        Scores(window=6, sinks=torch.tensor([0.3, -2.0, 5.0, 1.0])),
        Scores(softcap=1.5),
        Scores(0.7, 4, 2.0, torch.tensor([0.3, -2.0, 5.0, 1.0])),
    ],
)
@pytest.mark.usefixtures("reference")
def test_windows_soft_caps_and_sinks_are_those_of_the_formula(scores: Scores, offsets: bool) -> None:
    batch = collate(ROWS)
    found = {}
    for name in ("formula", "every token", "predicting"):
        given = states(len(batch.input_ids))
        sinks = None if scores.sinks is None else scores.sinks.double().requires_grad_()
        own = scores._replace(sinks=sinks)
        parts = (
            attended_parts(batch.families, offsets)
            if name == "every token"
            else predicting(batch.families, offsets).parts
        )
        tokens = torch.tensor(sorted(seen(predicting(batch.families).parts)))
        if name == "formula":
            whole = written_out(ROWS, *given, own)
        else:
            outputs, order = _attended(parts, *given, own)
            whole = outputs if order is None else torch.zeros_like(given[0]).index_copy(0, order, outputs)
        outer = torch.randn(len(tokens), 4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (whole[tokens] * outer).sum().backward()
        leaves = given if sinks is None else [*given, sinks]
        found[name] = [whole[tokens].detach(), *(leaf.grad for leaf in leaves)]
    for name in ("every token", "predicting"):
        for ours, truth in zip(found[name], found["formula"], strict=True):
            assert truth.abs().max() > 0.1
            assert torch.allclose(ours, truth, atol=1e-12, rtol=0), name


@pytest.mark.parametrize("window", [1, 2, 5, 9])
def test_a_window_shows_the_last_keys_of_a_row_and_shares_no_prompt(window: int) -> None:
    families = collate(ROWS).families
    whole = seen(attended_parts(families))
    for find in (lambda *a: attended_parts(*a), lambda *a: predicting(*a).parts, lambda *a: ending(*a).parts):
        (layout,) = find(families, True)
        limited = layout.within(window)
        assert layout.within(window) is limited, "made once a batch"
        assert limited.shared is None
        # no key further away than a window is gathered
        assert limited.own.longest_key <= limited.own.longest_query + window - 1
        assert visible(limited) == {token: whole[token][-window:] for token in visible(layout)}
        assert layout.within(13) is layout.within(None) is layout, "the longest row has 11 tokens"


@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("find", [None, predicting, ending])
@pytest.mark.usefixtures("reference")
def test_the_merged_halves_and_their_gradient_are_those_of_whole_rows(find: Any, scaling: float | None) -> None:
    families = collate(ROWS).families
    masked, offsets = (
        attended_parts(families, by) if find is None else find(families, by).parts for by in (False, True)
    )
    assert offsets[0].shared is not None
    tokens = len(collate(ROWS).input_ids)
    outputs, gradients = [], []
    for parts in (masked, offsets):
        given = states(tokens)
        found, order = _attended(parts, *given, Scores(scaling))
        whole = found if order is None else torch.zeros(tokens, 4, 8, dtype=torch.float64).index_copy(0, order, found)
        outer = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (whole * outer).sum().backward()
        outputs.append(whole.detach())
        gradients.append([part.grad for part in given])
    assert torch.allclose(*outputs, atol=1e-12, rtol=0)
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.abs().max() > 0.1
        assert torch.allclose(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.usefixtures("reference")
def test_the_gradient_is_the_derivative() -> None:
    layout = by_offsets([Segment(range(0), range(3)), *(Segment(range(3), own) for own in (range(3, 5), range(5, 6)))])
    given = [part.detach()[..., :3].requires_grad_() for part in states(6)]
    assert torch.autograd.gradcheck(lambda *s: varlen_attention(*s, layout), given)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *s: varlen_attention(*s[:3], layout, Scores(None, 2, None, s[3])), [*given, sinks]
    )


@pytest.mark.usefixtures("reference")
def test_a_model_gives_the_same_logprobs_and_gradient_by_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small.policy()
    by_offset = token_logprobs(policy, ROWS, 10_000)
    made = case("grpo")
    ours = probe(made.model(), 40)
    metrics = ours.update(made.rows, made.objective)
    monkeypatch.setitem(OFFSETS, "cpu", frozenset())
    theirs = probe(made.model(), 40)
    assert metrics == pytest.approx(theirs.update(made.rows, made.objective), rel=1e-4, abs=1e-6)
    for name, gradient in theirs.gradient.items():
        assert torch.allclose(ours.gradient[name], gradient, atol=1e-5 * float(gradient.abs().max()) + 1e-9), name
    masked = token_logprobs(policy, ROWS, 10_000)
    assert all(abs(a.logprobs - b.logprobs).max(initial=0) < 1e-5 for a, b in zip(by_offset, masked, strict=True))


@pytest.mark.usefixtures("reference")
def test_heads_that_the_kernel_does_not_take_are_computed_with_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Any:
        raise AssertionError("the kernel takes multiples of 8 only")

    monkeypatch.setitem(KERNELS, "cpu", refused)
    families = collate(ROWS).families
    given = [part.detach() for part in states(len(collate(ROWS).input_ids), torch.float32, size=12)]
    by_mask, order = _attended(attended_parts(families), *given, PLAIN)
    fallen_back, its_order = _attended(attended_parts(families, True), *given, PLAIN)
    assert order is not None
    assert its_order is not None
    assert torch.equal(by_mask, fallen_back)
    assert torch.equal(order, its_order)


def test_pytorchs_operators_accept_what_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes, dtypes and the number of arguments, on meta tensors: the installed PyTorch has the signature that is called."""
    monkeypatch.setitem(KERNELS, "meta", KERNELS["cuda"])
    (layout,) = attended_parts((Family(range(4), (range(4, 6), range(6, 9))),), True)
    assert isinstance(layout, ByOffsets)
    moved = layout.with_tensors([tensor.to("meta") for tensor in layout.tensors()])
    given = [torch.empty(9, heads, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for heads in (4, 2, 2)]
    given.append(torch.empty(4, dtype=torch.bfloat16, device="meta", requires_grad=True))
    for scores in (Scores(sinks=given[3]), Scores(window=4, sinks=given[3])):
        outputs = varlen_attention(*given[:3], moved, scores)
        assert (outputs.shape, outputs.dtype) == ((9, 4, 64), torch.bfloat16)
        gradients = torch.autograd.grad(outputs.sum(), given)
        assert [(g.shape, g.dtype) for g in gradients] == [(s.shape, s.dtype) for s in given]


@pytest.mark.parametrize(
    ("device", "autocast", "reason", "name"),
    [
        ("cuda", True, "", "FlashAttention by offsets"),
        ("cuda", True, "an old GPU", f"{MASKS}, because FlashAttention by offsets cannot be used here (an old GPU)"),
        ("cuda", False, "", MASKS),
        ("cpu", True, "", MASKS),
    ],
)
def test_the_attention_is_named(
    device: str, autocast: bool, reason: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posttrain.models.packed.refusal_of", lambda *_: reason)
    # `torch.autocast("cuda")` does nothing without a GPU
    torch.set_autocast_enabled(device, autocast)
    try:
        assert attention_name(small.policy(), torch.device(device)) == name
        padded = small.language_model()
        padded.set_attn_implementation("eager")
        assert attention_name(padded, torch.device(device)) == "the model's own, over padded rows"
    finally:
        torch.set_autocast_enabled(device, False)


def test_layers_for_which_the_kernel_is_refused_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = ["no windows", ""]
    monkeypatch.setattr("posttrain.models.packed.refusal_of", lambda *given: reasons[0 if given[3].window else 1])
    policy = small.policy()
    policy.lm.config.layer_types = ["sliding_attention", "full_attention"]
    torch.set_autocast_enabled("cuda", True)
    try:
        found = attention_name(policy, torch.device("cuda"))
        reasons[1] = "no kernel"
        both = attention_name(policy, torch.device("cuda"))
    finally:
        torch.set_autocast_enabled("cuda", False)
    of_windows = f"{MASKS} in layers with a window, for which it cannot be used here (no windows)"
    assert found == f"FlashAttention by offsets; {of_windows}"
    assert both == f"{found}; {MASKS} in layers without a window, for which it cannot be used here (no kernel)"


def test_a_policy_on_a_cpu_keeps_its_masks() -> None:
    batch = collate(ROWS).to(torch.device("cpu"))
    assert not any(isinstance(part, ByOffsets) for part in (*batch.parts, *batch.predicting().parts))


@pytest.mark.usefixtures("reference")
def test_no_masks_are_made_for_a_device_that_takes_offsets() -> None:
    """They are quadratic in the rows' length, and took longer than an update of rows of 8,192 tokens may take on a GPU."""
    laid_out = collate(ROWS)
    moved = laid_out.to(torch.device("cpu"))
    assert isinstance(moved.parts[0], ByOffsets)
    assert (laid_out.layouts, laid_out.found) == ([], {})
