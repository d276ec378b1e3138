"""How many tokens' keys and values an in-process engine may store: a constant on a CPU, a share of the free memory on a GPU.

Also how many tokens of prompts it computes at once.

Example:
    Ten GiB free at 112 KiB a token, of which 70 % are used:

    >>> tokens_in(10 * 2**30, 112 * 2**10)
    65536
"""

from __future__ import annotations

import torch

from posttrain.choices import choose, chosen, name_of
from posttrain.errors import RolloutError
from posttrain.rollouts.engine import MAX_TOKENS

SHARE = 0.7
"""Share of the free memory. The rest is for the prefill of prompts, for logits, and for one layer's copy when slots are rearranged."""
KEPT_SHARE = 0.8
"""Share of the free memory that a number which was found before may take: it changes the batches, and so the last bits of answers."""
LEADING_BITS = 3
PREFILL_TOKENS, CPU_PREFILL_TOKENS = 2**14, 2**11
"""Most prompt tokens of one forward pass. More than these are no faster on a CPU, where they would only take memory."""


def prefill_tokens(device: str) -> int:
    """Return the most prompt tokens of one forward pass on a kind of device; a longer prompt is computed by itself."""
    return CPU_PREFILL_TOKENS if device == "cpu" else PREFILL_TOKENS


def max_tokens(device: torch.device, token_bytes: int) -> int:
    """Return the most tokens to store on `device` at `token_bytes` each.

    A number that was found before is kept as long as it fits, also by a run that is resumed.

    Raises:
        RolloutError: not one token fits.
    """
    module = torch.get_device_module(device)
    if device.type == "cpu" or not hasattr(module, "mem_get_info"):
        return MAX_TOKENS
    free, _ = module.mem_get_info(device)
    # what torch has reserved and no tensor uses is free as well
    usable = free + module.memory_reserved(device) - module.memory_allocated(device)
    name = f"{name_of(device)}: stored tokens of {token_bytes} bytes"
    known = chosen(name)
    if known is not None and known * token_bytes <= KEPT_SHARE * usable:
        return known
    found = tokens_in(usable, token_bytes)
    if found == 0:
        raise RolloutError(
            f"{device} has {free / 2**20:.0f} MiB free, too little to store a single token's keys and values while sampling;"
            " use a smaller model, lora, or a device that no other process uses"
        )
    choose(name, found)
    return found


def tokens_in(free: int, token_bytes: int) -> int:
    """Return how many tokens fit, rounded down to three leading bits, so that a few MiB more or less change no batch."""
    fitting = int(SHARE * free) // token_bytes
    shift = max(0, fitting.bit_length() - LEADING_BITS)
    return fitting >> shift << shift
