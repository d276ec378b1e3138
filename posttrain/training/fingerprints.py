"""Describe functions and weights, so that a resumed run can be compared with the one that wrote its checkpoint.

Example:
    The name of a function and its comments do not matter, its code and its settings do:

    >>> from functools import partial
    >>> describe(lambda n, k: n * k) == describe(lambda n, k: n * k), describe(lambda n, k: n * k) == describe(lambda n, k: n + k)
    (True, False)
    >>> describe(partial(max, 1)) == describe(partial(max, 2))
    False
"""

from __future__ import annotations

import dis
import functools
import hashlib
import types
from collections.abc import Callable
from dataclasses import is_dataclass
from datetime import date, time
from numbers import Number
from pathlib import PurePath
from typing import Any
from uuid import UUID

import torch
from torch import nn

_PLAIN = (str, bytes, int, float, complex, bool, type(None), types.EllipsisType)


def describe(function: Any) -> list[Any]:
    """Return a description of a function's own code: bytecode, constants, defaults, and values that it encloses.

    The functions that it calls, and the attributes of an object, which may count calls, are not seen. The fields of a frozen dataclass are.
    """
    if isinstance(function, functools.partial):
        settings = sorted(function.keywords.items())
        return [
            "partial",
            describe(function.func),
            [_value(a) for a in function.args],
            [[n, _value(v)] for n, v in settings],
        ]
    if isinstance(function, types.MethodType):
        return ["method", describe(function.__func__), _frozen(function.__self__)]
    function = getattr(function, "__wrapped__", function)
    if isinstance(function, types.FunctionType):
        given = [_value(v) for v in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())]
        return [_code(function.__code__), given, _enclosed(function)]
    kind = type(function)
    called: Callable[..., Any] | None = getattr(kind, "__call__", None)  # noqa: B004, the class's own method
    own = describe(called) if isinstance(called, types.FunctionType) else []
    return [getattr(function, "__qualname__", kind.__qualname__), own, _frozen(function)]


def weights_digest(model: nn.Module) -> str:
    """Return a digest of all weights and buffers of a model, in any type and on any device."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _code(code: types.CodeType) -> list[Any]:
    constants = [_code(one) if isinstance(one, types.CodeType) else _value(one) for one in code.co_consts]
    return [code.co_code.hex(), constants, list(code.co_names), list(code.co_varnames)]


def _enclosed(function: types.FunctionType) -> list[Any]:
    """Return the enclosed variables that the function does not assign itself, such as a target; a counter is left out."""
    assigned = {step.argval for step in dis.get_instructions(function.__code__) if step.opname == "STORE_DEREF"}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return [[name, _content(cell)] for name, cell in cells if name not in assigned]


def _content(cell: types.CellType) -> Any:
    try:
        value = cell.cell_contents
    except ValueError:  # not assigned yet
        return None
    return describe(value) if isinstance(value, types.FunctionType | functools.partial) else _value(value)


def _frozen(value: Any) -> Any:
    frozen = is_dataclass(value) and type(value).__dataclass_params__.frozen
    return repr(value) if frozen else type(value).__qualname__


def _value(value: Any) -> Any:
    """Return plain values and collections of them as text, other objects by their type."""
    if isinstance(value, tuple | list | frozenset | set):
        parts = [_value(one) for one in value]
        return [type(value).__name__, sorted(map(repr, parts)) if isinstance(value, frozenset | set) else parts]
    if isinstance(value, dict):
        return ["dict", [[_value(name), _value(one)] for name, one in value.items()]]
    if isinstance(value, types.FunctionType | functools.partial):
        return describe(value)
    if isinstance(value, _PLAIN):
        return repr(value)
    return plain(value) or _frozen(value)


def plain(value: Any) -> list[Any] | None:
    """Return type and content of an array, a number, a date, bytes or a path; None for any other object, whose text may hold an address.

    Example:
        >>> plain(torch.tensor([0.5])), plain(object())
        (['Tensor', 'torch.float32', [0.5]], None)
    """
    kind = type(value).__name__
    if callable(getattr(value, "tolist", None)) and not isinstance(value, type):
        return [kind, str(getattr(value, "dtype", "")), value.tolist()]
    return [kind, str(value)] if isinstance(value, Number | date | time | bytes | UUID | PurePath) else None
