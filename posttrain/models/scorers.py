"""Load reward models and critics: a trunk with one scalar head, also for architectures that transformers gives none.

Example:
    >>> from posttrain.models.tiny import byte_tokenizer
    >>> scoring_pad(byte_tokenizer(64))
    '<|endoftext|>'
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from posttrain.errors import ModelError
from posttrain.models.architectures import language_model, no_score
from posttrain.models.deferred import after_fill, deferred_model, fill
from posttrain.models.folders import load_config, load_policy
from posttrain.models.weights import load_whole

HEAD = "score"
HEADS = "reward_heads"
"""Entry of config.json: number of heads of an ensemble."""
PENALTY = "reward_disagreement"
"""Entry of config.json: an ensemble's score is the heads' mean minus this number times their standard deviation."""
PROBE = (3, 4, 5, 3)


def load_scorer(source: str | Path, deferred: bool = False) -> PreTrainedModel:
    """Load a finished reward model: every weight, its head included, comes from the folder.

    Several heads are loaded only if the folder is marked as an ensemble (`reward_heads` in its config.json).

    Args:
        deferred: leave the weights of its trunk in their files for `shard` to read, if the files name them as the model does.

    Raises:
        ModelError: the folder lacks weights, has more than one label, or its score is not the plain output of a linear head.
    """
    config = load_config(source)
    if config.num_labels != getattr(config, HEADS, 1):
        if model := language_model(config.architectures):
            raise ModelError(f"{source}: {no_score(model)}")
        raise ModelError(
            f"{source}: a reward model gives one number, and this one has {config.num_labels} labels; give a model with num_labels = 1"
        )
    # the class of a composite model would read the configuration of its language model as its own
    model = deferred_model(_scorer_kind(config), config, source) if deferred else None
    if model is not None:
        fill(cast(nn.Module, model.score))
        after_fill(model, partial(_check_score, model, source))
        return model
    model = load_whole(_scorer_kind(config), source, config=config)
    _check_score(model, source)
    return model


def start_scorer(source: str | Path, heads: int = 1, deferred: bool = False) -> PreTrainedModel:
    """Load the trunk of a language model and put new scalar heads on it, random as the architecture's own initialisation."""
    lm = load_policy(source, deferred)
    config, head = lm.config, cast(nn.Module, lm.get_output_embeddings())
    wide = cast(Tensor, head.weight).shape[-1]
    if wide != _width(config):
        raise ModelError(
            f"{source}: the last hidden states of {type(lm).__name__} have {wide} numbers and its configuration names {_width(config)}, so"
            " no reward model or critic can be put on it; choose another architecture, such as Qwen3 or Llama"
        )
    config.num_labels = heads
    if heads > 1:
        setattr(config, HEADS, heads)
    with torch.device("meta"):
        scorer: Any = _scorer_kind(config)(config)
    setattr(scorer, scorer.base_model_prefix, lm.base_model)
    scorer.score = nn.Linear(_width(config), heads, bias=False, device="meta").to_empty(device="cpu")
    scorer._init_weights(scorer.score)
    config.architectures = [type(scorer).__name__]
    started: PreTrainedModel = scorer.eval()
    return started


def load_new_scorer(source: str | Path, deferred: bool = False) -> PreTrainedModel:
    """Load the trunk of a language model with a scalar head of zeros: a critic that starts from it gives every state the value 0."""
    model = start_scorer(source, deferred=deferred)
    nn.init.zeros_(cast(nn.Linear, model.score).weight)
    return model


def mean_head(model: PreTrainedModel) -> PreTrainedModel:
    """Return a reward model with the mean of its heads as its only head, as a critic needs it."""
    head = cast(nn.Linear, model.score)
    if head.out_features > 1:
        single = nn.Linear(head.in_features, 1, bias=head.bias is not None).to(head.weight)
        with torch.no_grad():
            single.weight.copy_(head.weight.mean(0, keepdim=True))
            if head.bias is not None:
                single.bias.copy_(head.bias.mean(0, keepdim=True))
        model.score = single
        model.config.num_labels = 1
        delattr(model.config, HEADS)
    return model


