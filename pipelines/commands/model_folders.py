"""Check model folders without loading a model: their files, labels, layers and chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.commands.layers import HEADS, adapters, folder_tensors, weight_names, weight_shapes
from pipelines.config.params import Params
from pipelines.config.schema import LoraParams
from pipelines.data.sources import is_generator
from posttrain.data.conversations import has_marks
from posttrain.environments.base import built_in
from posttrain.errors import ModelError
from posttrain.models.architectures import language_model, no_score
from posttrain.text import nearest

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def model_problems(params: Params) -> Iterator[str]:
    """Yield a model source that is neither `tiny`, a whole model's folder, a GGUF file, nor of the form of a hub id."""
    named = {"model.source": params.model.source, "reward.source": params.reward.source}
    for key, source in named.items():
        if source in (None, "tiny"):
            continue
        if (Path(source) / "adapter_config.json").is_file():
            yield (
                f"{key} = {source!r}: the folder holds an adapter, a part of a model. Give the merged model, which `posttrain export"
                " MODEL PATH` writes, or peft's PeftModel.from_pretrained(…).merge_and_unload()"
            )
        elif (Path(source) / "config.json").is_file():
            yield from _labels(Path(source)) if key == "reward.source" else ()
        elif key == "model.source" and source.endswith(".gguf"):
            yield from _gguf(Path(source))
        elif Path(source).exists():
            inside = sorted(path.parent for path in Path(source).glob("*/config.json"))
            where = f"; models are in its subfolders: write {inside[-1].as_posix()}" if inside else ""
            yield f"{key} = {source!r}: the folder has no config.json, so it is not a model that transformers can load{where}"
        elif not HUB_ID.fullmatch(source) or source.startswith((".", "/")):
            yield f"{key} = {source!r}: no such folder, and not a hub id (OWNER/NAME)"
    if params.sft.train_on == "marked":
        yield from _marks(params)


def _gguf(file: Path) -> Iterator[str]:
    from posttrain.models.gguf import check_file

    try:
        check_file(file)
    except ModelError as error:
        yield f"model.source = {error}"


def _labels(folder: Path) -> Iterator[str]:
    """Yield that a reward model has several labels, of which none is the reward, or that it is a language model without a score."""
    config = _json(folder / "config.json")
    labels = config.get("id2label")
    tensors = folder_tensors(folder)
    model = language_model(config.get("architectures"))
    if model and "reward_heads" not in config and tensors and not any(name.startswith("score.") for name in tensors):
        yield f"reward.source = {folder.as_posix()!r}: {no_score(model)}"
    elif isinstance(labels, dict) and len(labels) > 1 and "reward_heads" not in config:
        yield (
            f"reward.source = {folder.as_posix()!r}: a reward model gives one number, and this one has {len(labels)} labels; give a model"
            " with num_labels = 1"
        )


def _marks(params: Params) -> Iterator[str]:
    """Yield why `sft.train_on: marked` finds no marks: rows of plain text, or a chat template without {% generation %}."""
    data = params.data.sft
    if is_generator(data.source) and data.source in built_in() and data.system is None and data.template is None:
        yield (
            f"sft.train_on = 'marked': the rows of {data.source!r} are plain text, which has no marks; set sft.train_on: completion, or"
            " data.sft.template"
        )
    template = _template(params.model.source)
    if template is not None and not has_marks(template):
        yield (
            f"sft.train_on = 'marked': the chat template of {params.model.source!r} has no {{% generation %}} marks; set sft.train_on:"
            " completion or last, or give a model whose template has them"
        )


def _template(source: str) -> str | None:
    """Return the chat template of a model's folder, None if it is not known before the model is loaded."""
    if source == "tiny":
        return ""  # tests/pipelines/commands/test_model_folders.py compares it with the built-in one
    folder = Path(source)
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    found = _json(folder / "tokenizer_config.json").get("chat_template", "")
    return found if isinstance(found, str) and (folder / "config.json").is_file() else None


def _json(path: Path) -> dict[str, Any]:
    """Return a JSON file's object; empty if there is none, which loading the model reports."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def adapter_problems(params: Params) -> Iterator[str]:
    """Yield layers that an adapter names and the model does not have; only a folder here, and the tiny model, are looked into."""
    shapes = weight_shapes(params)
    names = sorted(shapes)
    for key, lora in adapters(params).items():
        yield from _ranks(key, lora, shapes)
        for target in lora.target_modules if not isinstance(lora.target_modules, str) else ():
            if target.rpartition(".")[2] in HEADS:
                yield (
                    f"{key}.target_modules: {target!r} is the head or an embedding, which cannot have an adapter, because"
                    " log-probabilities are fused with the head's own weight; name other layers, or use all-linear"
                )
            elif names and not any(name == target or name.endswith(f".{target}") for name in names):
                ends = {name.rpartition(".")[2] for name in names} - {*HEADS}
                yield f"{key}.target_modules: the model has no layer {target!r}{nearest(target, ends)}"


def _ranks(key: str, lora: LoraParams, shapes: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """Yield a rank that exceeds the smaller side of every layer of a name, so that the adapter is larger than the layer's own rank."""
    every = {name: shape for name, shape in shapes.items() if name.rpartition(".")[2] not in HEADS}
    targets = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
    for target in targets:
        fitting = {n: s for n, s in every.items() if target == "all-linear" or n == target or n.endswith(f".{target}")}
        most, name = max(((min(shape), name) for name, shape in fitting.items()), default=(lora.rank, ""))
        if lora.rank > most:
            rows, columns = fitting[name]
            yield (
                f"{key}.rank = {lora.rank}: the layers {target!r} have at most {rows} x {columns} weights ({name}), so no more than"
                f" {most} ranks; set a rank far below {most}"
            )


def unknown_layers(params: Params) -> Iterator[str]:
    """Yield adapters whose layers cannot be compared yet, because the model is not a folder of safetensors files here."""
    if params.model.source == "tiny" or weight_names(params):
        return
    for key, lora in adapters(params).items():
        if not isinstance(lora.target_modules, str):
            named = ", ".join(lora.target_modules)
            yield (
                f"note: {key}.target_modules ({named}): the layers of {params.model.source!r} are known only once it is loaded; a name that"
                " matches none stops the first stage that trains an adapter. all-linear fits every model."
            )
