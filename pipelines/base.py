"""Create the base model: a tiny Qwen3 built from a seed (default), a local folder, a GGUF file, or a hub id.

    python -m pipelines.base

Writes models/base in safetensors, ready for `from_pretrained`. Loss masks come from lengths, so a model learns its eos token even if
its tokenizer uses eos as the pad token.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pipelines.config.params import load_params
from pipelines.config.schema import ModelParams
from pipelines.runtime.run import Run
from pipelines.runtime.step import main

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = Path("models/base")


def run(run: Run) -> None:
    from posttrain.data.ends import described
    from posttrain.models.folders import load_encoder, load_policy, save_model
    from posttrain.models.tiny import TinyShape, tiny_model

    run.recorder.ready()
    params = run.context.params.model
    tokenizer: PreTrainedTokenizerBase
    ends: tuple[int, ...] = ()
    if params.source == "tiny":
        t = params.tiny
        shape = TinyShape(
            t.hidden_size,
            t.intermediate_size,
            t.layers,
            t.heads,
            t.kv_heads,
            t.max_length,
            t.experts,
            t.experts_per_token,
        )
        model, tokenizer = tiny_model(shape, params.seed)
    else:
        with model_folder(params.source) as folder:
            encoder = load_encoder(folder)
            model, tokenizer, ends = load_policy(folder), encoder.tokenizer, encoder.ends
        print(f"base: an answer ends with {described(tokenizer, encoder.end_origins)}", flush=True)
    parameters = sum(p.numel() for p in model.parameters())
    card = f"# Base model\n\n{model.config.model_type}, {parameters:,} parameters, source `{_origin(params)}`.\n"
    save_model(model, tokenizer, FOLDER, card, ends=ends)
    run.outputs.model(FOLDER)
    run.recorder.summary({"parameters": parameters, "vocabulary": len(tokenizer)})


@contextmanager
def model_folder(source: str) -> Iterator[str]:
    """Yield the source itself or, for a GGUF file, a temporary folder with the converted model."""
    from posttrain.models.gguf import convert, is_gguf

    if not is_gguf(source):
        yield source
        return
    with TemporaryDirectory(prefix="posttrain-") as scratch:
        folder = Path(scratch) / "model"
        convert(Path(source), folder)
        yield str(folder)


def _origin(params: ModelParams) -> str:
    """Return the model's origin for the model card."""
    return f"built from seed {params.seed}" if params.source == "tiny" else Path(params.source).name


def inputs(args: Namespace) -> list[str]:
    """Return the local model folder or file, which is part of the step's identity; a seed or a hub id is already a parameter."""
    source = load_params(args.params).model.source
    return [source] if source != "tiny" and Path(source).exists() else []


if __name__ == "__main__":
    main(run, "base", params=("model",), inputs=inputs)
