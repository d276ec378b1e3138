"""Settings that several processes cannot combine, as one table.

It is read before processes start, by `posttrain plan` and `posttrain configure`, and while a model is split.
A field of `Setup` that is not known keeps its default, which no rule refuses.

Example:
    >>> refusals(Setup(processes=2, layers=2, lora=True))
    ['POSTTRAIN_TENSOR_PARALLEL = 2 cannot split a model of which only a part is trained, as with `lora`; remove lora or the variable']
    >>> refusals(Setup(processes=2, fsdp=2, lora=True))
    []
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from posttrain.errors import ConfigError
from posttrain.settings import CONTEXT_PARALLEL, TENSOR_PARALLEL

FSDP_INSTEAD = "remove the variable and use an FSDP2 configuration of infra/accelerate"


@dataclass(frozen=True)
class Setup:
    """How a stage's processes share work, and the settings that depend on it.

    Attributes:
        processes: processes of the stage on all hosts.
        layers: processes that split each layer (tensor parallelism).
        context: processes that share the tokens of each row.
        fsdp: version of FSDP that splits the weights, 0 if each process holds whole ones.
        heads: attention heads of the model, 0 if not known; `key_heads`: those with keys and values.
        engine: sampler of the training; None if the stage does not sample while it trains.
    """

    processes: int = 1
    layers: int = 1
    context: int = 1
    fsdp: int = 0
    moment_bits: int = 32
    offload: bool = False
    lora: bool = False
    compile: bool = False
    best_checkpoint: bool = False
    engine: str | None = None
    staleness: int = 0
    experts: bool = False
    heads: int = 0
    key_heads: int = 0

    @property
    def sharded(self) -> bool:
        """Return True if each process holds a part of the weights."""
        return self.processes > 1 and (self.layers > 1 or self.fsdp > 0)

    @property
    def even_layers(self) -> bool:
        """Return True if the heads can be divided by the processes that split each layer."""
        return self.heads % self.layers == 0 and self.key_heads % self.layers == 0

    @property
    def even_rows(self) -> bool:
        """Return True if each process that shares a row gets as many heads as the others; heads with keys may be repeated."""
        keys = self.key_heads % self.context == 0 or self.context % self.key_heads == 0
        return keys and self.heads % self.context == 0


@dataclass(frozen=True)
class Rule:
    """A combination that does not work, and the message that refuses it."""

    applies: Callable[[Setup], bool]
    message: Callable[[Setup], str]


RULES = {
    "layers by some of the processes": Rule(
        lambda s: s.layers not in (1, s.processes),
        lambda s: _uneven_layers(s),
    ),
    "rows by an uneven number": Rule(
        lambda s: s.processes % s.context != 0,
        lambda s: _uneven_rows(s),
    ),
    "FSDP version 1": Rule(
        lambda s: s.processes > 1 and s.fsdp == 1,
        lambda s: "the environment asks for FSDP version 1; set `fsdp_version: 2` in the accelerate configuration",
    ),
    "layers and FSDP2": Rule(
        lambda s: s.layers > 1 and s.fsdp > 0,
        lambda s: (
            f"{TENSOR_PARALLEL} = {s.layers} and an FSDP configuration both split the weights; choose a configuration of"
            " infra/accelerate without FSDP, such as ddp_gpu.yaml, or remove the variable"
        ),
    ),
    "layers and rows": Rule(
        lambda s: s.layers > 1 and s.context > 1,
        lambda s: (
            f"{TENSOR_PARALLEL} = {s.layers} and {CONTEXT_PARALLEL} = {s.context}: processes can share either layers or rows; remove one"
            " of them"
        ),
    ),
    "layers and an adapter": Rule(
        lambda s: s.layers > 1 and s.lora,
        lambda s: (
            f"{TENSOR_PARALLEL} = {s.layers} cannot split a model of which only a part is trained, as with `lora`; remove lora or the"
            " variable"
        ),
    ),
    "layers and experts": Rule(
        lambda s: s.layers > 1 and s.experts,
        lambda s: f"{TENSOR_PARALLEL} = {s.layers} cannot split a mixture of experts; {FSDP_INSTEAD}",
    ),
    "layers and uneven heads": Rule(
        lambda s: s.layers == s.processes and not s.even_layers,
        lambda s: (
            f"{TENSOR_PARALLEL} = {s.layers}: the model's {s.heads} heads, {s.key_heads} of them with keys and values, cannot be divided"
            f" evenly; choose a different number, or {FSDP_INSTEAD}"
        ),
    ),
    "layers and compiled ones": Rule(
        lambda s: s.layers > 1 and s.compile,
        lambda s: (
            f"compute.compile: true is not possible with {TENSOR_PARALLEL} = {s.layers}, which replaces the layers' functions; set"
            " compile: false, or remove the variable"
        ),
    ),
    "layers and moments in 8 bits": Rule(
        lambda s: s.layers > 1 and s.moment_bits == 8,
        lambda s: (
            "optimizer.moment_bits = 8: moments of layers that are split by tensor parallelism are float32 only, since a block would cross"
            " the parts; set optimizer.moment_bits: 32, which divides them by the number of processes, or use FSDP2"
        ),
    ),
    "layers and a different sampler": Rule(
        lambda s: s.layers > 1 and s.engine is not None and (s.engine != "native" or s.staleness > 0),
        lambda s: (
            f"{TENSOR_PARALLEL} = {s.layers} splits each layer over the training processes, and rollouts.engine: {s.engine} with"
            f" staleness: {s.staleness} needs whole weights elsewhere; set engine: native and staleness: 0, or remove the variable"
        ),
    ),
    "split weights and offloaded moments": Rule(
        lambda s: s.sharded and s.offload,
        lambda s: (
            "optimizer.offload: true is only possible for float32 moments of weights that one process holds whole; remove offload, or leave"
            " out FSDP2 and tensor parallelism, which divide the moments by the number of processes"
        ),
    ),
    "split weights and the best checkpoint": Rule(
        lambda s: s.sharded and s.best_checkpoint,
        lambda s: (
            "align.best_checkpoint: not with FSDP2 or tensor parallelism, which hold a part of the weights in each process; use a"
            " configuration without FSDP in POSTTRAIN_ACCELERATE and no POSTTRAIN_TENSOR_PARALLEL, or remove it"
        ),
    ),
    "rows and experts": Rule(
        lambda s: s.context > 1 and s.experts,
        lambda s: (
            f"{CONTEXT_PARALLEL} = {s.context}: the tokens of a mixture of experts cannot be shared by processes here; remove the variable"
        ),
    ),
    "rows and uneven heads": Rule(
        lambda s: s.processes % s.context == 0 and not s.even_rows,
        lambda s: (
            f"{CONTEXT_PARALLEL} = {s.context}: the model's {s.heads} attention heads, {s.key_heads} of them with keys and values, cannot"
            " be divided by it, so processes cannot share a row; choose a divisor of the numbers of heads"
        ),
    ),
    "samples of older weights from servers": Rule(
        lambda s: s.processes > 1 and s.engine == "vllm" and s.staleness > 0,
        lambda s: (
            f"rollouts.staleness = {s.staleness} with engine: vllm needs one training process, and {s.processes} are started; set"
            " staleness: 0, or engine: native"
        ),
    ),
}
"""Combinations that no stage can run, by name."""


def refusals(setup: Setup) -> list[str]:
    """Return the message of each rule that the setup breaks."""
    return [rule.message(setup) for rule in RULES.values() if rule.applies(setup)]


def require(setup: Setup) -> None:
    """Raise ConfigError with all refusals of the setup, one a line."""
    if found := refusals(setup):
        raise ConfigError("\n".join(found))


def _uneven_rows(setup: Setup) -> str:
    """Say how many processes can share each row."""
    if setup.processes == 1:
        return (
            f"{CONTEXT_PARALLEL} = {setup.context}, and the stage runs as one process, which has whole rows; give a configuration of"
            f" {setup.context} processes in POSTTRAIN_ACCELERATE, or remove the variable"
        )
    return (
        f"{CONTEXT_PARALLEL} = {setup.context} must be a divisor of the {setup.processes} processes that train together, since each group"
        " of processes shares its rows; correct it, or remove it"
    )


def _uneven_layers(setup: Setup) -> str:
    if setup.processes == 1:
        return (
            f"{TENSOR_PARALLEL} = {setup.layers}, and the stage runs as one process, which holds whole layers; give a configuration of"
            f" {setup.layers} processes without FSDP in POSTTRAIN_ACCELERATE, or remove the variable"
        )
    return (
        f"{TENSOR_PARALLEL} = {setup.layers}: all {setup.processes} processes of a stage split its layers, or none; set it to"
        f" {setup.processes}, give a configuration of {setup.layers} processes in POSTTRAIN_ACCELERATE, or remove it"
    )
