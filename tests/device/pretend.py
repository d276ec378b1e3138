"""A pretend accelerator: its tensors report a separate device, compute on the CPU, refuse to meet CPU tensors, and count costs of a GPU.

A GPU runs ahead of the program until the program asks for a value. This module counts those waits (`syncs`), copies between the host and
the device (`copies`) and started kernels (`launches`) per line of the project's code, without a GPU. A copy to the device waits as well
unless it is asked not to (`non_blocking`): CUDA then first finishes everything before it.

It is a Python backend on PyTorch's PrivateUse1 device: a dispatch mode unwraps tensors, runs the operator on the CPU and wraps the result.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
FREE_BYTES = 2**20
"""Memory that the device says it has left."""
ROOT = Path(__file__).parents[2]
PACKAGES = tuple(f"{ROOT / name}/" for name in ("posttrain", "pipelines"))
MOVES = ("posttrain/data/transfer.py", "posttrain/data/batches.py")
WAIT_LATER = ("posttrain/training/host_optimizer.py",)
"""Files that wait for their copies to the host before they read them."""
PIN = ("posttrain/data/transfer.py", *WAIT_LATER)
"""Files that copy from pinned memory. CUDA waits for a copy from other memory, whatever it is asked."""
aten = torch.ops.aten
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "allclose", "is_nonzero", "_unique2", "unique_consecutive",
         "unique_dim", "unique_dim_consecutive", "bincount", "multinomial", "embedding_renorm_", "_linalg_check_errors", "linalg_cholesky",
         "cholesky", "linalg_inv", "linalg_solve", "linalg_eigh", "linalg_eig", "linalg_lstsq"}  # fmt: skip
"""Operators whose result needs a value on the host: a number, a shape, or a test of the input. `repeat_interleave` does unless it is given
its size."""
ABSENT = {"histogram", "histogramdd", "mkldnn_linear", "_scaled_dot_product_flash_attention_for_cpu",
          "_scaled_dot_product_flash_attention_for_cpu_backward"}  # fmt: skip
"""Operators without a kernel for CUDA."""
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "vdot"}
"""Operators whose kernels for CUDA take no whole numbers."""
COPIES = {aten._to_copy.default, aten.copy_.default}
REFUSED = {aten.put_.default, aten.nll_loss2d_forward.default, aten.nll_loss2d_backward.default,
           aten._ctc_loss_backward.default, aten.median.dim, aten.kthvalue.default, aten.nanmedian.dim}  # fmt: skip
"""Operators without a deterministic kernel on CUDA, by the list of `torch.use_deterministic_algorithms`; others depend on arguments."""
VIEWS = {"view", "_unsafe_view", "transpose", "t", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "alias", "as_strided",
         "detach", "split", "split_with_sizes", "unbind", "_reshape_alias", "unfold", "lift_fresh", "diagonal", "chunk"}  # fmt: skip
"""Operators that start no kernel."""


class _Module:
    """The functions that PyTorch expects of a device module."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        pass

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        if _ACTIVE is not None:
            _ACTIVE.arrive()

    def empty_cache(self) -> None:
        pass

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return FREE_BYTES, 2 * FREE_BYTES

    def memory_reserved(self, device: Any = None) -> int:
        return 0

    def memory_allocated(self, device: Any = None) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend(NAME, _Module())
DEVICE = torch.device(NAME, 0)


@dataclass
class Counts:
    """How often each line of the project's code waited, copied and launched."""

    syncs: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)

    def since(self, before: Counts) -> Counts:
        """Return the counts after `before`."""
        return Counts(self.syncs - before.syncs, self.copies - before.copies, self.launches - before.launches)

    def __str__(self) -> str:
        parts = []
        for name in ("syncs", "copies", "launches"):
            found: Counter[str] = getattr(self, name)
            parts += [f"{name}: {found.total()}", *(f"  {n:4d} {place}" for place, n in found.most_common(12))]
        return "\n".join(parts)


