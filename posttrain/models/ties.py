"""Weights that a configuration ties, and of which the files hold two different values.

transformers keeps both values then; vLLM, llama.cpp and older programs read one. So the configuration is made to agree with the weights.

Example:
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    >>> untied(model)
    []
    >>> model.lm_head.weight = torch.nn.Parameter(torch.ones(8, 8))
    >>> untied(model)
    ['lm_head.weight']
"""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedModel

from posttrain.errors import ModelError


def untied(model: PreTrainedModel) -> list[str]:
    """Return the weights that the configuration ties to others, and whose values are their own."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    every = dict(model.named_parameters(remove_duplicate=False))
    return sorted(
        name for name, other in tied.items() if name in every and other in every and every[name] is not every[other]
    )


def settle_ties(model: PreTrainedModel, source: str | Path) -> None:
    """Make the configuration agree with the loaded weights, and report it: what is saved is then read alike by every program.

    Raises:
        ModelError: weights other than the head have two values, so no setting of the configuration describes the model.
    """
    if not untied(model):
        return
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    if names := untied(model):
        raise ModelError(
            f"{source}: {', '.join(names[:4])} would be shared with other weights, and the files hold two different values, so it cannot"
            " be known which is the model's; save the model again with save_pretrained"
        )
    tqdm.write(
        f"{source}: config.json says tie_word_embeddings: true, and the files hold a head that differs from the embedding. The head is"
        " kept, as transformers does, and the model is saved with tie_word_embeddings: false, so that other programs read it, too. If the"
        " head is a left-over, remove its weight from the files",
        file=sys.stderr,
    )
