"""Load, check and write model folders: safetensors weights, configuration and tokenizer as `from_pretrained` reads them.

Example:
    >>> import tempfile
    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> folder = Path(tempfile.mkdtemp()) / "model"
    >>> model, tokenizer = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
    >>> save_model(model, tokenizer, folder, card="# A tiny model")
    >>> count_parameters(folder) == sum(p.numel() for p in load_policy(folder).parameters())
    True
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from posttrain.data.ends import as_list, differing_ends, written_ends
from posttrain.data.tokens import TextEncoder
from posttrain.errors import ModelError
from posttrain.files import replace
from posttrain.models.causal import check_policy
from posttrain.models.checkpointing import own_dropout_rates
from posttrain.models.deferred import after_fill, deferred_model
from posttrain.models.text_rules import as_written
from posttrain.models.weights import (
    broken_weights,
    check_folder,
    load_whole,
    pretrained,
    refuse_other_heads,
    weight_files,
)
from posttrain.settings import context_limit

if TYPE_CHECKING:
    from posttrain.models.lora import Adapter

ADAPTER = "adapter"
"""Subfolder with the adapter of a model that was trained with one, as `PeftModel.from_pretrained` loads it."""


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub id.

    Raises:
        ModelError: there is none, it has no end-of-sequence token, or its configuration is damaged.
    """
    check_folder(source)
    tokenizer, changed = as_written(pretrained(AutoTokenizer, source), source)
    if changed:
        _report_once(changed)
    if not set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):
        raise ModelError(
            f"{source}: there is no tokenizer (no tokenizer.json or vocabulary file), and transformers would make one up that knows no"
            " words; copy the tokenizer's files of the original model into the folder"
        )
    template = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else () if template is None else (template,)
    if not all(isinstance(text, str) for text in texts):
        raise ModelError(
            f"{source}: its chat template is {template!r:.60}, which is no text; correct chat_template.jinja, or the entry chat_template of"
            " tokenizer_config.json"
        )
    if not isinstance(tokenizer.model_max_length, int | float):
        raise ModelError(
            f"{source}: model_max_length of tokenizer_config.json is {tokenizer.model_max_length!r}, which is no number; correct it"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{source}: the tokenizer has no eos token, so a response could never end; set eos_token in its configuration"
        )
    if tokenizer.pad_token_id is None:
        # nothing is padded here; the saved tokenizer needs one for those who pad
        tokenizer.pad_token = tokenizer.eos_token
        tqdm.write(
            f"{source}: the tokenizer has no pad token; {tokenizer.eos_token!r} is saved as pad", file=sys.stderr
        )
    return tokenizer


def load_policy(source: str | Path, deferred: bool = False) -> PreTrainedModel:
    """Load a causal language model in float32 with dropout off.

    Args:
        deferred: leave the weights in their files for `shard` to read, if the files name them as the model does.

    Raises:
        ModelError: the folder cannot be used, or the logits are not the plain output of the head.
    """
    config = load_config(source)
    refuse_other_heads(config, source)
    model = deferred_model(AutoModelForCausalLM, config, source) if deferred else None
    if model is not None:
        after_fill(model, partial(check_policy, model, source))
    else:
        model = load_whole(AutoModelForCausalLM, source)
        check_policy(model, source)
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        _report_once(
            f"{source}: config.json asks for output_router_logits, but no objective here adds the routers' auxiliary loss; the metrics"
            " router/... show how evenly the experts are used"
        )
    return model


_PROBE = "It is 5 ,\n\n  so B."
"""A text with capital letters, line breaks, two spaces, and a space before a comma."""
_DISTORTING = (
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "sequence_bias",
    "guidance_scale",
    "watermarking_config",
    "min_length",
    "min_new_tokens",
    "exponential_decay_length_penalty",
    "typical_p",
    "num_beams",
    "penalty_alpha",
)
"""Generation settings that change the probabilities of tokens."""


@cache
def _report_once(message: str) -> None:
    tqdm.write(message, file=sys.stderr)


def load_config(source: str | Path, weights: bool = True) -> PreTrainedConfig:
    """Load the configuration of a folder or hub id, without its weights. `weights`: refuse a folder that has none."""
    check_folder(source, weights)
    config: PreTrainedConfig = pretrained(AutoConfig, source)
    if not isinstance(config.get_text_config(), PreTrainedConfig):
        raise ModelError(
            f"{source}: config.json has a part text_config, which {type(config).__name__} does not have; remove that part, or correct"
            " model_type"
        )
    return config


def count_parameters(folder: Path) -> int:
    """Return the number of weights in a folder; only the headers of the files are read."""
    total = 0
    for path in weight_files(folder):
        with safe_open(path, "pt") as weights:
            total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return total


