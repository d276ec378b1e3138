"""Build the sampling engine that params.yaml names, with servers from the environment.

POSTTRAIN_VLLM_URLS      running servers (`http://…` or `unix:PATH`), separated by commas; how they get weights: POSTTRAIN_VLLM_TRANSFER
POSTTRAIN_VLLM_PYTHON    interpreter of an environment with vLLM, to start a server; default: the one of infra/vllm/setup.sh
POSTTRAIN_VLLM_ARGS      additional arguments for a started server
POSTTRAIN_VLLM_DEVICES   CUDA_VISIBLE_DEVICES of a started server
POSTTRAIN_VLLM_TRANSFER  how servers get the weights: folder (default), memory, stream:HOST:PORT, nccl, nccl:HOST:PORT, or ipc
POSTTRAIN_VLLM_JOIN_SECONDS  longest wait of trainer and workers for each other before a first broadcast (30)
POSTTRAIN_VLLM_FOLDER    folder for the weights of the server, e.g. on a RAM disk; default: the run's state
POSTTRAIN_VLLM_SLEEP     1: a server on the trainer's GPU gives its memory back between samples
POSTTRAIN_SAMPLER_DEVICES  CUDA_VISIBLE_DEVICES of the process that samples ahead (staleness) with the native engine
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pipelines.config.schema import OnPolicyBudget
from pipelines.runtime.context import RunContext
from posttrain.combinations import Setup, require
from posttrain.distributed import on_one_host
from posttrain.errors import ConfigError
from posttrain.rollouts.ahead import Background
from posttrain.rollouts.engine import Engine
from posttrain.rollouts.native import NativeEngine
from posttrain.settings import context_limit, layer_processes

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from posttrain.data.tokens import TextEncoder
    from posttrain.rollouts.groups import Problem
    from posttrain.rollouts.vllm.server import VllmServer
    from posttrain.rollouts.vllm.sleep import Sleep

ENVIRONMENT = Path(".venv-vllm/bin/python")
LOG = "vllm.log"
SHARE = "--gpu-memory-utilization"


def sampling_engine(
    context: RunContext,
    algorithm: str,
    lm: PreTrainedModel,
    encoder: TextEncoder,
    tokenizer: str,
    problems: Sequence[Problem],
    accelerator: Accelerator,
    version: Callable[[], int],
) -> Engine:
    """Return the configured engine.

    Args:
        context: The run, for its parameters and its folder.
        algorithm: The name of the algorithm in params.yaml, whose budget has the sampling settings.
        lm: The model that samples.
        encoder: Its tokenizer.
        tokenizer: The folder of the tokenizer.
        problems: The training problems, whose prompts bound the context.
        accelerator: The processes that train together.
        version: Returns a number that changes when the weights of `lm` change.

    Raises ConfigError if vllm is configured, but neither a server nor an environment for one exists.
    """
    bf16, budget = context.params.align.compute.bf16, context.params.budget(algorithm)
    assert isinstance(budget, OnPolicyBudget)
    staleness = budget.rollouts.staleness
    require(
        Setup(
            accelerator.num_processes,
            layers=layer_processes(),
            engine=budget.rollouts.engine,
            staleness=staleness,
        )
    )
    if budget.rollouts.engine == "native":
        if not staleness:
            return NativeEngine(lm, encoder.ends, bf16=bf16)
        from pipelines.training.planned_memory import snapshots
        from posttrain.rollouts.process import ProcessEngine

        visible = os.environ.get("POSTTRAIN_SAMPLER_DEVICES")
        environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
        return Background(ProcessEngine(lm, encoder.ends, snapshots(budget.rollouts), bf16, environment))
    from posttrain.rollouts.vllm import VllmEngine
    from posttrain.rollouts.vllm.probe import RANDOM_TOKENS, sequences

    prompts = [problem.ids for problem in problems]
    # a conversation of several turns may fill the model's context
    longest = encoder.max_length if budget.turns else max(map(len, prompts)) + budget.max_new_tokens
    text = lm.config.get_text_config()
    length = min(context_limit(text.to_dict()) or 2**31, max(longest, RANDOM_TOKENS + 1))
    folder = Path(os.environ.get("POSTTRAIN_VLLM_FOLDER") or context.state) / f"vllm-{context.identity}"
    named, sleep, way = _named_servers(on_one_host(accelerator)), _sleep(lm), _transfer(lm)
    share = partial(_memory_share, lm, context, algorithm, sleep is not None, 1 + staleness if way == "ipc" else 0)
    made = VllmEngine(
        lm,
        encoder.ends,
        named
        or [
            _own_server(
                context.state.resolve() / LOG,
                tokenizer,
                length,
                bf16,
                share,
                sleep is not None,
                way != "folder",
                context.params.align.compute.deterministic and lm.device.type == "cuda",
            )
        ],
        version=version,
        folder=folder,
        probes=sequences(prompts, text.vocab_size, length),
        bf16=bf16,
        accelerator=accelerator,
        transfer=way,
        sleep=sleep,
    )
    return Background(made) if staleness else made


@contextmanager
def closing(engine: Engine) -> Iterator[None]:
    """Close the engine at the end, even after an error, and stop the servers that it started."""
    try:
        yield
    finally:
        close: Callable[[], None] | None = getattr(engine, "close", None)
        if close is not None:
            close()


WAYS = ("folder", "memory", "nccl", "ipc")


def _transfer(lm: PreTrainedModel) -> str:
    """Return how servers get the weights.

    Raises ConfigError for an unknown way, or one that the devices of trainer and servers do not allow.
    """
    way = os.environ.get("POSTTRAIN_VLLM_TRANSFER") or "folder"
    kind, _, address = way.partition(":")
    addressed = kind in ("stream", "nccl") and len(address) > 1 and address.rpartition(":")[2].isdigit()
    if way not in WAYS and not addressed:
        raise ConfigError(
            f"POSTTRAIN_VLLM_TRANSFER = {way!r} is no way to bring weights to servers; set memory (servers on this machine), ipc (on the"
            " trainer's GPU), nccl (on other GPUs), nccl:HOST:PORT or stream:HOST:PORT with an address of this machine, e.g."
            " stream:127.0.0.1:0, or folder (docs/rollouts.md)"
        )
    shared = _shares_device(lm)
    if kind == "ipc" and lm.device.type != "cuda":
        raise ConfigError(
            "POSTTRAIN_VLLM_TRANSFER = ipc, and the trainer is on a CPU: CUDA IPC needs a GPU that trainer and server share; set memory"
        )
    if kind == "ipc" and shared is False:
        raise ConfigError(
            f"POSTTRAIN_VLLM_TRANSFER = ipc, and POSTTRAIN_VLLM_DEVICES = {os.environ['POSTTRAIN_VLLM_DEVICES']} is not the trainer's GPU"
            f" ({_own_device(lm)}): CUDA IPC needs one GPU for both; set nccl, or name the trainer's GPU"
        )
    if kind == "nccl" and shared is True:
        raise ConfigError(
            f"POSTTRAIN_VLLM_TRANSFER = {way}, and the server is on the trainer's GPU ({_own_device(lm)}), which NCCL refuses; set ipc, or"
            " name other GPUs in POSTTRAIN_VLLM_DEVICES"
        )
    return way


def _shares_device(lm: PreTrainedModel) -> bool | None:
    """Return whether a server that this stage starts is on the trainer's GPU; None if that is not known before the server answers."""
    if lm.device.type != "cuda" or os.environ.get("POSTTRAIN_VLLM_URLS"):
        return None
    devices = os.environ.get("POSTTRAIN_VLLM_DEVICES")
    if not devices:
        return True
    named, own = [device.strip() for device in devices.split(",")], _own_device(lm)
    # an index and a UUID may name one device
    alike = all(device.isdigit() == own.isdigit() for device in named)
    return own in named if alike else None


