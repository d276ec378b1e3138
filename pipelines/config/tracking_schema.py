"""Define the section `tracking` of params.yaml."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipelines.config.types import Section, Share


class TrackingParams(Section):
    """Choose which answers MLflow shows besides parameters and metrics. No stage reads it, so that a change makes nothing stale."""

    traces: Annotated[int, Field(ge=0)] = 4
    """Greedy answers of each evaluated model that become MLflow traces, at most evaluation.samples_shown, and answers of each kind from the
    rollouts that a run kept; 0: none."""
    served: Share = 0.0
    """Share of the answers of `posttrain serve` that are logged, with their prompts, in .posttrain/served and as MLflow traces."""
