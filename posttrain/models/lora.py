"""Low-rank adapters (2106.09685) through peft: the frozen base is the reference; the adapter is trained, kept and merged."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.data.batches import TokenBatch
from posttrain.errors import ConfigError, ModelError
from posttrain.models.deferred import is_deferred
from posttrain.models.lora_targets import SCORE, check_targets
from posttrain.models.policy import Policy, PolicyOutput
from posttrain.models.quantised import dequantise, quantise_base, quantised_parameters
from posttrain.models.reach import probe_ids
from posttrain.models.refusals import ends
from posttrain.settings import LoraSettings
from posttrain.text import reason_of

MERGE_TOLERANCE = 1e-3
"""Greatest change of a hidden state by merging, as a share of the largest one."""


class Adapter:
    """An adapter inside a model. The model stays the same object; its own layers contain the low-rank ones.

    Example:
        >>> from posttrain.models.tiny import TinyShape, tiny_model
        >>> model, _ = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
        >>> adapter = Adapter(model, LoraSettings(rank=2, alpha=4, target_modules=("q_proj",)))
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        64
    """

    def __init__(self, model: PreTrainedModel, settings: LoraSettings) -> None:
        """Freeze `model` and add trainable layers to it.

        Raises:
            ModelError: no layer matches `target_modules`.
        """
        peft = _peft()
        self._model = model
        scalar = hasattr(model, SCORE)
        config = peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=_modules(settings),
            task_type="SEQ_CLS" if scalar else "CAUSAL_LM",
            modules_to_save=[SCORE] if scalar else None,
        )
        names = _linear_names(model)
        self.base_change: float | None = None
        """Greatest change of a hidden state by the 4-bit base, as a share of the largest one; None without such a base."""
        if settings.base_bits == 4:
            self.base_change = self._quantise()
        before = None if is_deferred(model) else self._probe()
        try:
            with warnings.catch_warnings(action="ignore", category=FutureWarning), _keeps_first_values(before is None):
                self._peft: Any = peft.get_peft_model(model, config)
        except (ValueError, AttributeError, TypeError) as error:
            raise ModelError(
                f"lora.target_modules {_modules(settings)!r}: {str(error).rstrip('.')}. Name linear layers of"
                f" {type(model).__name__}: {', '.join(name for name in names if repr(name) not in str(error))}"
            ) from error
        self._refuse_head(model)
        left = self._peft.peft_config["default"].target_modules
        check_targets(model, settings, left={left} if isinstance(left, str) else {*left})
        if before is not None:
            self._refuse_changed(before)
        self._state: dict[str, Tensor] = {}

    @property
    def parameters(self) -> int:
        """Return the number of trained parameters, the scalar head included."""
        return sum(p.numel() for p in self._peft.parameters() if p.requires_grad)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Compute the base model inside the block."""
        with self._peft.disable_adapter():
            yield

    def _quantise(self) -> float | None:
        """Keep the base in 4 bits. Return how much that changes its hidden states, None if its weights are still in their files."""
        exact = None if is_deferred(self._model) else self._probe()
        quantise_base(self._model)
        return None if exact is None else float((self._probe() - exact).abs().max() / exact.abs().max())

    def merge(self) -> None:
        """Add the adapter to the model's weights and remove its layers; `save` can still write the trained adapter.

        A 4-bit base is dequantised first, so the sum is the model that was trained, in ordinary layers.
        """
        dequantise(self._model)
        before = self._probe()
        trained = _peft().get_peft_model_state_dict(self._peft, save_embedding_layers=False)
        self._state = {name: tensor.detach().cpu().contiguous() for name, tensor in trained.items()}
        self._peft.merge_and_unload()
        after = self._probe()
        worst, scale = float((after - before).abs().max()), float(before.abs().max())
        if not worst <= MERGE_TOLERANCE * max(scale, 1.0):
            raise ModelError(
                f"merging the adapter into {type(self._model).__name__} changes its outputs by {worst:.2g}, so the saved model would not be"
                " the one that was trained; some layer reads its weight directly. Name other layers, such as [q_proj, v_proj]"
            )

    def _refuse_changed(self, before: Tensor) -> None:
        """Raise ModelError if the model with a new adapter, which adds 0, computes other states than before or none."""
        try:
            change = float((self._probe() - before).abs().max())
            worst, same = f"by {change:.2g}", change <= MERGE_TOLERANCE * max(1.0, float(before.abs().max()))
        # a layer that is more than a linear one may raise anything inside the adapter
        except Exception as error:
            if ends(error):
                raise
            worst, same = f"({reason_of(error)})", False
        if not same:
            raise ModelError(
                f"an adapter on these layers changes the outputs of {type(self._model).__name__} before training {worst}: some of them"
                " are no plain linear layers. Set lora.target_modules to the names of others, such as [q_proj, v_proj]"
            )

    @torch.no_grad()
    def _probe(self) -> Tensor:
        """Return hidden states of a short row."""
        model = self._model
        training = model.training
        model.eval()
        ids = torch.tensor([probe_ids(8, model.config.get_text_config().vocab_size)], device=model.device)
        hidden: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.float()
        model.train(training)
        return hidden

    def save(self, folder: Path) -> None:
        """Write the adapter that `merge` kept, as `PeftModel.from_pretrained(base, folder)` loads it."""
        config = self._peft.peft_config["default"]
        config.inference_mode = True
        # peft keeps names as a set, whose order differs between processes
        config.target_modules = sorted(config.target_modules)
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        save_file(self._state, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    def _refuse_head(self, model: PreTrainedModel) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        for place in (model.get_output_embeddings(), model.get_input_embeddings()):
            if isinstance(place, BaseTunerLayer):
                raise ConfigError(
                    "lora.target_modules: the embedding and the head over the vocabulary cannot have an adapter, because"
                    " log-probabilities are fused with the head's own weight; name other layers, or use all-linear"
                )


@contextmanager
def _keeps_first_values(deferred: bool) -> Iterator[None]:
    """Give a new adapter its own first values at the end of the block; peft moves them to the device of a deferred base, which has none."""
    from peft.tuners.lora.layer import LoraLayer

    if not deferred:
        yield
        return
    move, drawn = cast(Any, LoraLayer)._move_adapter_to_device_of_base_layer, list[tuple[torch.nn.Module, Tensor]]()

    def remember(layer: Any, name: str, device: torch.device | None = None) -> None:
        for half in (layer.lora_A, layer.lora_B):
            if name in half:
                drawn.append((half[name], half[name].weight.detach()))

    try:
        cast(Any, LoraLayer)._move_adapter_to_device_of_base_layer = remember
        yield
    finally:
        cast(Any, LoraLayer)._move_adapter_to_device_of_base_layer = move
    for part, value in drawn:
        part.weight = torch.nn.Parameter(value, requires_grad=cast(Tensor, part.weight).requires_grad)


def load_adapter(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return `base` with the adapter of a folder that `Adapter.save` wrote."""
    return cast(PreTrainedModel, _peft().PeftModel.from_pretrained(base, folder))


class BasePolicy(Policy):
    """The policy without its adapter, on the same weights: a reference that costs no memory."""

    def __init__(self, lm: PreTrainedModel, adapter: Adapter) -> None:
        super().__init__(lm)
        self.adapter = adapter

    def forward(
        self, batch: TokenBatch, temperature: float | Tensor = 1.0, replayed: Tensor | None = None
    ) -> PolicyOutput:
        with self.adapter.disabled():
            return super().forward(batch, temperature, replayed)


def adapter_parameters(config: Any, settings: LoraSettings) -> tuple[int, int]:
    """Return the parameters of an adapter, and those of its base that are kept in 4 bits, without allocating weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config))
        quantised = quantised_parameters(model) if settings.base_bits == 4 else 0
        return Adapter(model, replace(settings, base_bits=32)).parameters, quantised


def _linear_names(model: PreTrainedModel) -> list[str]:
    """Return the last names of the model's linear layers, except the heads."""
    head = model.get_output_embeddings()
    found = {
        name.rpartition(".")[2]
        for name, part in model.named_modules()
        if part is not head and isinstance(part, torch.nn.Linear) and name.rpartition(".")[2] != SCORE
    }
    return sorted(found)


def _modules(settings: LoraSettings) -> str | list[str]:
    return settings.target_modules if isinstance(settings.target_modules, str) else list(settings.target_modules)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError("lora needs the package peft, which is not installed. Type: pip install peft") from None
    return peft
