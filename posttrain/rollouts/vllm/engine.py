"""The engine: before sampling, every server loads the policy's weights if they have changed, and a probe verifies them.

Example:
    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> model, tokenizer = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
    >>> engine = VllmEngine(model, tokenizer.eos_token_id, [], version=lambda: 3, folder=Path("served"), probes=[])
    >>> engine.weights.name
    'weights-3'
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from posttrain.errors import PosttrainError, ServerError, StaleWeightsError
from posttrain.models.plain import plain_state
from posttrain.rollouts.engine import Completion, Request, SamplingSettings, end_ids
from posttrain.rollouts.tolerance import BFLOAT16, FLOAT32
from posttrain.rollouts.vllm.fleet import Fleet
from posttrain.rollouts.vllm.folder import write_config, write_weights
from posttrain.rollouts.vllm.probe import Expected, Probe, expected
from posttrain.rollouts.vllm.published import Published
from posttrain.rollouts.vllm.server import VllmServer
from posttrain.rollouts.vllm.sleep import Sleep

PATIENCE_SECONDS = 60.0
"""How long to wait for a server if none is left."""


@dataclass(frozen=True)
class Snapshot:
    """Weights that were written for the servers, and the policy's log-probabilities of the probe with them."""

    version: int
    temperature: float
    expected: list[Expected]


