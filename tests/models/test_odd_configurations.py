"""Folders whose configuration, shards or template no model could have are refused in words that name the entry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from posttrain.api import load
from posttrain.errors import ModelError
from posttrain.models.folders import load_config, load_encoder, load_policy
from posttrain.planning import sizes
from tests.models.test_weights import folder, reconfigure

__all__ = ["folder"]


@pytest.mark.parametrize("change", [{"model_type": "t5"}, {"hidden_act": "nosuch"}])
def test_a_plan_of_no_language_model_is_refused(folder: Path, change: dict[str, Any]) -> None:
    reconfigure(folder, **change)
    with pytest.raises(ModelError, match="transformers makes no language model of this configuration"):
        sizes(load_config(folder))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_config": {"hidden_size": 16}}, r"config.json has a part text_config, which Qwen3Config does not have"),
        (
            {"architectures": ["Qwen3ForSequenceClassification", 3]},
            r"Qwen3ForSequenceClassification is no language model",
        ),
        ({"rms_norm_eps": -1.0}, r"the logits of Qwen3ForCausalLM are NaN or infinite although its weights are finite"),
    ],
)
def test_an_odd_configuration_is_refused_in_words(folder: Path, change: dict[str, Any], words: str) -> None:
    reconfigure(folder, **change)
    with pytest.raises(ModelError, match=words):
        load_policy(folder)


def test_shards_without_their_index_are_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    for i, part in enumerate((names[:5], names[5:])):
        file = folder / f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"2 files of weights .* without model.safetensors.index.json"):
        load_policy(folder)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["model.fp16.safetensors"], r"its weights are in model\.fp16\.safetensors, .* rename the file: mv .*/model\.safetensors"),
        (["model.bf16.safetensors", "model.fp16.safetensors"], r"\(model\.bf16.*, model\.fp16.*\) .* several precisions, rename one"),
        (["a.fp16-00001-of-00001.safetensors", "model.safetensors.index.fp16.json"], r"rename the index: mv .*index\.fp16\.json"),
    ],
)  # fmt: skip
def test_weights_with_a_precision_in_their_names_are_named(folder: Path, names: list[str], words: str) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).write_bytes(whole if name.endswith("tensors") else b"{}")
    with pytest.raises(ModelError, match=words):
        load_policy(folder)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(("text", "words"), [("[1]", "a list"), ("null", "null"), ("2", "a single value")])
def test_settings_that_are_no_mapping_are_named(folder: Path, name: str, text: str, words: str) -> None:
    (folder / name).write_text(text)
    for read in (load_policy, load_encoder):
        with pytest.raises(ModelError, match=rf"{name}: holds {words} instead of a mapping of settings"):
            read(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0 and must be a whole number above 0"),
        ({"rope_scaling": {"rope_type": "su", "factor": 2.0}}, "rope_type is 'su', which transformers does not know"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, "factor is '4' and must be a number"),
    ],
)
def test_an_entry_of_the_configuration_that_no_model_has_is_named(
    folder: Path, change: dict[str, Any], words: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=words):
        load_policy(folder)


def test_a_chat_template_that_is_no_text_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": 3}))
    with pytest.raises(ModelError, match="its chat template is 3, which is no text"):
        load_encoder(folder)


@pytest.mark.parametrize("ends", [[2, 1], None])
def test_generation_settings_without_effect_are_saved_as_they_are(folder: Path, tmp_path: Path, ends: Any) -> None:
    settings = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "eos_token_id": ends}
    (folder / "generation_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    loaded = load(folder)
    loaded.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert {name: saved.get(name) for name in settings} == settings | {"eos_token_id": ends or 2}
    assert load(tmp_path / "saved").encoder.ends == loaded.encoder.ends
    loaded.lm.generation_config.temperature = 0.5
    with pytest.raises(ModelError, match=r"transformers refuses its settings .*`temperature`"):
        loaded.save(tmp_path / "other")
    assert not [*tmp_path.glob("other*")]
