"""A policy behind small servers of the tests' own, with an engine between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from posttrain.rollouts.engine import Completion, Request, SamplingSettings
from posttrain.rollouts.vllm import VllmEngine
from posttrain.rollouts.vllm.probe import sequences
from posttrain.rollouts.vllm.server import VllmServer
from tests.models import small
from tests.rollouts.peer import Peer

PROMPTS = [(5, 6, 7), (9, 10), (11, 3, 4, 8, 20, 30, 21)]
SETTINGS = SamplingSettings(8, 0.8)


def requests(samples: int = 3) -> list[Request]:
    return [Request(p, tuple((0, i, j) for j in range(samples))) for i, p in enumerate(PROMPTS)]


class Setup:
    """A policy, servers that began with other weights, and an engine between them. `version` counts the policy's updates."""

    def __init__(self, folder: Path, policy: Any, peers: list[Peer]) -> None:
        self.folder, self.policy, self.peers, self.version = folder, policy, peers, 0
        self.engine = self.new_engine()

    def new_engine(self, patience_seconds: float = 2.0, bf16: bool = False, **options: Any) -> VllmEngine:
        return VllmEngine(
            self.policy,
            small.EOS,
            [VllmServer(peer.url) for peer in self.peers],
            version=lambda: self.version,
            folder=self.folder,
            probes=sequences(PROMPTS, self.policy.config.vocab_size, 64),
            bf16=bf16,
            patience_seconds=patience_seconds,
            **options,
        )

    def update(self, by: float = 1.2) -> None:
        """Change the weights as a training step does."""
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter.mul_(by)
        self.version += 1

    def sample(self, settings: SamplingSettings = SETTINGS) -> list[list[Completion]]:
        return self.engine.sample(requests(), settings)
