"""Make the public functions independent of the caller's settings of torch, and refuse models that cannot be trained.

Example:
    Gradients flow although the caller has switched them off, and the caller's settings are as before:

    >>> with torch.no_grad():
    ...     with usual_torch():
    ...         inside = torch.is_grad_enabled()
    ...     inside, torch.is_grad_enabled()
    (True, False)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from posttrain.errors import ConfigError, ModelError

TRAINABLE = (torch.float32, torch.float64)
"""Types in which a small update of a weight is not rounded away."""
SEED_LOCK = threading.Lock()
"""Held while weights are drawn from torch's one global generator."""
_lock = threading.Lock()
_in_training: set[int] = set()
_running = 0
_callers_dtype = torch.float32


@contextmanager
def usual_torch() -> Iterator[None]:
    """Run with gradients on, float32 and the CPU as torch's defaults, whatever the caller has set. The settings come back afterwards.

    The default type belongs to the whole process: the first of several calls in threads sets it, the last one gives it back.
    """
    global _running, _callers_dtype
    with _lock:
        if not _running:
            _callers_dtype = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
        _running += 1
    # a device mode costs time at every call of torch, so it is entered only if another one is on
    on_cpu = torch.get_default_device().type == "cpu"
    try:
        with torch.inference_mode(False), torch.enable_grad(), nullcontext() if on_cpu else torch.device("cpu"):
            yield
    finally:
        with _lock:
            _running -= 1
            if not _running:
                torch.set_default_dtype(_callers_dtype)


@contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """Mark the model as being trained. Raises ConfigError if it is already, e.g. by a reward function that trains."""
    with _lock:
        busy = id(model) in _in_training
        _in_training.add(id(model))
    if busy:
        raise ConfigError(
            "train: this model is being trained at the moment; wait until that ends, or train a copy: copy.deepcopy(model)"
        )
    try:
        yield
    finally:
        _in_training.discard(id(model))


def is_adapted(model: nn.Module) -> bool:
    """Return True if layers of the model hold an adapter of peft, which `save` and `load` would not know."""
    return any(".base_layer." in name for name, _ in model.named_parameters())


def check_trainable(model: nn.Module) -> None:
    """Raise ModelError unless the weights exist, are of a type that takes small updates, and some of them may change.

    Raises:
        ConfigError: the call runs inside `torch.autocast`.
    """
    weights = list(model.parameters())
    if any(weight.is_meta for weight in weights):
        raise ModelError(
            "the model to train has weights on the device `meta`, which holds no values; load it again, outside of"
            " torch.device('meta')"
        )
    if is_adapted(model):
        raise ModelError(
            "the model to train holds an adapter, which no folder would keep; merge it: peft's merge_and_unload()"
        )
    if others := sorted({str(weight.dtype) for weight in weights if weight.dtype not in TRAINABLE}):
        raise ModelError(
            f"the model to train has weights of {', '.join(others)}, in which small updates are rounded away; call model.lm.float()"
            " first, as load(...) does"
        )
    if not any(weight.requires_grad for weight in weights):
        raise ModelError(
            "the model to train has no weight with requires_grad, so nothing would change; call model.lm.requires_grad_(True)"
        )
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled(weights[0].device.type):
        raise ConfigError(
            "train: it was called inside torch.autocast, under which log-probabilities are rounded; call it outside"
        )
