"""Convert a GGUF file, as llama.cpp uses it, into a model folder: quantised weights become float32, and the vocabulary a tokenizer.

A quantised file is an approximation of the model that it was made from. The folder has exactly the file's weights.

Example:
    >>> is_gguf("model.gguf"), is_gguf("models/base")
    (True, False)
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from posttrain.errors import ModelError
from posttrain.models.folders import save_model
from posttrain.models.gguf_writing import apply_rule, read_setting
from posttrain.models.weights import pretrained

MAGIC = b"GGUF"


def is_gguf(source: str | Path) -> bool:
    """Return True if the name is that of a GGUF file."""
    return str(source).endswith(".gguf")


def check_file(file: Path) -> None:
    """Raise ModelError if the file is missing, is not a GGUF file, or the package gguf is not installed."""
    if find_spec("gguf") is None:
        raise ModelError(f"{file}: reading GGUF files needs the package gguf; type: pip install 'posttrain[gguf]'")
    if not file.is_file():
        raise ModelError(f"{file}: no such file; check the path")
    with file.open("rb") as content:
        if content.read(len(MAGIC)) != MAGIC:
            raise ModelError(f"{file}: is not a GGUF file (its first bytes are not GGUF). Download it again.")


def load_gguf_config(file: Path) -> PreTrainedConfig:
    """Return the configuration of a GGUF file's model, without its weights. Raises ModelError as `convert` does."""
    check_file(file)
    config: PreTrainedConfig = pretrained(AutoConfig, file.parent, gguf_file=file.name)
    # transformers leaves the size of a head at the default of the model's type
    size = read_setting(file, f"{_text(file, 'general.architecture')}.attention.key_length")
    if size is not None and hasattr(config, "head_dim"):
        config.head_dim = int(size[0])
    return config


def convert(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a folder that `from_pretrained` loads.

    Raises:
        ModelError: the file is not a whole GGUF file, its architecture is not supported by transformers, its rule of splitting is not
            known, or the package gguf is missing.
    """
    check_file(file)
    options: dict[str, Any] = {"gguf_file": file.name}
    known = options | {"config": load_gguf_config(file), "dtype": torch.float32}
    loaded: PreTrainedModel = pretrained(AutoModelForCausalLM, file.parent, **known)
    rows = cast(torch.nn.Embedding, loaded.get_input_embeddings()).weight.shape[0]
    tokenizer = without_invented(pretrained(AutoTokenizer, file.parent, **options), rows)
    keep_rule(tokenizer, file)
    # transformers marks what it has loaded as quantised, and does not save such a model: the weights move into an unmarked one
    config = loaded.config
    delattr(config, "quantization_config")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    card = f"# {file.stem}\n\nConverted from `{file.name}`; its weights are those of the file, in float32.\n"
    save_model(model, tokenizer, folder, card)


def without_invented(tokenizer: Any, rows: int) -> Any:
    """Return the tokenizer without the special tokens that transformers adds to those of a file, such as `<|endoftext|>`.

    Args:
        rows: rows of the embedding; a token of the file has an id below it.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    added = [token for token in state["added_tokens"] if token["id"] < rows]
    if len(added) == len(state["added_tokens"]):
        return tokenizer
    names = {token["content"] for token in state["added_tokens"]} - {token["content"] for token in added}
    special = {role: name for role, name in tokenizer.special_tokens_map.items() if name not in names}
    backend = Tokenizer.from_str(json.dumps(state | {"added_tokens": added}))
    kept = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    kept.chat_template = tokenizer.chat_template
    return kept


def keep_rule(tokenizer: Any, file: Path) -> None:
    """Make the tokenizer split texts by the rule that the file names, as llama.cpp does.

    transformers takes GPT-2's rule for each name that it does not know, and the rule of the model's type for others.

    Raises:
        ModelError: the rule is not known here either, so the model would read other tokens than it was trained on.
    """
    named = {key: _text(file, f"tokenizer.ggml.{key}") for key in ("model", "pre")}
    if named["model"] != "gpt2":
        return
    if named["pre"] in (None, "default"):
        tqdm.write(f"{file}: names no rule by which texts are split into words; GPT-2's is used", file=sys.stderr)
    elif not apply_rule(named["pre"], tokenizer.backend_tokenizer):
        raise ModelError(
            f"{file}: splits texts into words by llama.cpp's rule {named['pre']!r}, which is not known here, so the model would read other"
            " tokens than it was trained on. Give the folder or hub id from which the file was made"
        )


def _text(file: Path, name: str) -> str | None:
    """Return a text among the file's settings; None if it has none of this name."""
    value = read_setting(file, name)
    return None if value is None else bytes(value).decode()


def main(arguments: list[str]) -> int:
    """Convert FILE into FOLDER; return the exit status."""
    if len(arguments) != 2:
        print("usage: python -m posttrain.models.gguf FILE.gguf FOLDER", file=sys.stderr)
        return 2
    try:
        convert(Path(arguments[0]), Path(arguments[1]))
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
