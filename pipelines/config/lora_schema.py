"""Define the section `lora` of the training stages."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipelines.config.types import Count, Positive, Section
from posttrain.settings import LoraSettings


class LoraParams(Section):
    """Train a low-rank adapter (arXiv 2106.09685) instead of all weights. The stage writes the merged model."""

    rank: Count
    alpha: Positive
    """The adapter's output is scaled by alpha / rank."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Linear layers by the end of their name, e.g. [q_proj, v_proj]; all-linear means all except the output head."""

    base_bits: Literal[4, 32] = LoraSettings.base_bits
    """Bits of a weight of the frozen linear layers. 4: NF4 by bitsandbytes (QLoRA, 2305.14314); the stage writes the dequantised sum."""

    def settings(self) -> LoraSettings:
        """Return the library's type with these values."""
        modules = self.target_modules
        named = modules if isinstance(modules, str) else tuple(modules)
        return LoraSettings(self.rank, self.alpha, named, self.base_bits)

    @model_validator(mode="before")
    @classmethod
    def _without_dropout(cls, given: Any) -> Any:
        """Refuse dropout."""
        if isinstance(given, dict) and "dropout" in given:
            raise ValueError(
                "dropout: has no effect, because log-probabilities are computed without dropout; remove it"
            )
        return given
