"""What `configure` and `preview` find out about models, adapters and trained tokens before a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipelines.commands.lookahead import problems
from pipelines.commands.notes import notes
from pipelines.commands.preview import preview
from pipelines.config.params import Params, load_params, parse_params
from pipelines.config.yaml_files import read_yaml
from pipelines.data.tables import FOLDER, write_rows
from posttrain.data.conversations import has_marks
from posttrain.models.tiny import CHAT_TEMPLATE

SIZES = {"hidden_size": 8, "intermediate_size": 8, "layers": 1, "heads": 1, "kv_heads": 1}
MARKED = "{% for m in messages %}{%- generation -%}{{ m.content }}{% endgeneration %}{% endfor %}"


@pytest.fixture
def here(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the project's params.yaml, as the working directory."""
    (tmp_path / "params.yaml").write_bytes((root / "params.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def changed(**over: Mapping[str, Any]) -> Params:
    """Return the parameters with some values of sections replaced."""
    tree = read_yaml("params.yaml")
    for section, values in over.items():
        tree[section].update(values)
    return parse_params(tree)


def folder(here: Path, name: str, **files: Any) -> str:
    """Write JSON files, or texts, into a new folder."""
    (here / name).mkdir()
    for stem, content in files.items():
        suffix = ".jinja" if isinstance(content, str) else ".json"
        text = content if isinstance(content, str) else json.dumps(content)
        (here / name / f"{stem}{suffix}").write_text(text)
    return name


def test_an_adapter_is_no_model_also_next_to_a_configuration(here: Path) -> None:
    for name, files in (("bare", {}), ("configured", {"config": {}})):
        source = folder(here, name, adapter_config={"peft_type": "LORA"}, **files)
        (found,) = problems(changed(model={"source": source}))
        assert f"model.source = {source!r}: the folder holds an adapter" in found


def test_a_reward_model_of_several_labels_is_refused_and_an_ensemble_is_not(here: Path) -> None:
    labels = {"id2label": {"0": "a", "1": "b"}}
    (found,) = problems(changed(reward={"source": folder(here, "two", config=labels)}))
    assert "gives one number, and this one has 2 labels" in found
    assert problems(changed(reward={"source": folder(here, "one", config={"id2label": {"0": "a"}})})) == []
    assert problems(changed(reward={"source": folder(here, "heads", config=labels | {"reward_heads": 2})})) == []


def test_a_language_model_is_no_reward_model(here: Path) -> None:
    import posttrain as pt

    pt.tiny(seed=0, **SIZES).save("models/base")
    (found,) = problems(changed(reward={"source": "models/base"}))
    assert found.startswith(
        "reward.source = 'models/base': the folder holds a language model (Qwen3ForCausalLM) without a score"
    )
    named = {"architectures": ["Qwen3ForCausalLM"], "id2label": {"0": "a", "1": "b"}}
    (found,) = problems(changed(reward={"source": folder(here, "no_weights", config=named)}))
    assert "this one has 2 labels" in found


def test_a_rank_beyond_the_layers_is_refused(here: Path) -> None:
    import posttrain as pt

    pt.tiny(seed=0, **SIZES).save("models/base")
    for rank, target, message in (
        (9, "all-linear", "the layers 'all-linear' have at most 8 x 8 weights (model.layers.0."),
        (
            9,
            ["q_proj"],
            "the layers 'q_proj' have at most 8 x 8 weights (model.layers.0.self_attn.q_proj), so no more than 8",
        ),
        (8, ["q_proj", "down_proj"], ""),
    ):
        lora = {"rank": rank, "alpha": 8, "target_modules": target}
        found = problems(changed(model={"source": "models/base"}, sft={"lora": lora}))
        assert [f"sft.lora.rank = {rank}: {message}" in line for line in found] == ([True] if message else [])
    (found,) = problems(changed(sft={"lora": {"rank": 4000, "alpha": 8, "target_modules": ["q_proj"]}}))
    size = load_params().model.tiny.hidden_size
    assert f"sft.lora.rank = 4000: the layers 'q_proj' have at most {size} x {size}" in found


def test_marks_are_looked_for_in_rows_and_template_before_a_run(here: Path) -> None:
    assert not has_marks(CHAT_TEMPLATE)
    marked = {"train_on": "marked"}
    found = problems(changed(sft=marked))
    assert [line.partition(";")[0] for line in found] == [
        "sft.train_on = 'marked': the rows of 'arithmetic' are plain text, which has no marks",
        "sft.train_on = 'marked': the chat template of 'tiny' has no {% generation %} marks",
    ]
    (here / "chat.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "gpt", "content": "b"}]}\n'
    )
    (here / "plain.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    chat, plain = ({"sft": {"source": f"{name}.jsonl"}} for name in ("chat", "plain"))
    in_file = {"source": folder(here, "file", config={}, chat_template=MARKED)}
    in_tokenizer = {"source": folder(here, "tokenizer", config={}, tokenizer_config={"chat_template": MARKED})}
    without = {"source": folder(here, "without", config={}, tokenizer_config={"chat_template": CHAT_TEMPLATE})}
    assert problems(changed(sft=marked, data=chat, model=in_file)) == []
    assert problems(changed(sft=marked, data=chat, model=in_tokenizer)) == []
    assert problems(changed(sft=marked, data=chat, model={"source": "owner/name"})) == []
    assert "of 'without' has no {% generation %}" in problems(changed(sft=marked, data=chat, model=without))[0]
    assert "the rows of data.sft are plain text" in problems(changed(sft=marked, data=plain, model=in_file))[0]


def test_layers_of_a_hub_id_are_said_to_be_unknown(here: Path) -> None:
    lora = {"rank": 2, "alpha": 4, "target_modules": ["query"]}
    found = [line for line in notes(changed(sft={"lora": lora}, model={"source": "owner/name"})) if "lora" in line]
    assert len(found) == 1
    assert (
        "note: sft.lora.target_modules (query): the layers of 'owner/name' are known only once it is loaded" in found[0]
    )
    every = changed(sft={"lora": lora | {"target_modules": "all-linear"}}, model={"source": "owner/name"})
    assert not any("lora" in line for line in notes(every))


def test_preview_shows_the_tokens_that_the_setting_trains(here: Path) -> None:
    import posttrain as pt

    pt.tiny(seed=0, hidden_size=8, intermediate_size=8, layers=1, heads=1, kv_heads=1).save("models/base")
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
    FOLDER.mkdir(parents=True)
    write_rows("sft", [{"id": 0, "prompt": turns[:1], "completion": turns[1:]}], FOLDER / "sft.parquet")
    shown = preview("sft", 0, colour=False)
    assert shown.startswith("sft 0, completion (sft.train_on: completion): 4 of ")
    assert shown.count("[[") == 2
    text = (here / "params.yaml").read_text()
    (here / "params.yaml").write_text(text.replace("train_on: completion", "train_on: last"))
    assert load_params().sft.train_on == "last"
    shown = preview("sft", 0, colour=False)
    assert shown.startswith("sft 0, completion (sft.train_on: last): 2 of ")
    assert shown.endswith("[[d<|im_end|>]]")