def _own_device(lm: PreTrainedModel) -> str:
    """Return the trainer's GPU as CUDA_VISIBLE_DEVICES names it."""
    visible = [device.strip() for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device.strip()]
    index = lm.device.index or 0
    return visible[index] if index < len(visible) else str(index)


def _sleep(lm: PreTrainedModel) -> Sleep | None:
    """Return how a server on the trainer's GPU sleeps between samples, if the environment asks for it.

    Raises ConfigError on a CPU, where vLLM keeps its memory, and for a server with other devices.
    """
    if os.environ.get("POSTTRAIN_VLLM_SLEEP", "0") in ("", "0"):
        return None
    if lm.device.type == "cpu" or os.environ.get("POSTTRAIN_VLLM_DEVICES"):
        reason = "the trainer is on a CPU" if lm.device.type == "cpu" else "POSTTRAIN_VLLM_DEVICES names devices"
        raise ConfigError(
            f"POSTTRAIN_VLLM_SLEEP is set, and {reason}: only a server on the trainer's GPU has memory to give back; unset it"
        )
    import torch

    from posttrain.rollouts.vllm.sleep import Sleep

    device = torch.get_device_module(lm.device)
    size = sum(parameter.numel() * parameter.element_size() for parameter in lm.parameters())
    # a server holds bfloat16, and the trainer may hold float32
    return Sleep(lambda: int(device.mem_get_info(lm.device)[0]), size // 2, device.empty_cache)


def _memory_share(
    lm: PreTrainedModel, context: RunContext, algorithm: str, sleeps: bool = False, snapshots: int = 0
) -> float | None:
    """Return the share of the trainer's GPU that a server on the same one may use; None on a CPU.

    Args:
        snapshots: copies of the trained weights on the GPU, from which the server takes them.
    """
    if lm.device.type == "cpu":
        return None
    import torch

    from pipelines.training.planned_memory import memory_next_to_server
    from posttrain.planning import server_share

    memory = memory_next_to_server(context.params, algorithm, lm.config, lm.device.type, snapshots, sleeps)
    return server_share(torch.get_device_module(lm.device).mem_get_info(lm.device)[1], memory)


def _named_servers(one_host: bool) -> list[VllmServer]:
    """Return the running servers that the environment names; every process of the stage asks them.

    Raises ConfigError if one has no address, or cannot be reached from all hosts.
    """
    from posttrain.rollouts.vllm.server import VllmServer

    urls = [url for url in os.environ.get("POSTTRAIN_VLLM_URLS", "").replace(",", " ").split() if url]
    for url in urls:
        parts = urlsplit(url)
        if not (parts.path if parts.scheme == "unix" else parts.scheme in ("http", "https") and parts.netloc):
            raise ConfigError(
                f"POSTTRAIN_VLLM_URLS: {url!r} is not the address of a server; write e.g. http://127.0.0.1:8000 or unix:/folder/vllm.sock"
            )
    local = [url for url in urls if urlsplit(url).scheme == "unix"]
    if not one_host and (local or not urls):
        named = f"POSTTRAIN_VLLM_URLS names {local[0]}" if local else "POSTTRAIN_VLLM_URLS names no server"
        raise ConfigError(
            f"{named}, and this stage runs on several hosts: only one of them could reach a socket, or a server that the stage starts."
            " Start servers that listen on an address, and set POSTTRAIN_VLLM_URLS=http://HOST:8000 on each host (docs/rollouts.md)."
        )
    return [VllmServer(url) for url in urls]


def _own_server(
    log: Path,
    tokenizer: str,
    length: int,
    bf16: bool,
    share: Callable[[], float | None] = lambda: None,
    sleeps: bool = False,
    fetches: bool = False,
    invariant: bool = False,
) -> VllmServer:
    """Return a server that starts with its first weights.

    Args:
        invariant: an answer does not depend on the requests that are computed with it. vLLM has such kernels for GPUs only.
    """
    from posttrain.rollouts.vllm.local import Launch, LocalServer

    devices = os.environ.get("POSTTRAIN_VLLM_DEVICES")
    launch = Launch(
        python=_interpreter(),
        tokenizer=str(Path(tokenizer).resolve()),
        dtype="bfloat16" if bf16 else "float32",
        context=length,
        arguments=_server_arguments(),
        environment=({"CUDA_VISIBLE_DEVICES": devices} if devices else {})
        | ({"VLLM_BATCH_INVARIANT": "1"} if invariant else {}),
        memory_share=None if devices else share(),
        sleeps=sleeps,
        fetches=fetches,
    )
    return LocalServer(launch, log)


def _server_arguments() -> list[str]:
    """Return the additional arguments of a server. Raises ConfigError for an open quotation mark, or a share of the memory above 1."""
    given = os.environ.get("POSTTRAIN_VLLM_ARGS", "")
    try:
        arguments = shlex.split(given)
    except ValueError as error:
        raise ConfigError(
            f"POSTTRAIN_VLLM_ARGS = {given!r} cannot be split into arguments: {error}; close the quotation mark"
        ) from None
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument(SHARE)
    share = parser.parse_known_args(arguments)[0].gpu_memory_utilization
    if share is not None and not _is_share(share):
        raise ConfigError(
            f"POSTTRAIN_VLLM_ARGS: {SHARE} {share} is no share of the GPU's memory; write a number above 0 and at most 1, or remove it:"
            " the share that training leaves is computed, and `posttrain plan --device cuda` prints it"
        )
    return arguments


def _is_share(text: str) -> bool:
    try:
        return 0 < float(text) <= 1
    except ValueError:
        return False


def _interpreter() -> str:
    """Return the absolute path of the interpreter without resolving links, because a link identifies its virtual environment."""
    given = os.environ.get("POSTTRAIN_VLLM_PYTHON")
    python = shutil.which(given or ENVIRONMENT)
    if python is None:
        missing = (
            f"POSTTRAIN_VLLM_PYTHON: {given} does not exist"
            if given
            else "rollouts.engine is vllm, but no server is named"
        )
        raise ConfigError(
            f"{missing}. Make an environment with infra/vllm/setup.sh, or set POSTTRAIN_VLLM_PYTHON to the interpreter of one,"
            " or set POSTTRAIN_VLLM_URLS to running servers (docs/rollouts.md)."
        )
    return os.path.abspath(python)
