"""The types of single parameters, and the base of all sections of params.yaml."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from posttrain.settings import LARGEST_LEARNING_RATE, TEMPERATURES


def _finite(value: float) -> float:
    """Return the value if it is finite. Raises ValueError otherwise."""
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


LARGEST_REWARD_WEIGHT = 1e6
"""Largest size of a reward's weight: from 1e140 on, the squares by which advantages are normalised overflow, and all become 0."""
Finite = Annotated[float, AfterValidator(_finite)]
Positive = Annotated[Finite, Field(gt=0)]
Temperature = Annotated[Finite, Field(ge=TEMPERATURES[0], le=TEMPERATURES[1])]
LearningRate = Annotated[Finite, Field(gt=0, le=LARGEST_LEARNING_RATE)]
NonNegative = Annotated[Finite, Field(ge=0)]
RewardWeight = Annotated[Finite, Field(ge=-LARGEST_REWARD_WEIGHT, le=LARGEST_REWARD_WEIGHT)]
Share = Annotated[Finite, Field(ge=0, le=1)]
Momentum = Annotated[Finite, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]


def _named(value: str) -> str:
    """Return the text if it names something. Raises ValueError otherwise."""
    if not value.strip() or "\0" in value or len(value) > LONGEST_PATH:
        raise ValueError(
            "must be a path, a name or a hub id: not empty, without a null byte, and at most 4,096 characters long"
        )
    return value


LONGEST_PATH = 4096
Source = Annotated[str, AfterValidator(_named)]
RulePolicy = Literal["stop", "quarantine", "warn"]


class Section(BaseModel):
    """Base of all sections: strict, frozen, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())
