"""Uploading a model: the folder, its card, and the command, without a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from pipelines.commands.configure import configure
from pipelines.commands.forecast import is_present
from pipelines.commands.push import main, upload_command
from pipelines.config.params import load_params
from pipelines.runtime.identity import input_digests
from pipelines.runtime.journal import Journal
from pipelines.runtime.param_tracking import declared_values


@pytest.fixture
def project(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "params.yaml").write_bytes((root / "params.yaml").read_bytes())
    model = tmp_path / "models/align/grpo-0"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "README.md").write_text("---\ntags: [posttrain]\n---\n\n# Aligned with grpo\n")
    evaluated = tmp_path / "runs/evaluate/grpo-0"
    evaluated.mkdir(parents=True)
    numbers = {
        "accuracy": 0.75,
        "accuracy_low": 0.7,
        "accuracy_high": 0.8,
        "entropy": 0.25,
    }  # names of older evaluations
    numbers |= {"reward": {"answer": {"mean": 0.5}, "rm": {"mean": 2.0}}}
    (evaluated / "metrics.json").write_text(json.dumps(numbers))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_dry_run_shows_the_folder_the_card_and_the_command(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure(project / "params.yaml", ["model.source=org/base", "data.sft={source: 'hub:org/chats'}"])
    assert main(["grpo-0", "me/mine", "--license", "apache-2.0", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("README.md\nconfig.json\nmodel.safetensors\n")
    assert "hf upload me/mine .posttrain/push/mine . --private" in said
    card = ModelCard.load(project / ".posttrain/push/mine/README.md")
    assert (card.data.license, card.data.base_model, card.data.datasets) == ("apache-2.0", "org/base", ["org/chats"])
    assert card.data.library_name == "transformers"
    assert {result.metric_name: result.metric_value for result in card.data.eval_results} == {
        "sampled_accuracy": 0.5, "greedy_accuracy": 0.75, "greedy_accuracy_low": 0.7, "greedy_accuracy_high": 0.8,
    }  # fmt: skip
    for text in (
        "# Aligned with grpo",
        "|---|---|\n| sampled_accuracy | 0.5 |\n",
        "| reward/rm/mean | 2 |",
        "## Intended use",
    ):
        assert text in card.text
    assert (project / "models/align/grpo-0/README.md").read_text().startswith("---\ntags: [posttrain]")


def test_a_built_in_model_names_no_base_and_no_data_of_the_hub(project: Path) -> None:
    assert main(["grpo-0", "me/mine", "--dry-run"]) == 0
    card = ModelCard.load(project / ".posttrain/push/mine/README.md")
    assert (card.data.base_model, card.data.datasets) == (None, None)
    assert "- base model: `tiny`, random weights of this project (seed 0)\n- `data.sft`: arithmetic\n" in card.text


@pytest.mark.parametrize(
    ("model", "options", "tables"),
    [
        ("sft", {}, ["sft"]),
        ("dpo-0", {"preset": "dpo"}, ["sft", "preferences"]),
        ("kto-0", {"preset": "kto"}, ["sft", "preferences"]),
        ("grpo-0", {"preset": "grpo"}, ["sft", "problems"]),
        ("zero-0", {"preset": "grpo", "start": "base"}, ["problems"]),
        ("chord-0", {"preset": "chord", "start": "base"}, ["sft", "problems"]),
    ],
)
def test_the_card_names_base_model_and_data_before_and_after_the_evaluation(
    project: Path, model: str, options: dict[str, str], tables: list[str]
) -> None:
    settings = [f"data.{table}={{source: 'hub:org/{table}'}}" for table in ("sft", "preferences", "problems")]
    configure(project / "params.yaml", ["model.source=org/base", *settings])
    folder = project / ("models/sft" if model == "sft" else f"models/align/{model}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    journal = Journal(project / f"runs/align/{model}/journal.jsonl")
    algorithm = model.removesuffix("-0")
    journal.append({"kind": "params", "values": {f"algorithms.{algorithm}.{key}": v for key, v in options.items()}})
    journal.close()
    for evaluated in (False, True):
        results = project / "runs/evaluate" / model / "metrics.json"
        results.unlink(missing_ok=True)
        if evaluated:
            results.parent.mkdir(parents=True, exist_ok=True)
            results.write_text('{"accuracy": 0.75}')
        assert main([model, "me/mine", "--dry-run"]) == 0
        card = ModelCard.load(project / ".posttrain/push/mine/README.md")
        assert (card.data.base_model, card.data.datasets) == ("org/base", [f"org/{table}" for table in tables])
        assert "- base model: [org/base](https://huggingface.co/org/base)" in card.text
        assert [f"`data.{table}`" in card.text for table in tables] == [True] * len(tables)


def test_the_card_of_a_model_without_an_evaluation_says_so(project: Path) -> None:
    (project / "runs/evaluate/grpo-0/metrics.json").unlink()
    assert main(["grpo-0", "me/mine", "--dry-run"]) == 0
    text = ModelCard.load(project / ".posttrain/push/mine/README.md").text
    assert "This model has not been evaluated yet; `dvc repro` does it on held-out problems" in text
    assert "| measure |" not in text
    assert "It was evaluated" not in text


@pytest.mark.parametrize(
    ("model", "repository", "message"),
    [
        ("dpo-0", "me/mine", "models/align/dpo-0 holds no model. Trained here: grpo-0."),
        ("grpo-0", "mine", "'mine': not the name of a repository; write OWNER/NAME"),
    ],
)
def test_what_cannot_be_uploaded_is_refused(
    project: Path, model: str, repository: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([model, repository]) == 2
    assert message in capsys.readouterr().err


def test_a_model_of_other_data_is_refused_because_its_card_would_name_the_wrong_ones(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = project / "data/valid/evaluation.parquet"
    table.parent.mkdir(parents=True)
    for name in ("sft", "evaluation"):
        table.with_name(f"{name}.parquet").write_bytes(b"rows")
    inputs = input_digests("push", ["data/valid/evaluation.parquet"])
    journal = Journal(project / "runs/evaluate/grpo-0/journal.jsonl")
    journal.append({"kind": "start", "stage": "evaluate", "inputs": inputs})
    journal.close()
    used = Journal(project / "runs/ingest/journal.jsonl")
    used.append({"kind": "params", "values": declared_values(load_params(project / "params.yaml"), ("data",))})
    used.close()
    assert main(["models/align/grpo-0", "me/mine", "--dry-run"]) == 0
    configure(project / "params.yaml", ["data.evaluation.rows=30"])
    assert main(["grpo-0", "me/mine", "--dry-run"]) == 2
    assert "grpo-0 was made from other data than the present: params.yaml changed since" in capsys.readouterr().err
    table.write_bytes(b"other rows")
    assert main(["grpo-0", "me/mine", "--dry-run"]) == 2
    assert "other data than the present: data/valid/evaluation.parquet changed since" in capsys.readouterr().err


def test_a_parameter_that_an_earlier_version_did_not_record_counts_as_its_default(project: Path) -> None:
    valid = project / "data/valid/sft.parquet"
    valid.parent.mkdir(parents=True)
    valid.write_bytes(b"rows")
    path = project / "params.yaml"
    recorded = declared_values(load_params(path), ("data",))
    assert (recorded.pop("data.experts"), recorded.pop("data.sft.split")) == (None, None)
    recorded["data.problems.split"] = "train"  # the default of earlier versions
    journal = Journal(project / "runs/ingest/journal.jsonl")
    journal.append({"kind": "params", "values": recorded})
    journal.close()
    assert is_present(load_params(path))
    for change, back in (
        ("data.preferences.heldout=0.1", "data.preferences.heldout=0.2"),
        ("data.sft.split=test", "data.sft.split=null"),
    ):
        configure(path, [change])
        assert not is_present(load_params(path))
        configure(path, [back])
        assert is_present(load_params(path))


def test_a_repository_is_private_unless_asked_otherwise() -> None:
    assert "--private" in upload_command("me/mine", Path("x"), public=False)
    assert "--no-private" in upload_command("me/mine", Path("x"), public=True)
