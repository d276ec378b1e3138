"""Talk to real tiny models: streamed answers are those that the model gives, and choices become preferences."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import posttrain as pt
from pipelines.commands.chat import Chat, Sampling, main, open_models, plain_text_hint, store
from pipelines.data.files import read_file
from pipelines.data.handover import needs_scores
from pipelines.data.tables import write_rows
from posttrain.errors import DataError

SIZES = {"hidden_size": 16, "intermediate_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "max_length": 200}
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture
def models() -> list[tuple[str, pt.Model]]:
    """Return two different models that complete plain text."""
    found = [(name, pt.tiny(seed=seed, **SIZES)) for seed, name in enumerate(("one", "two"))]
    for _, model in found:
        model.encoder.tokenizer.chat_template = None
    return found


@pytest.fixture
def templated(models: list[tuple[str, pt.Model]]) -> list[tuple[str, pt.Model]]:
    for _, model in models:
        model.encoder.tokenizer.chat_template = TEMPLATE
    return models


def settings(**given: Any) -> Sampling:
    return Sampling(**{"temperature": 1.0, "max_new_tokens": 8} | given)


def talk(models: list[tuple[str, pt.Model]], inbox: Path, *lines: str, **given: Any) -> tuple[Chat, str]:
    """Return the chat after these lines, and all that it wrote."""
    shown: list[str] = []
    waiting: Iterator[str] = iter([*lines, "/quit"])
    chat = Chat(models, settings(**given), str(inbox), lambda _: next(waiting), shown.append)
    chat.run()
    return chat, "".join(shown)


def test_a_line_that_is_no_text_is_not_sent(models: list[tuple[str, pt.Model]], tmp_path: Path) -> None:
    chat, shown = talk(models[:1], tmp_path, b"a\xff".decode("utf-8", "surrogateescape"))
    assert chat.turns == 0
    assert shown.startswith("not sent: the line has bytes that are no UTF-8")


def test_a_message_beyond_the_context_says_what_to_type_and_ends_nothing(
    models: list[tuple[str, pt.Model]], tmp_path: Path
) -> None:
    chat, shown = talk(models[:1], tmp_path, "x" * 201, "1+1=")
    assert "the conversation has 201 tokens and the model's context 200; type /new" in shown
    assert chat.turns == 1


def test_quit_ends_at_the_choice_too(models: list[tuple[str, pt.Model]], tmp_path: Path) -> None:
    with pytest.raises(EOFError):
        talk(models, tmp_path, "1+1=", "/quit", "2+2=")
    assert list(tmp_path.iterdir()) == []


def test_a_plain_models_prompts_are_shown(models: list[tuple[str, pt.Model]], tmp_path: Path) -> None:
    model = models[0][1]
    assert plain_text_hint(tmp_path, model) == ["the model continues plain text; begin as its training prompts do"]
    table = tmp_path / "data/valid/evaluation.parquet"
    table.parent.mkdir(parents=True)
    write_rows("evaluation", [{"prompt": "7+5=\x1b[2J", "answer": "12"}], table)
    (line,) = plain_text_hint(tmp_path, model)
    assert line.endswith(r"begin as its training prompts do, e.g. 7+5=\x1b[2J")
    model.encoder.tokenizer.chat_template = TEMPLATE
    assert plain_text_hint(tmp_path, model) == []


def test_a_greedy_answer_is_the_models_own(templated: list[tuple[str, pt.Model]], tmp_path: Path) -> None:
    chat, _ = talk(templated[:1], tmp_path, "1+1=", temperature=0.0)
    (answer,) = templated[0][1].generate([[{"role": "user", "content": "1+1="}]], max_new_tokens=8)
    assert chat.history[-1] == {"role": "assistant", "content": answer}


def test_seed_and_turn_decide_a_sampled_answer(templated: list[tuple[str, pt.Model]], tmp_path: Path) -> None:
    first, second, other = (talk(templated[:1], tmp_path, "hello", "hello", seed=seed)[0].history for seed in (0, 0, 1))
    assert first == second != other
    assert [message["role"] for message in first] == ["user", "assistant"] * 2
    assert first[1] != first[3], "a second turn draws other numbers"


def test_a_choice_is_a_preference_whatever_the_order(templated: list[tuple[str, pt.Model]], tmp_path: Path) -> None:
    places = set()
    for seed in range(8):
        chat, shown = talk(templated, tmp_path / str(seed), "hello", "2", seed=seed, system="be kind")
        (row,) = read_file(tmp_path / str(seed) / "preferences" / "chat-0001.jsonl")
        second = shown.split("2 was ")[1][:3]
        single = [talk([m], tmp_path, "hello", seed=seed, system="be kind")[0].history[-1] for m in templated]
        better, worse = (single[0], single[1]) if second == "one" else (single[1], single[0])
        assert row["prompt"] == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
        assert (row["chosen"], row["rejected"]) == ([better], [worse])
        assert chat.history[-1] == row["chosen"][0], "the conversation goes on with the better answer"
        places.add(second)
    assert places == {"one", "two"}, "the order changes"


def test_a_tie_keeps_nothing_and_a_slip_is_asked_again(templated: list[tuple[str, pt.Model]], tmp_path: Path) -> None:
    chat, shown = talk(templated, tmp_path, "hello", "3", "=", "/new")
    assert "'3' is none of: 1, 2, =, s" in shown
    assert not list(tmp_path.rglob("*.jsonl"))
    assert chat.history == []


def test_choices_are_numbered_files_and_plain_text_stays_plain(tmp_path: Path) -> None:
    paths = [Path(store(str(tmp_path), "1+1=", "2", "3", scores=scores)) for scores in (True, False)]
    assert [path.name for path in paths] == ["chat-0001.jsonl", "chat-0002.jsonl"]
    first, second = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    assert second == {"prompt": "1+1=", "chosen": "2", "rejected": "3", "form": "canonical"}
    assert first == second | {"chosen_score": 1.0, "rejected_score": 0.0}


def test_two_commands_at_once_keep_all_choices(tmp_path: Path) -> None:
    start = threading.Barrier(2)

    def choose(name: str) -> None:
        start.wait()
        for i in range(20):
            store(str(tmp_path), f"{name} {i}", "2", "3")

    commands = [threading.Thread(target=choose, args=(name,)) for name in ("first", "second")]
    for each in commands:
        each.start()
    for each in commands:
        each.join()
    kept = {json.loads(path.read_text(encoding="utf-8"))["prompt"] for path in tmp_path.rglob("*.jsonl")}
    assert kept == {f"{name} {i}" for name in ("first", "second") for i in range(20)}


def test_a_choice_has_the_form_of_the_projects_preferences(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without scores, a file for a table that has them would be refused."""
    monkeypatch.chdir(root)
    assert needs_scores(root)


def test_models_of_two_kinds_are_not_compared(models: list[tuple[str, pt.Model]], root: Path, tmp_path: Path) -> None:
    models[0][1].save(tmp_path / "plain")
    models[1][1].encoder.tokenizer.chat_template = TEMPLATE
    models[1][1].save(tmp_path / "chat")
    with pytest.raises(DataError, match="only one has a chat template"):
        open_models(root, [str(tmp_path / "plain"), str(tmp_path / "chat")])


def test_the_command_reads_lines_and_ends_with_them(
    models: list[tuple[str, pt.Model]],
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models[0][1].save(tmp_path / "model")
    command = [sys.executable, "-m", "pipelines.commands", "chat", str(tmp_path / "model"), "--max-new-tokens", "4"]
    done = subprocess.run([*command, "--temperature", "0"], cwd=root, input="1+1=\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{tmp_path / 'model'}> "), "one line an answer, without prompts"
    monkeypatch.chdir(root)
    assert main([str(tmp_path / "model"), "--system", "x"]) == 2
    assert "has no chat template, so it has no system message; leave it out" in capsys.readouterr().err
