"""Export a model folder as merged weights, an adapter or a GGUF file, each read back and compared with what was trained.

The proof is a log-probability probe: the exported weights are loaded by transformers or peft, and give every token of a few fixed rows a
log-probability. The differences from the trained model are reported in nats, and an export beyond its limit is removed.

Example:
    >>> from tempfile import TemporaryDirectory
    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> model, tokenizer = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
    >>> with TemporaryDirectory() as folder:
    ...     model.save_pretrained(Path(folder, "model"))
    ...     written = tokenizer.save_pretrained(Path(folder, "model"))
    ...     print(export_merged(Path(folder, "model"), Path(folder, "copy")))
    0 nats a token, at most 0
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.errors import ModelError
from posttrain.models.folders import ADAPTER, load_encoder, load_policy
from posttrain.models.gguf_writing import Precision, read_tokens, write_gguf
from posttrain.models.lora import load_adapter
from posttrain.models.weights import pretrained
from posttrain.settings import context_limit

ROWS, TOKENS = 4, 48
"""Size of the probe: rows, and tokens of a row."""
LIMITS = {"merged": 1e-4, "adapter": 1e-2, "f32": 1e-3, "f16": 0.05, "q8_0": 0.5}
"""Most nats by which the mean log-probability of a token may differ. Rounding stays far below; a wrong layer gives more than 1."""


@dataclass(frozen=True)
class Drift:
    """Differences of the probe's log-probabilities from those of the trained model, in nats a token."""

    mean: float
    largest: float

    def __str__(self) -> str:
        return f"{self.mean:.2g} nats a token, at most {self.largest:.2g}"


def export_merged(source: Path, target: Path) -> Drift:
    """Copy the folder without its adapter, as `from_pretrained` loads it."""

    if target.resolve().is_relative_to(source.resolve()):
        raise ModelError(
            f"{target} is inside {source}, so the model would hold a copy of itself; name a path outside of it"
        )

    def write() -> PreTrainedModel:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(ADAPTER))
        return load_policy(target)

    return _proven(load_policy(source), target, "merged", write)


def export_adapter(source: Path, base: Path, target: Path) -> Drift:
    """Copy the adapter. The proof loads it onto `base`, the model that it was trained on.

    Raises:
        ModelError: the model was trained without one.
    """
    if not (source / ADAPTER).is_dir():
        raise ModelError(
            f"{source} has no adapter: all of its weights were trained (lora: null). Export a merged folder."
        )

    def write() -> PreTrainedModel:
        shutil.copytree(source / ADAPTER, target)
        return load_adapter(load_policy(base), target)

    return _proven(load_policy(source), target, "adapter", write)


def export_gguf(source: Path, target: Path, precision: Precision) -> Drift:
    """Write a GGUF file. The proof reads it with transformers.

    Raises:
        ModelError: the architecture or the tokenizer has no form as GGUF here.
    """
    model, encoder = load_policy(source), load_encoder(source)

    def write() -> PreTrainedModel:
        write_gguf(model, encoder, target, precision)
        # the folder's configuration is used, because transformers does not read all of it from a file
        options = {"gguf_file": target.name, "config": model.config, "dtype": torch.float32}
        read: PreTrainedModel = pretrained(AutoModelForCausalLM, target.parent, **options)
        return read

    drift = _proven(model, target, precision, write)
    _compare_tokenizers(target, encoder.tokenizer)
    return drift


def _proven(model: PreTrainedModel, target: Path, kind: str, write: Callable[[], PreTrainedModel]) -> Drift:
    """Write the export, load it, and return the drift; remove it if that exceeds its limit."""
    if target.exists():
        raise ModelError(f"{target} exists already; name another path, or remove it")
    expected = probe(model)
    try:
        difference = (probe(_written(target, write)) - expected).abs()
        drift = Drift(float(difference.mean()), float(difference.max()))
        if not drift.mean <= LIMITS[kind]:
            raise ModelError(
                f"the export {target} gives other log-probabilities than the trained model ({drift}; the limit is {LIMITS[kind]:g}), so it"
                " was removed"
            )
    except BaseException:
        if target.is_dir():
            shutil.rmtree(target)
        elif target.parent.is_dir():
            target.unlink(missing_ok=True)
        raise
    return drift


def _written(target: Path, write: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Write the export and return what is loaded from it. Raises ModelError if the disk is full, or the folder cannot be made."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return write()
    except OSError as error:
        # shutil.Error holds (source, target, reason) of each file that it could not copy
        files = error.args[0] if isinstance(error, shutil.Error) and error.args else None
        reason = files[0][2] if isinstance(files, list) and files else error
        raise ModelError(f"cannot write {target}: {reason}. Free space, or name a path that can be written") from error


@torch.no_grad()
def probe(model: PreTrainedModel) -> Tensor:
    """Return the log-probability of every token of the probe's rows but the first, [rows, tokens - 1] float32."""
    model.eval()
    text = model.config.get_text_config()
    length = min(TOKENS, context_limit(text.to_dict()) or TOKENS)
    ids = torch.randint(0, text.vocab_size, (ROWS, length), generator=torch.Generator().manual_seed(0))
    logits: Tensor = model(input_ids=ids).logits
    return logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def _compare_tokenizers(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError, and remove the file, unless the file has the tokens of the tokenizer under the same ids."""
    written = read_tokens(file)
    if any(number >= len(written) or written[number] != token for token, number in tokenizer.get_vocab().items()):
        file.unlink()
        raise ModelError(
            f"{file}: tokens have other ids than in the trained model, or no row of its embedding ({len(written)} rows), so it was removed"
        )


def trained_on(source: Path) -> str | None:
    """Return the path or id of the model that a folder's adapter was trained on; None without an adapter."""
    configuration = source / ADAPTER / "adapter_config.json"
    if not configuration.is_file():
        return None
    named = json.loads(configuration.read_text(encoding="utf-8"))["base_model_name_or_path"]
    return str(named) if named else None
