"""AdamW with moments in main memory takes AdamW's steps to the bit, and either resumes the other's state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from posttrain.errors import ConfigError
from posttrain.settings import OptimizerSettings
from posttrain.training.host_optimizer import HostAdamW
from posttrain.training.optimizer import make_optimizer

ARGUMENTS: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 7), (3,), (4,))]


def groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": parameters[:2], "lr": 0.01}, {"params": parameters[2:], "lr": 0.1}]


def stepped(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    """Take steps with gradients that depend on the step, a rate that falls, and a parameter that has none at first."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for i, parameter in enumerate(parameters):
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = None if i == 1 and step < 2 else gradient
        for group, rate in zip(optimizer.param_groups, (0.01, 0.1), strict=True):
            group["lr"] = rate / (1 + step)
        optimizer.step()


def test_it_is_adamw_to_the_bit_and_either_goes_on_from_the_other() -> None:
    plain, host = weights(), weights()
    on_device = torch.optim.AdamW(groups(plain), **ARGUMENTS, fused=True)
    in_memory = HostAdamW(groups(host), **ARGUMENTS)
    stepped(on_device, plain, range(4))
    stepped(in_memory, host, range(4))
    assert all(torch.equal(a, b) for a, b in zip(plain, host, strict=True))
    states = copy.deepcopy([on_device.state_dict(), in_memory.state_dict()])  # loading keeps the tensors themselves
    assert states[0]["param_groups"] == states[1]["param_groups"]
    crossed = [[nn.Parameter(p.detach().clone()) for p in host] for _ in range(2)]
    others = [HostAdamW(groups(weights()), **ARGUMENTS), torch.optim.AdamW(groups(weights()), **ARGUMENTS, fused=True)]
    for optimizer, state, given in zip(others, states, crossed, strict=True):
        with torch.no_grad():  # a run's weights are loaded before its moments
            own = [p for group in optimizer.param_groups for p in group["params"]]
            for parameter, value in zip(own, given, strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(state)
        stepped(optimizer, own, range(4, 6))
        given[:] = own
    stepped(in_memory, host, range(4, 6))
    for resumed in crossed:
        assert all(torch.equal(a, b) for a, b in zip(host, resumed, strict=True))


def test_moments_of_8_bits_in_main_memory_are_refused() -> None:
    settings = OptimizerSettings(0.1, moment_bits=8, offload=True)
    with pytest.raises(ConfigError, match=r"optimizer.offload: true keeps moments of 32 bits in main memory"):
        make_optimizer([{"params": weights()}], settings)
    # a CPU's moments are in main memory anyway
    assert type(make_optimizer([{"params": weights()}], OptimizerSettings(0.1, offload=True))) is torch.optim.AdamW
