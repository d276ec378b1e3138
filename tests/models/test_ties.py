"""A head that the configuration ties to the embedding, and of which the files hold different values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from posttrain.api import load
from posttrain.errors import ModelError
from posttrain.models.deferred import deferred_model
from posttrain.models.folders import load_config, load_policy
from posttrain.models.ties import settle_ties
from tests.models import small
from tests.models.test_weights import folder, reconfigure, rewrite

__all__ = ["folder"]

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def test_a_head_of_its_own_is_kept_and_the_saved_configuration_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = torch.arange(5, 15)[None]
    expected = load_policy(folder)(rows).logits
    reconfigure(folder, tie_word_embeddings=True)
    model = load(folder)
    assert "tie_word_embeddings: true, and the files hold a head that differs" in capsys.readouterr().err
    assert torch.equal(model.lm(rows).logits, expected)
    model.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    assert saved["tie_word_embeddings"] is False
    assert torch.equal(
        load_file(tmp_path / "saved/model.safetensors")[HEAD], load_file(folder / "model.safetensors")[HEAD]
    )
    assert torch.equal(load_policy(tmp_path / "saved")(rows).logits, expected)
    assert "tie_word_embeddings" not in capsys.readouterr().err


def test_a_copy_of_the_embedding_stays_tied(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def copied(weights: dict[str, Any]) -> dict[str, Any]:
        return weights | {HEAD: weights[EMBEDDING].clone()}

    rewrite(folder, copied)
    reconfigure(folder, tie_word_embeddings=True)
    assert deferred_model(AutoModelForCausalLM, load_config(folder), folder) is None  # FSDP2 would train two weights
    model = load_policy(folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings
    assert "tie_word_embeddings" not in capsys.readouterr().err


def test_other_weights_with_two_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small.language_model()
    pairs = {"model.layers.1.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight"}
    monkeypatch.setattr(model, "get_expanded_tied_weights_keys", lambda **_: pairs)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight would be shared"):
        settle_ties(model, "folder")
