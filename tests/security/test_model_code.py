"""Code that comes with a model folder is never run, whatever its configuration asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import ModelError
from posttrain.models.folders import load_policy, load_tokenizer, save_model
from posttrain.models.tiny import byte_tokenizer
from tests.models import small

CODE = "from pathlib import Path\nPath({witness!r}).write_text('run')\n"


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def hostile(tmp_path: Path) -> tuple[Path, Path]:
    """A model folder with code that its configurations name, and the file that the code would write."""
    folder, witness = tmp_path / "model", tmp_path / "witness"
    save_model(small.language_model(), byte_tokenizer(64), folder, "")
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil"):
        (folder / f"{name}.py").write_text(CODE.format(witness=str(witness)))
    classes = {"AutoModelForCausalLM": "modeling_evil.Model", "AutoConfig": "configuration_evil.Config"}
    edit(folder / "config.json", auto_map=classes)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.Tokenizer", None]})
    return folder, witness


def test_a_known_architecture_is_loaded_by_the_library_and_not_by_the_folder(hostile: tuple[Path, Path]) -> None:
    folder, witness = hostile
    load_policy(folder)
    load_tokenizer(folder)
    assert not witness.exists()


def test_an_architecture_that_only_the_folder_knows_is_refused(hostile: tuple[Path, Path]) -> None:
    folder, witness = hostile
    edit(folder / "config.json", model_type="evil", architectures=["Model"])
    with pytest.raises(ModelError):
        load_policy(folder)
    assert not witness.exists()