class VllmEngine:
    """Answers depend on weights, prompt and seed, and on no state of a server. They are not bit-identical, because batches differ.

    Every process calls `sample`, also a process without a request.

    Args:
        version: returns a number that changes when the policy's weights do.
        folder: where weights are written for the servers to read.
        probes: sequences whose log-probabilities a server must reproduce.
        transfer: `folder`, or a way of Published.
        sleep: gives the servers' memory back while they are not asked.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        ends: int | Iterable[int],
        servers: Sequence[VllmServer],
        *,
        version: Callable[[], int],
        folder: Path,
        probes: Sequence[tuple[int, ...]],
        bf16: bool = False,
        accelerator: Accelerator | None = None,
        patience_seconds: float = PATIENCE_SECONDS,
        transfer: str = "folder",
        sleep: Sleep | None = None,
    ) -> None:
        self.lm, self.ends, self.version, self.folder = lm, end_ids(ends), version, folder.resolve()
        self.probes, self.bf16, self.accelerator = list(probes), bf16, accelerator
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.probe = Probe(BFLOAT16 if bf16 else FLOAT32, str(self.dtype).removeprefix("torch."))
        self.fleet = Fleet(servers, self._ready, patience_seconds)
        self.vocabulary = lm.config.get_text_config().vocab_size
        self._served: tuple[int, float] | None = None
        self._pinned: int | None = None
        self._expected: list[Expected] = []
        self._main = accelerator is None or accelerator.is_main_process
        self.sleep = sleep
        self._reading: tuple[list[dict[str, str]], int] | None = None
        self.published: Published | None = None
        if transfer != "folder" and self._main:
            self.published = Published(lm, self.dtype, transfer)
        self._proven = self._named = False

    def sample(self, requests: Sequence[Request], settings: SamplingSettings) -> list[list[Completion]]:
        """Return the completions of each request, in order, one per seed.

        Raises:
            ServerError: no server is left.
            StaleWeightsError: a server uses other weights.
            RolloutError: prompt and answer exceed the context.
        """
        try:
            return self._sample(requests, settings)
        except StaleWeightsError:
            self._name()
            raise

    def _sample(self, requests: Sequence[Request], settings: SamplingSettings) -> list[list[Completion]]:
        self._synchronise(settings.temperature)
        return self._answers(requests, settings)

    def snapshot(self, settings: SamplingSettings) -> Snapshot:
        """Write the present weights for the servers, which load them when `sample_with` is called. For one process only.

        Raises:
            RolloutError: the disk is full or read-only.
        """
        taken = Snapshot(
            self.version(),
            settings.temperature,
            expected(self.lm, self.probes, settings.temperature, self.bf16),
        )
        folder = self.folder / f"weights-{taken.version}"
        if self.published is not None:
            self.published.take(taken.version)
        elif not folder.exists():
            write_weights(self.lm, plain_state(self.lm, self.dtype), folder)
        return taken

    def sample_with(
        self, taken: Snapshot, requests: Sequence[Request], settings: SamplingSettings
    ) -> list[list[Completion]]:
        """Return the completions under the weights of `taken`; older weights are removed. Errors are those of `sample`."""
        self._pinned, self._expected, self._temperature = taken.version, taken.expected, taken.temperature
        try:
            if (taken.version, taken.temperature) == self._served:
                self._check()
            else:
                self.fleet.prepare()
                self._served = taken.version, taken.temperature
            self._remove(before=taken.version)
            return self._answers(requests, settings)
        except StaleWeightsError:
            self._name()
            raise

    def _name(self) -> None:
        """Keep the folder of the weights, to which an error message refers."""
        self._named = True
        if self.published is not None and not self.weights.exists():
            write_weights(self.lm, self.published.whole(self._version), self.weights)

    def _answers(self, requests: Sequence[Request], settings: SamplingSettings) -> list[list[Completion]]:
        jobs = [
            partial(
                VllmServer.complete,
                prompt=request.prompt,
                seed=seed,
                settings=settings,
                ends=self.ends,
                vocabulary=self.vocabulary,
            )
            for request in requests
            for seed in request.seeds
        ]
        answers = iter(self.fleet.run(jobs))
        found = [[next(answers) for _ in request.seeds] for request in requests]
        self._give_back()
        return found

    def _give_back(self) -> None:
        """Let the servers sleep, after every process has its answers."""
        if self.sleep is None:
            return
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()
        if self._main:
            self.sleep.begin(self.fleet.living)
        self._served = None

    def close(self) -> None:
        """Abort open requests, stop the servers that were started, and remove the weights unless an error message refers to them."""
        self.fleet.close()
        if self.published is not None:
            self.published.close()
        if self._main and not self._named:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def weights(self) -> Path:
        """Return the folder of the weights that the servers use: the current ones, or those of a snapshot."""
        return self.folder / f"weights-{self._version}"

    @property
    def _version(self) -> int:
        return self.version() if self._pinned is None else self._pinned

    def _remove(self, before: int) -> None:
        if self.published is not None:
            self.published.remove(before)
        for old in sorted(self.folder.glob("weights-*")):
            number = old.name.partition("-")[2]
            if number.isdigit() and int(number) < before:
                shutil.rmtree(old)

    def _synchronise(self, temperature: float) -> None:
        now = (self.version(), temperature)
        if now == self._served:
            self._check()
            return
        self._expected = expected(self.lm, self.probes, temperature, self.bf16)
        self._temperature = temperature
        state = plain_state(self.lm, self.dtype)
        if self.accelerator is None or self.accelerator.num_processes == 1:
            self._publish(state)
        else:
            self._publish_for_all(state, self.accelerator)
        self._served = now

    def _publish(self, state: Mapping[str, Tensor]) -> None:
        """Make every server load the weights; then remove older ones."""
        if self.published is not None:
            self.published.remove(self._version)
            self.published.take(self._version, state)
            self._reading = self._sources(self.published)
            self.fleet.prepare()
            return
        write_weights(self.lm, state, self.weights)
        self.fleet.prepare()
        for old in sorted(self.folder.glob("weights-*")):
            if old != self.weights:
                shutil.rmtree(old)

    def _publish_for_all(self, state: Mapping[str, Tensor], accelerator: Accelerator) -> None:
        """Start and load the servers on the main process; the other processes receive their addresses, or the error."""
        from accelerate.utils import broadcast_object_list

        published: list[Any] = [None]
        if self._main:
            try:
                self._publish(state)
                published = [([server.url for server in self.fleet.servers], self.folder, self._reading)]
            except PosttrainError as error:
                published = [error]
        broadcast_object_list(published)
        if isinstance(published[0], PosttrainError):
            raise published[0]
        if not self._main:
            urls, self.folder, self._reading = published[0]
            self._follow(urls)

    def _follow(self, urls: Sequence[str]) -> None:
        self.fleet = Fleet([VllmServer(url) for url in urls], self._ready, self.fleet.patience_seconds)
        self.fleet.met = True  # by the main process
        for server in self.fleet.servers:
            try:
                server.connect()
            except ServerError as error:
                self.fleet.lost[server] = error

    def _check(self) -> None:
        """Verify the servers again: between two rounds of one step a server may have been restarted."""
        for server in self.fleet.living:
            try:
                self._prove(server)
            except (ServerError, StaleWeightsError) as error:
                self.fleet.lost[server] = ServerError(str(error))
        if self.fleet.lost:
            self.fleet.prepare()

    def _prove(self, server: VllmServer) -> float:
        return self.probe.check(server, self._expected, self._temperature, self.weights)

    def _ready(self, server: VllmServer) -> None:
        if self.sleep is not None:
            self.sleep.end(server, "weights")
        self._load(server)
        if self.sleep is not None:
            self.sleep.end(server, "kv_cache")
        difference = self._prove(server)
        if not self._proven:
            tqdm.write(
                f"{server.url} has the policy's weights: log-probabilities differ by at most {difference:.2g} nats",
                file=sys.stderr,
            )
            self._proven = True

    def _load(self, server: VllmServer) -> None:
        reading = self._reading if self.published is None else self._sources(self.published)
        sender = None if self.published is None else self.published.sender
        if reading is None:
            server.update(self.weights)
        elif sender is None and reading[0][-1]["way"] == "nccl":
            raise ServerError(f"{server.url} was lost, and only the main process can send it weights by nccl")
        else:
            server.fetch(*reading, self.folder / "config", sender)

    def _sources(self, published: Published) -> tuple[list[dict[str, str]], int]:
        write_config(self.lm, self.folder / "config")
        return published.sources(self._version), published.size(self._version)
