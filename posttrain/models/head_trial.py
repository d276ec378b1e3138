"""Choose the functions that compute the head on a device by a trial on one tile: kernels of the device, or single operators.

The trial runs before the first use. Kernels are taken if their numbers are those of single operators and they take less time. The same is
done for the product that adds a tile to the gradients. In deterministic mode the clock has no say: kernels are taken if their numbers are
right. What the clock has chosen is kept with a run's checkpoints (posttrain/choices.py).

A kernel that does not compile, such as for lack of a C compiler, costs speed and not the run.

Example:
    >>> choice(torch.device("cpu"), torch.float32, hidden=64, vocabulary=151_936).name
    'single operators'
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from posttrain.choices import changes, choose, chosen, name_of
from posttrain.models.head_tiles import SINGLE_OPERATORS, RowGradients, Sums, TileWork
from posttrain.models.kernel_trial import FAULTS
from posttrain.models.refusals import counts, refused
from posttrain.text import reason_of

TOKENS, WORDS, REPEATS = 2048, 2**14, 5
"""Tokens and most words of the trial's tile, and timed calls of which the median counts."""
NEAR = 1e-5
"""Largest difference of sums over words, as a share of the largest normaliser."""
NEAR_GRADIENT = 3e-4
"""Largest difference of a logit's gradient, as a share of its probability, next to two roundings of the gradient."""


class Kernels(NamedTuple):
    """A device's own work on tiles, its name, the dtypes that it takes, and errors by which it refuses, next to PyTorch's."""

    name: str
    work: TileWork
    dtypes: frozenset[torch.dtype]
    faults: tuple[type[Exception], ...] = ()


class Choice(NamedTuple):
    """The work that was chosen, and its name with the times or the reason, for the log."""

    work: TileWork
    name: str


def _triton() -> Kernels:
    from posttrain.models import head_kernels

    return Kernels("Triton's kernels", head_kernels.WORK, head_kernels.DTYPES, head_kernels.FAULTS)


KERNELS: dict[str, Callable[[], Kernels]] = {"cuda": _triton}
"""The kernels of each kind of device; other devices use single operators."""


def tile_work(hidden: Tensor, weight: Tensor, product: torch.dtype) -> TileWork:
    """Return the functions that compute the head of these tensors, given the dtype of its product."""
    plain = type(hidden) is Tensor and type(weight) in (Tensor, nn.Parameter)
    if hidden.device.type not in KERNELS or not plain:
        return SINGLE_OPERATORS
    return choice(hidden.device, product, hidden.shape[1], len(weight)).work


def choice(device: torch.device, product: torch.dtype, hidden: int, vocabulary: int) -> Choice:
    """Return the choice for a head [vocabulary, hidden] on a device. Each kind is tried once in a process."""
    if device.type not in KERNELS:
        return Choice(SINGLE_OPERATORS, "single operators")
    fixed = torch.are_deterministic_algorithms_enabled()
    return _choice(KERNELS[device.type], device, product, hidden, min(vocabulary, WORDS), fixed, changes())


@cache
def _choice(
    find: Callable[[], Kernels],
    device: torch.device,
    product: torch.dtype,
    hidden: int,
    words: int,
    fixed: bool,
    _: int,
) -> Choice:
    try:
        kernels = find()
    except (ImportError, RuntimeError) as error:
        if not counts(error):
            raise
        return Choice(SINGLE_OPERATORS, f"single operators, because there are no kernels here ({reason_of(error)})")
    if product not in kernels.dtypes:
        return Choice(SINGLE_OPERATORS, f"single operators, because {kernels.name} do not take {product}")
    # the first use may be in a forward pass under autocast, with gradients
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        taken, reason = _verdict(_Tile(device, product, words), kernels, device, fixed)
        work = kernels.work if taken else SINGLE_OPERATORS
        name = f"{kernels.name if taken else 'single operators'} ({reason})"
        adder = SINGLE_OPERATORS.add_product
        if product != torch.float32:
            taken, reason = _verdict(_Addition(device, product, words, hidden), kernels, device, fixed)
            adder = kernels.work.add_product if taken else adder
            rounded = "in float32" if taken else f"after rounding to {str(product).removeprefix('torch.')}"
            name += f"; products added {rounded} ({reason})"
    return Choice(work._replace(add_product=adder), name)