def load_encoder(source: str | Path) -> TextEncoder:
    """Load the tokenizer and the model's context length.

    Raises:
        ModelError: the vocabulary does not fit the model's embedding.
    """
    tokenizer, config = load_tokenizer(source), load_config(source)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if vocabulary is not None and max(len(tokenizer), highest[1] + 1) > vocabulary:
        raise ModelError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens, up to the id {highest[1]} ({highest[0]!r}), and the model's embedding"
            f" has {vocabulary} rows; they do not match"
        )
    length = context_length(config) or int(tokenizer.model_max_length)
    configured = _configured_ends(source, config)
    encoder = TextEncoder(tokenizer, length, configured)
    if differing := differing_ends(tokenizer, encoder.end_origins, written_ends(Path(source))):
        _report_once(f"{source}: {differing}")
    read = encoder.text(encoder.completion(_PROBE))
    if read != _PROBE:
        _report_once(
            f"{source}: its tokenizer changes texts: {_PROBE!r} becomes {read!r}. The model never sees the difference, and rewards see the"
            " changed text"
        )
    return encoder


def _configured_ends(source: str | Path, config: PreTrainedConfig) -> list[int]:
    """Return the ends of sequence of generation_config.json and config.json."""
    file = Path(source) / "generation_config.json"
    try:
        settings = GenerationConfig.from_pretrained(str(source))
        generation = settings.eos_token_id
        if stops := getattr(settings, "stop_strings", None):
            _report_once(
                f"{file}: asks for stop_strings {stops!r:.100}, which are ignored here: an answer ends only at the tokens that end an"
                " answer. Training and evaluation do the same"
            )
        if changed := {
            name: value for name in _DISTORTING if (value := getattr(settings, name, None)) not in (None, 1.0, 0)
        }:
            asked = ", ".join(f"{name} {value}" for name, value in changed.items())
            _report_once(
                f"{file}: asks for {asked[:200]}. Answers here are sampled from the model's own probabilities, with the temperature"
                " of params.yaml; the settings stay in the folder for other tools"
            )
    except Exception as error:  # a hub id or an old model without the file raises OSError, a damaged file anything
        if file.exists() or not isinstance(error, OSError):
            raise ModelError(
                f"{file}: cannot be read ({' '.join(str(error).split())[:150]}), and it may name tokens that end an answer; correct it, or"
                " remove it"
            ) from error
        generation = None
    ids: list[int] = []
    for named in (generation, config.get_text_config().eos_token_id):
        listed = as_list(named)
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in listed):
            raise ModelError(
                f"{source}: eos_token_id is {named!r:.100}, and must be the id of a token, or a list of ids"
            )
        ids += listed
    return ids


def context_length(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a row may have at most, None if the configuration names no limit."""
    return context_limit(config.get_text_config().to_dict())


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str,
    extra_config: dict[str, Any] | None = None,
    adapter: Adapter | None = None,
    ends: Sequence[int] = (),
) -> None:
    """Write weights (safetensors), configuration, tokenizer and README.md; the folder is complete or absent.

    Args:
        ends: ids that end an answer; saved in generation_config.json, so that other tools stop there as well.
        adapter: already merged into `model`; its own weights are kept in the subfolder `adapter`.

    Raises:
        ModelError: a weight is not finite, or the disk is full or read-only.
    """
    if broken := broken_weights(model):
        raise ModelError(
            f"the model is not saved to {folder}: {broken}. Load it again and train with a lower learning rate"
        )
    partial = folder.with_name(folder.name + ".partial")
    _remove(partial)
    for key, value in (extra_config or {}).items():
        setattr(model.config, key, value)
    named = model.config.get_text_config()
    if ends and named.eos_token_id is not None and ends[0] not in as_list(named.eos_token_id):
        named.eos_token_id = list(ends) if len(ends) > 1 else ends[0]
    # HF_HUB_OFFLINE sets it; it describes how the tokenizer was loaded, and the same model must give the same bytes
    tokenizer.init_kwargs.pop("local_files_only", None)
    try:
        with own_dropout_rates(model):
            model.save_pretrained(partial)
        _write_ends(partial / "generation_config.json", ends)
        tokenizer.save_pretrained(partial)
        if adapter is not None:
            adapter.save(partial / ADAPTER)
        (partial / "README.md").write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        _remove(partial)
        raise ModelError(
            f"cannot write the model {folder}: {error}. Free space or give the right to write, then run again."
        ) from error
    except ValueError as error:
        _remove(partial)
        reason = " ".join(str(error).split())
        raise ModelError(
            f"cannot write the model {folder}: transformers refuses its settings ({reason:.300}). Correct model.lm.generation_config or"
            " model.lm.config, then save again."
        ) from error
    _remove(folder)
    replace(partial, folder)


def _write_ends(file: Path, ends: Sequence[int]) -> None:
    """Write the ends of an answer into the saved generation settings.

    transformers saves settings that were loaded and not changed as they are, but refuses changed ones that hold a temperature without
    sampling, as those of many published models do. So only the file gets the ends.
    """
    if ends and file.exists():
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings["eos_token_id"] = list(ends) if len(ends) > 1 else ends[0]
        file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _remove(folder: Path) -> None:
    import shutil

    if folder.exists():
        shutil.rmtree(folder)