class OnDevice(torch.Tensor):
    """A tensor of the pretend device; `raw` holds its values on the CPU."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, layout=raw.layout,
            device=DEVICE, requires_grad=raw.requires_grad,
        )  # fmt: skip
        made.raw = raw
        return made  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnDevice({self.raw!r})"

    def tolist(self) -> Any:
        """Return the values; PyTorch refuses subclasses here, and a GPU waits and copies once."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _ACTIVE is None:
            raise RuntimeError(f"{func}: a tensor of the pretend device is used outside of `pretending()`")
        return _ACTIVE.run(func, args, kwargs or {})


class Pretend(TorchDispatchMode):
    """Run every operator for its device and count."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self.pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Copies to the host that have not arrived: their targets and values."""

    def arrive(self) -> None:
        """Complete the copies to the host."""
        for target, value in self.pending:
            target.copy_(value)
        self.pending.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        flat, _ = tree_flatten((args, kwargs))
        tensors = [a for a in flat if isinstance(a, torch.Tensor)]
        ours = [t for t in tensors if isinstance(t, OnDevice)]
        device = kwargs.get("device")
        target = None if device is None else torch.device(device).type
        if func is aten._to_copy.default:
            return self._copied(func, args, kwargs, bool(ours), target)
        if not ours and target != NAME:
            return func(*args, **kwargs)
        if func is aten.copy_.default and len(ours) == 1:
            waits, to_host = not (len(args) > 2 and args[2]), not isinstance(args[0], OnDevice)
            self._moved(func, to_host, waits)
            if to_host and not waits:
                self.pending.append((args[0], args[1].raw.clone()))
                return args[0].fill_(torch.nan)
        else:
            others = [t for t in tensors if not isinstance(t, OnDevice) and t.dim() > 0]
            if others:
                raise RuntimeError(
                    f"{func}: expected all tensors on one device, found {DEVICE} and {others[0].device} {tuple(others[0].shape)}"
                )
            if torch.are_deterministic_algorithms_enabled() and _not_deterministic(func, args, kwargs):
                raise RuntimeError(f"{func} does not have a deterministic implementation")
            _refuse_what_cuda_refuses(func, tensors, kwargs)
            if _waits(func, kwargs) or self._boolean_index(func, args):
                self._count("syncs", func)
            elif func.overloadpacket.__name__ not in VIEWS:
                self._count("launches", func)
        raw_args, raw_kwargs = tree_map_only(OnDevice, lambda t: t.raw, (args, kwargs))
        if target is not None:
            raw_kwargs["device"] = torch.device("cpu")
        if func is aten.histc.default:  # of whole numbers only a GPU
            result = func(raw_args[0].float(), *raw_args[1:], **raw_kwargs).to(raw_args[0].dtype)
        else:
            result = func(*raw_args, **raw_kwargs)
        if func is aten._local_scalar_dense.default or not isinstance(result, torch.Tensor | tuple | list):
            return result
        wrapped = tree_map_only(torch.Tensor, OnDevice, result)
        return return_and_correct_aliasing(func, args, kwargs, wrapped) if ours else wrapped

    def _copied(self, func: Any, args: Any, kwargs: dict[str, Any], ours: bool, target: str | None) -> Any:
        lands = ours if target is None else target == NAME
        if lands != ours:
            self._moved(func, to_host=not lands, waits=not kwargs.get("non_blocking"))
        elif lands:
            self._count("launches", func)
        raw = args[0].raw if ours else args[0]
        plain = func(raw, **(kwargs | ({"device": torch.device("cpu")} if target else {})))
        return OnDevice(plain) if lands else plain

    def _moved(self, func: Any, to_host: bool, waits: bool) -> None:
        """Count a copy between host and device."""
        if to_host and not waits and not _asked_in(*WAIT_LATER):
            raise RuntimeError(f"{func}: a copy to the host without a wait may be read before it has arrived")
        self._count("copies", func)
        if waits or not _asked_in(*PIN):
            self._count("syncs", func)

    def copied_below(self, source: torch.Tensor) -> None:
        """Count a copy that did not pass the dispatch mode; an empty tensor, such as that of a new cache, is no copy."""
        if source.numel():
            self.counts.copies[f"{_place()} tensor"] += 1
            self.counts.syncs[f"{_place()} tensor"] += 1

    @staticmethod
    def _boolean_index(func: Any, args: Any) -> bool:
        if func.overloadpacket not in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
            return False
        return any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1])

    def _count(self, kind: str, func: Any) -> None:
        place = _place()
        getattr(self.counts, kind)[f"{place} {func.overloadpacket.__name__}"] += 1