def _verdict(trial: _Tile | _Addition, kernels: Kernels, device: torch.device, fixed: bool) -> tuple[bool, str]:
    """Return whether the kernels are taken, with the times or the reason."""
    ours, theirs = SINGLE_OPERATORS, kernels.work
    try:
        fault = trial.fault_of(theirs)
    except (*FAULTS, *kernels.faults) as error:
        if not counts(error):
            raise
        fault = refused(error)
    if fault:
        return False, f"{kernels.name} cannot be used here: {fault}"
    if fixed:
        return True, "right; deterministic mode does not time them"
    name = f"{name_of(device)}: {kernels.name} for {trial.name}"
    if (known := chosen(name)) is not None:
        return bool(known), "as chosen by the clock when this run began"
    own, other = (milliseconds(lambda work=work: trial.run(work), device) for work in (theirs, ours))  # type: ignore[misc]
    choose(name, own < other)
    return own < other, f"{own:.3g} ms a tile, single operators {other:.3g} ms"


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a call after a first one."""
    run()
    timed = _on_gpu if device.type == "cuda" else _by_clock
    return sorted(timed(run) for _ in range(REPEATS))[REPEATS // 2]


def _on_gpu(run: Callable[[], object]) -> float:
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    run()
    ended.record()
    ended.synchronize()
    return float(started.elapsed_time(ended))


def _by_clock(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


class _Tile:
    """A tile of logits in which words of all places are the most probable one of some row, so that none can be missed unseen."""

    def __init__(self, device: torch.device, dtype: torch.dtype, words: int) -> None:
        self.name = f"tiles of {words} words in {dtype}"
        generator = torch.Generator(device).manual_seed(0)
        given: dict[str, Any] = {"generator": generator, "device": device}
        product, row = torch.randn(TOKENS, words, **given), torch.arange(TOKENS, device=device)
        # from the last word backwards
        product[row, words - 1 - row * 97 % words] += 15
        self.product = product.to(dtype)
        # an eighth of the targets are in tiles before this one, an eighth in tiles after it
        self.columns = torch.randint(-max(1, words // 6), words + max(1, words // 6), (TOKENS,), **given)
        self.temperature = torch.rand(TOKENS, **given) + 0.5
        self.scale, self.bonus = torch.randn(TOKENS, **given), 0.1 * torch.randn(TOKENS, **given)

    def run(self, work: TileWork) -> tuple[Sums, Tensor]:
        """Return the sums after the tile, and the gradient of its logits if these are all words."""
        sums = Sums.start(TOKENS, self.scale)
        work.scan(self.product.clone(), self.columns, self.temperature, sums)
        rows = RowGradients(sums.normaliser(), sums.entropy(), self.scale, self.bonus)
        return sums, work.differentiate(self.product.clone(), self.columns, self.temperature, rows)

    def fault_of(self, work: TileWork) -> str:
        """Return how the results differ from those of single operators; empty if they do not."""
        (found, gradient), (expected, right) = self._named(work), self._named(SINGLE_OPERATORS)
        near = NEAR * expected["normalisers"].abs().max()
        faults = [_beyond(name, found[name], value, near) for name, value in expected.items()]
        p = (self.product.float() / self.temperature[:, None]).softmax(-1)
        precision = torch.finfo(gradient.dtype)
        allowed = p.mul_(NEAR_GRADIENT).add_(right.abs(), alpha=2 * precision.eps).add_(precision.tiny * precision.eps)
        faults.append(_beyond("gradients", gradient.float(), right, allowed))
        return next((fault for fault in faults if fault), "")

    def _named(self, work: TileWork) -> tuple[dict[str, Tensor], Tensor]:
        """Return the rows' results after a second tile, and the gradient of the first one."""
        sums, gradient = self.run(work)
        work.scan(self.product[:, : len(self.product[0]) // 2 + 1].contiguous(), self.columns, self.temperature, sums)
        return {"logits": sums.selected, "normalisers": sums.normaliser(), "entropies": sums.entropy()}, gradient


class _Addition:
    """The product that adds a tile to the gradient of the head's matrix, [words, hidden] in float32."""

    def __init__(self, device: torch.device, dtype: torch.dtype, words: int, hidden: int) -> None:
        self.name = f"sums of products in {dtype}, {words} by {hidden}"
        generator = torch.Generator(device).manual_seed(0)
        shapes = ((words, hidden), (TOKENS, words), (TOKENS, hidden))
        total, tile, states = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
        self.total, self.tile, self.states = total, tile.to(dtype), states.to(dtype)

    def run(self, work: TileWork) -> Tensor:
        """Return the total after one addition to it, which stays."""
        work.add_product(self.total, self.tile.T, self.states)
        return self.total

    def fault_of(self, work: TileWork) -> str:
        """Return how the sum differs from that of single operators; empty if it does not."""
        start = self.total.clone()
        found, expected = (self._from(start, each) for each in (work, SINGLE_OPERATORS))
        allowed = 2 * torch.finfo(self.tile.dtype).eps * (expected - start).abs().max()
        return _beyond("sums of products", found, expected, allowed)

    def _from(self, start: Tensor, work: TileWork) -> Tensor:
        self.total.copy_(start)
        return self.run(work).clone()


def _beyond(name: str, found: Tensor, expected: Tensor, allowed: Tensor) -> str:
    """Return a reason if a difference is more than allowed, or not a number."""
    away = (found - expected).abs()
    if bool((away <= allowed).all()):
        return ""
    return f"its {name} differ from those of single operators by up to {float(away.max()):.2g}"
