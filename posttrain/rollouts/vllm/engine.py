"""The engine: before it samples, every server gets the policy's weights where they have changed, and proves that it has them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from posttrain.errors import PosttrainError, ServerError, StaleWeightsError
from posttrain.rollouts.engine import Completion, Request, SamplingSettings
from posttrain.rollouts.vllm.fleet import Fleet
from posttrain.rollouts.vllm.folder import plain_state, write_weights
from posttrain.rollouts.vllm.probe import BFLOAT16, FLOAT32, Expected, Probe, expected
from posttrain.rollouts.vllm.server import Server

PATIENCE_SECONDS = 60.0
"""How long to wait for a server when none is left."""


class VllmEngine:
    """Answers depend on weights, prompt and seed, and on nothing that a server remembers; not bit by bit, since a server's batches differ.

    version: a number that changes when the policy's weights do. folder: where weights are written for the servers to read. probes: the
    sequences that a server must answer as the policy does. Every process calls `sample`, also one without a request.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        eos_id: int,
        servers: Sequence[Server],
        *,
        version: Callable[[], int],
        folder: Path,
        probes: Sequence[tuple[int, ...]],
        bf16: bool = False,
        accelerator: Accelerator | None = None,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self.lm, self.eos_id, self.version, self.folder = lm, eos_id, version, folder.resolve()
        self.probes, self.bf16, self.accelerator = list(probes), bf16, accelerator
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.probe = Probe(BFLOAT16 if bf16 else FLOAT32, str(self.dtype).removeprefix("torch."))
        self.fleet = Fleet(servers, self._ready, patience_seconds)
        self._served: tuple[int, float] | None = None
        self._expected: list[Expected] = []
        self._main = accelerator is None or accelerator.is_main_process
        self._proven = self._named = False

    def sample(self, requests: Sequence[Request], settings: SamplingSettings) -> list[list[Completion]]:
        """Completions of each request, in order, one per seed. Raises ServerError when no server is left, StaleWeightsError when one
        serves other weights, RolloutError where prompt and answer exceed the context."""
        try:
            return self._sample(requests, settings)
        except StaleWeightsError:
            self._named = True
            raise

    def _sample(self, requests: Sequence[Request], settings: SamplingSettings) -> list[list[Completion]]:
        self._synchronise(settings.temperature)
        jobs = [
            partial(Server.complete, prompt=request.prompt, seed=seed, settings=settings, eos_id=self.eos_id)
            for request in requests
            for seed in request.seeds
        ]
        answers = iter(self.fleet.run(jobs))
        return [[next(answers) for _ in request.seeds] for request in requests]

    def close(self) -> None:
        """Cut what is under way, take down what was started, and remove what was written, unless an error has named it to the user."""
        self.fleet.close()
        if self._main and not self._named:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def weights(self) -> Path:
        """The folder of the weights of now."""
        return self.folder / f"weights-{self.version()}"

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
        """Write the weights and have every server load them; the folders before are of no more use."""
        write_weights(self.lm, state, self.weights)
        self.fleet.prepare()
        for old in sorted(self.folder.glob("weights-*")):
            if old != self.weights:
                shutil.rmtree(old)

    def _publish_for_all(self, state: Mapping[str, Tensor], accelerator: Accelerator) -> None:
        """The main process starts and loads the servers; the others learn their addresses, or what has gone wrong."""
        from accelerate.utils import broadcast_object_list

        said: list[Any] = [None]
        if self._main:
            try:
                self._publish(state)
                said = [([server.url for server in self.fleet.servers], self.folder)]
            except PosttrainError as error:
                said = [error]
        broadcast_object_list(said)
        if isinstance(said[0], PosttrainError):
            raise said[0]
        if not self._main:
            urls, self.folder = said[0]
            self._follow(urls)

    def _follow(self, urls: Sequence[str]) -> None:
        self.fleet = Fleet([Server(url) for url in urls], self._ready, self.fleet.patience_seconds)
        for server in self.fleet.servers:
            try:
                server.connect()
            except ServerError as error:
                self.fleet.lost[server] = error

    def _check(self) -> None:
        """Between two rounds of one step a server may have been replaced by one that began anew."""
        for server in self.fleet.living:
            try:
                self._prove(server)
            except (ServerError, StaleWeightsError) as error:
                self.fleet.lost[server] = ServerError(str(error))
        if self.fleet.lost:
            self.fleet.prepare()

    def _prove(self, server: Server) -> float:
        return self.probe.check(server, self._expected, self._temperature, self.weights)

    def _ready(self, server: Server) -> None:
        server.update(self.weights)
        difference = self._prove(server)
        if not self._proven:
            tqdm.write(f"{server.url} has the policy's weights: at most {difference:.2g} nats apart", file=sys.stderr)
            self._proven = True