def _not_deterministic(func: Any, args: Any, kwargs: Any) -> bool:
    """Return True if CUDA refuses the operator when only deterministic kernels are allowed."""
    if func.overloadpacket in (aten.cumsum, aten.cumsum_):
        return (kwargs.get("dtype") or args[0].dtype).is_floating_point  # type: ignore[no-any-return]
    if func is aten.histc.default:
        return args[0].is_floating_point()  # type: ignore[no-any-return]
    if func.overloadpacket is aten.bincount:
        return len(args) > 1 and args[1] is not None
    if func.overloadpacket is aten.scatter_reduce:
        return "prod" in args
    return func in REFUSED


def _waits(func: Any, kwargs: dict[str, Any]) -> bool:
    """Return True if the operator's result needs a value on the host."""
    if func is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    return func.overloadpacket.__name__ in WAITS


def _refuse_what_cuda_refuses(func: Any, tensors: list[torch.Tensor], kwargs: dict[str, Any]) -> None:
    """Raise RuntimeError for an operator that the CPU computes and CUDA does not."""
    name, generator = func.overloadpacket.__name__, kwargs.get("generator")
    if generator is not None and generator.device.type != NAME:
        raise RuntimeError(f"{func}: expected a generator of {DEVICE}, found one of {generator.device}")
    if name in ABSENT:
        raise RuntimeError(f"{func} is not implemented for {NAME}")
    if name in PRODUCTS and not all(tensor.is_floating_point() for tensor in tensors):
        raise RuntimeError(f"{func} is not implemented for {tensors[0].dtype} on {NAME}")


def _asked_in(*paths: str) -> bool:
    """Return True if one of these files of the project is in the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith(paths):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _place() -> str:
    """Return the nearest line of the project's packages in the stack; the line that asked for a move, not the move itself."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(PACKAGES) and not path.endswith(MOVES):
            return f"{Path(path).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


_ACTIVE: Pretend | None = None


# `torch.tensor(values, device=...)` copies to the device below the dispatch modes, so these three need kernels.
@torch.library.impl("aten::empty_strided", NAME)
def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
    return OnDevice(torch.empty_strided(size, stride, dtype=dtype))


@torch.library.impl("aten::empty.memory_format", NAME)
def _empty(size: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
    return OnDevice(torch.empty(size, dtype=dtype))


@torch.library.impl("aten::_copy_from", NAME)
def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    if _ACTIVE is not None:
        _ACTIVE.copied_below(source)
    into = target.raw if isinstance(target, OnDevice) else target
    into.copy_(source.raw if isinstance(source, OnDevice) else source)
    return target


# Autocast on the device: products in half precision, everything else as it is.
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)


def _halved(op: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(NAME)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            cast = tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.dtype == torch.float32 else t, (args, kwargs))
            return op(*cast[0], **cast[1])

    return run


_OTHERS = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")  # registered for as long as this object lives
_OTHERS.fallback(torch.library.fallthrough_kernel)
for _name in ("mm", "bmm", "addmm", "baddbmm", "linear", "matmul", "scaled_dot_product_attention"):
    torch.library.impl(f"aten::{_name}", "AutocastPrivateUse1")(_halved(getattr(aten, _name).default))


@contextmanager
def pretending() -> Iterator[Counts]:
    """Register the pretend device and count its operations."""
    global _ACTIVE
    mode = Pretend()
    before, _ACTIVE = _ACTIVE, mode
    # moving a module to the device then keeps its Parameter objects, as it does for a GPU
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with mode:
            yield mode.counts
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap)
        _ACTIVE = before
