"""Choose the version of FlashAttention behind PyTorch's operators: 3 on Hopper if its package is installed, else PyTorch's own, 2.

Example:
    Without a GPU there is no version to choose:

    >>> use_newest(), version()
    (None, '')
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch.nn import attention

NEWEST, PACKAGE, HOPPER = "FA3", "flash_attn_interface", 9
"""PyTorch's name of version 3, the module that brings its kernels, and the compute capability for which they are written."""


def use_newest() -> None:
    """Let PyTorch's operators call version 3 if this process's GPU and packages have it.

    PyTorch older than 2.11 has no such choice.
    """
    activate = getattr(attention, "activate_flash_attention_impl", None)
    if activate is None or find_spec(PACKAGE) is None or not torch.cuda.is_available():
        return
    if torch.cuda.get_device_capability()[0] != HOPPER:
        return
    try:
        activate(NEWEST)
    # a package of an older version, or one that was built for a different PyTorch; version 2 is there in any case
    except (ImportError, OSError, RuntimeError, ValueError):
        leave_newest()


def leave_newest() -> bool:
    """Return to PyTorch's own version. Return False if it was in use already."""
    if not version():
        return False
    attention.restore_flash_attention_impl()
    return True


def version() -> str:
    """Return ` 3` if version 3 is in use, else nothing."""
    current = getattr(attention, "current_flash_attention_impl", lambda: None)()
    return " 3" if current == NEWEST else ""