def scoring_pad(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a pad token for a reward model's folder.

    transformers reads a score at the last token that is not pad, and rows end with the end of sequence: pad must be a different token.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return str(tokenizer.pad_token)
    special = [tokenizer.bos_token_id, tokenizer.unk_token_id, *tokenizer.all_special_ids]
    other = [i for i in (*special, *range(len(tokenizer))) if i is not None and i != tokenizer.eos_token_id]
    return str(tokenizer.convert_ids_to_tokens(other[0]))


def _scorer_kind(config: PreTrainedConfig) -> Any:
    """Return transformers' own class if its trunk and head are of the usual kind, else one from the trunk and a linear head."""
    with torch.device("meta"):
        trunk = type(AutoModelForCausalLM.from_config(config).base_model)
        if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            own = AutoModelForSequenceClassification.from_config(config)
            if type(own.base_model) is trunk and isinstance(getattr(own, HEAD, None), nn.Linear):
                return type(own)
            tqdm.write(
                f"{type(own).__name__} of transformers has a different head than `{HEAD}`, and would leave it random; read scores from a"
                " folder of this reward model only with this library",
                file=sys.stderr,
            )
    return _scorer_class(trunk)


def _scorer_class(trunk: type) -> Any:
    """Return a sequence-classification class on `trunk`, named as transformers would name it."""
    name = trunk.__name__.removesuffix("Model") + "ForSequenceClassification"
    base = next(kind for kind in trunk.__mro__[1:] if issubclass(kind, PreTrainedModel))

    def initialise(self: Any, config: PreTrainedConfig) -> None:
        base.__init__(self, config)
        self.num_labels = config.num_labels
        setattr(self, self.base_model_prefix, trunk(config))
        self.score = nn.Linear(_width(config), config.num_labels or 1, bias=False)
        self.post_init()

    # transformers finds out from the source of the class's module which attention and which experts it supports
    members = {
        "__init__": initialise,
        "forward": _score_of_last_token,
        "__module__": trunk.__module__,
        "base_model_prefix": base.base_model_prefix or "model",
    }
    return type(name, (base,), members)


def _score_of_last_token(
    self: Any, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False
) -> SequenceClassifierOutput:
    """Return the score at the last token that is not pad, as transformers' classes do."""
    hidden = self.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache).last_hidden_state
    pad = self.config.get_text_config().pad_token_id
    count = input_ids.shape[1]
    positions = torch.arange(count, device=input_ids.device)
    real = torch.ones_like(input_ids) if pad is None else (input_ids != pad).to(positions.dtype)
    last = (positions * real).argmax(-1)
    scores = self.score(hidden[torch.arange(len(input_ids), device=input_ids.device), last])
    return SequenceClassifierOutput(logits=scores)


def _width(config: PreTrainedConfig) -> int:
    width = config.get_text_config().hidden_size
    assert isinstance(width, int)
    return width


def _without_adapter(head: Any) -> Any:
    """Return the head inside the wrapper that an adapter puts around it; it has not been trained yet."""
    return getattr(head, "original_module", head)


@torch.no_grad()
def _check_score(model: PreTrainedModel, source: str | Path) -> None:
    """Raise ModelError unless the score is the head's output for the last hidden state of the trunk."""
    ids = torch.tensor([PROBE])
    head, hidden = (
        _without_adapter(getattr(model, HEAD, None)),
        getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None),
    )
    if isinstance(head, nn.Linear) and hidden is not None:
        pad, model.config.get_text_config().pad_token_id = model.config.get_text_config().pad_token_id, None
        own = model(input_ids=ids, use_cache=False).logits.flatten()
        model.config.get_text_config().pad_token_id = pad
        plain = head(hidden[0, -1]).flatten()
        same = own.shape == plain.shape == (model.config.num_labels,)
        if same and bool(((own - plain).abs() <= 1e-4 * own.abs().clamp(min=1.0)).all()):
            return
    raise ModelError(
        f"{source}: the score of {type(model).__name__} is not the output of one linear layer `{HEAD}` at the last token, so it would be"
        " computed wrongly here; train a reward model by the stage reward, or give one whose class ends in ForSequenceClassification"
    )
