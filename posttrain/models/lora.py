"""Low-rank adapters (2106.09685) through peft: the base is frozen and serves as reference, the adapter is trained, kept and merged."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.data.batches import TokenBatch
from posttrain.errors import ConfigError, ModelError
from posttrain.models.policy import Policy, PolicyOutput

HEAD = "score"
"""The scalar head of a reward model or critic, which is trained whole beside the adapter."""


@dataclass(frozen=True)
class LoraSettings:
    """W x + (alpha / rank) B A x in every layer that `target_modules` names by the end of its path; B starts at 0.

    `all-linear` is every linear layer but the head. There is no dropout: log-probabilities are taken without any.
    """

    rank: int
    alpha: float
    target_modules: str | tuple[str, ...] = "all-linear"


class Adapter:
    """The adapter inside a model, which stays the object that it was: its own layers hold the low-rank ones."""

    def __init__(self, model: PreTrainedModel, settings: LoraSettings) -> None:
        """Freezes `model` and adds trainable layers to it. Raises ModelError where no layer has such a name."""
        peft = _peft()
        scalar = hasattr(model, HEAD)
        config = peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=_modules(settings),
            task_type="SEQ_CLS" if scalar else "CAUSAL_LM",
            modules_to_save=[HEAD] if scalar else None,
        )
        try:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                self._peft: Any = peft.get_peft_model(model, config)
        except ValueError as error:
            raise ModelError(
                f"lora.target_modules {_modules(settings)!r}: {str(error).rstrip('.')}. Name linear layers of"
                f" {type(model).__name__}, such as [q_proj, v_proj], or use all-linear"
            ) from error
        self._refuse_head(model)
        self._state: dict[str, Tensor] = {}

    @property
    def parameters(self) -> int:
        """How many are trained, the scalar head included."""
        return sum(p.numel() for p in self._peft.parameters() if p.requires_grad)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is its base."""
        with self._peft.disable_adapter():
            yield

    def merge(self) -> None:
        """Make the model a plain one again, with the adapter added to its weights; what was trained is kept for `save`."""
        trained = _peft().get_peft_model_state_dict(self._peft, save_embedding_layers=False)
        self._state = {name: tensor.detach().cpu().contiguous() for name, tensor in trained.items()}
        self._peft.merge_and_unload()

    def save(self, folder: Path) -> None:
        """Write what `merge` kept, as `PeftModel.from_pretrained(base, folder)` loads it."""
        config = self._peft.peft_config["default"]
        config.inference_mode = True
        # peft keeps names as a set, whose order is another one in each process
        config.target_modules = sorted(config.target_modules)
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        save_file(self._state, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    def _refuse_head(self, model: PreTrainedModel) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        for place in (model.get_output_embeddings(), model.get_input_embeddings()):
            if isinstance(place, BaseTunerLayer):
                raise ConfigError(
                    "lora.target_modules: the embedding and the head over the vocabulary cannot carry an adapter here, since"
                    " log-probabilities are fused with the head's own weight; name other layers, or use all-linear"
                )


class BasePolicy(Policy):
    """A policy as it was before its adapter, on the same weights: the reference that costs no memory."""

    def __init__(self, lm: PreTrainedModel, adapter: Adapter) -> None:
        super().__init__(lm)
        self.adapter = adapter

    def forward(self, batch: TokenBatch, temperature: float | Tensor = 1.0) -> PolicyOutput:
        with self.adapter.disabled():
            return super().forward(batch, temperature)


def adapter_parameters(config: Any, settings: LoraSettings) -> int:
    """Of the causal language model of a transformers configuration, without making its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return Adapter(cast(PreTrainedModel, AutoModelForCausalLM.from_config(config)), settings).parameters


def _modules(settings: LoraSettings) -> str | list[str]:
    return settings.target_modules if isinstance(settings.target_modules, str) else list(settings.target_modules)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError("lora needs the package peft, which is not installed; type: pip install peft") from None
    return peft
