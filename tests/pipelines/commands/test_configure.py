"""Changing params.yaml by overlay and by key."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest

from pipelines.commands.configure import configure, main
from pipelines.commands.lookahead import problems
from pipelines.commands.notes import notes
from pipelines.config.dvc_yaml import survives
from pipelines.config.params import load_params, parse_params
from pipelines.config.yaml_files import read_yaml
from posttrain.algorithms import PRESETS, OnPolicy
from posttrain.errors import ConfigError

BOMB = "{" + ", ".join(f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}" if i else "x"] * 9) + "]" for i in range(9)) + "}"


@pytest.fixture
def params(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(root / "params.yaml", tmp_path))


def test_keys_change_alone_and_comments_stay(params: Path) -> None:
    before = params.read_text()
    assert configure(params, ["sft.batch_size=7", "sft.optimizer.learning_rate=3e-5", "project.seeds=[0, 1]"]) == [
        "project.seeds: [0] -> [0, 1]",
        "sft.batch_size: 64 -> 7",
        "sft.optimizer.learning_rate: 0.002 -> 3e-05",
    ]
    changed = [(a, b) for a, b in zip(before.split("\n"), params.read_text().split("\n"), strict=True) if a != b]
    assert [b for _, b in changed] == [
        "  seeds: [0, 1]",
        "  batch_size: 7",
        "  optimizer: {learning_rate: 3e-5, schedule: cosine, warmup_steps: 20}",
    ]


def test_a_key_without_a_value_that_gets_a_mapping_is_shown_by_its_keys(params: Path) -> None:
    assert configure(params, ["sft.lora={rank: 4, alpha: 8}"]) == [
        "sft.lora.rank: (none) -> 4",
        "sft.lora.alpha: (none) -> 8",
    ]


def test_nothing_changes_nothing(params: Path) -> None:
    before = params.read_bytes()
    assert configure(params, ["sft.batch_size=64"]) == []
    assert params.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sft.epoch=2", r"sft\.epoch: unknown parameter; did you mean 'epochs'\?"),
        ("sft.epochs=two", r"sft\.epochs = 'two': should be a valid integer"),
        ("sft.epochs=7.0", r"sft\.epochs = 7\.0: should be a valid integer, and this has a decimal point; write 7"),
        ("sft.epochs=6.5", "and this is a fraction; write a whole number"),
        ("sft.epochs=true", "and this is a truth value; write a number, such as 3"),
        ("reward.enabled=yes", r"reward\.enabled = 'yes': .*, and YAML reads this as a text; write true"),
        ("reward.enabled=Off", "YAML reads this as a text; write false"),
        ("reward.enabled=1", "this is no truth value; write true or false"),
        ("sft.epochs=[", r"sft\.epochs=\[: not valid YAML"),
        ("sft.epochs=2020-13-45", "not valid YAML.*month must be in"),
        ("sft.epochs=" + "9" * 5000, r"sft\.epochs=9{69}: not valid YAML"),
        ("sft.epochs=" + "[" * 600, "nested too deeply"),
        (f"sft.epochs={BOMB}", "its aliases .* stand for"),
        ("sft..epochs=1", "write dotted.key=value"),
        ("nowhere.yaml", "cannot read nowhere.yaml"),
        ("evaluation.accuracy=null", r"evaluation\.accuracy: missing"),
    ],
)
def test_what_would_not_be_valid_is_refused_and_not_written(params: Path, change: str, message: str) -> None:
    before = params.read_bytes()
    with pytest.raises(ConfigError, match=message):
        configure(params, ["sft.batch_size=7", change])
    assert params.read_bytes() == before


def test_two_commands_at_once_keep_the_changes_of_both(params: Path) -> None:
    start = threading.Barrier(2)

    def change(key: str) -> None:
        start.wait()
        configure(params, [f"{key}=9"])

    commands = [threading.Thread(target=change, args=(key,)) for key in ("sft.epochs", "reward.epochs")]
    for each in commands:
        each.start()
    for each in commands:
        each.join()
    after = load_params(params)
    assert (after.sft.epochs, after.reward.epochs) == (9, 9)


@pytest.mark.parametrize("name", ["gsm8k", "stories"])
def test_every_shipped_overlay_is_valid_and_says_what_it_changes(root: Path, params: Path, name: str) -> None:
    changes = configure(params, [str(root / "examples" / f"{name}.yaml")])
    assert "model.source: 'tiny' -> '../shared/data/stories260k'" in changes
    assert load_params(params).model.source == "../shared/data/stories260k"
    assert configure(params, [str(root / "examples" / f"{name}.yaml")]) == []


NOT_MEASURED = {"sapo", "gmpo", "dppo_tv", "dppo_kl", "maxrl", "distill"}
"""Presets without a row in docs/learning.md."""


def test_the_overlay_of_all_presets_names_every_one_that_the_slow_tier_measures(root: Path, params: Path) -> None:
    configure(params, [str(root / "examples" / "all_presets.yaml")])
    loaded = load_params(params)
    sampling = {name for name, record in PRESETS.items() if isinstance(record, OnPolicy)} - NOT_MEASURED
    assert {loaded.algorithm(name).name for name in loaded.project.algorithms} == sampling | {
        "dpo",
        "dpo_soft",
        "grpo_pairs",
    }
    assert loaded.project.seeds == [0, 1, 2]


def test_the_overlay_of_reward_models_has_both_algorithms_on_both_rewards(root: Path, params: Path) -> None:
    configure(params, [str(root / "examples" / "reward_model.yaml")])
    loaded = load_params(params)
    trained = {name: loaded.algorithms[name].rewards for name in loaded.project.algorithms}
    answer, model = {"answer": 1.0, "rm": 0.0}, {"rm": 1.0, "answer": 0.0}
    assert trained == {"ppo": answer, "grpo": answer, "ppo_rm": model, "grpo_rm": model}


def test_the_overlay_of_the_real_model_asks_all_tables_in_the_same_words(root: Path, params: Path) -> None:
    configure(params, [str(root / "examples" / "smollm2.yaml")])
    loaded = load_params(params)
    tables = [loaded.data.sft, loaded.data.preferences, loaded.data.problems, loaded.data.evaluation]
    assert {(table.source, table.system) for table in tables} == {
        ("word_problems", "You solve word problems in one line.")
    }
    assert loaded.model.source == ".posttrain/models/smollm2"
    assert {name: loaded.algorithms[name].rewards for name in loaded.project.algorithms} == {
        "dpo": None, "grpo": {"answer": 1.0}, "chord": {"answer": 1.0},
    }  # fmt: skip
    assert configure(params, [str(root / "examples" / "smollm2.yaml")]) == []


def test_the_setting_that_tells_algorithms_apart_is_the_demo_stopped_early(params: Path, root: Path) -> None:
    before = load_params(params)
    configure(params, [str(root / "examples" / "tell_apart.yaml")])
    loaded = load_params(params)
    assert (loaded.data, loaded.sft, loaded.model) == (before.data, before.sft, before.model)
    assert len(loaded.project.seeds) == 5
    assert loaded.align.on_policy.steps < before.align.on_policy.steps / 2


def test_every_shipped_overlay_is_tested(root: Path) -> None:
    assert sorted(path.stem for path in (root / "examples").glob("*.yaml")) == [
        "all_presets",
        "gsm8k",
        "human_scores",
        "reasoning_gym",
        "reward_model",
        "smollm2",
        "stories",
        "tell_apart",
    ]


def test_the_command_checks_without_writing(params: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, epochs = params.read_bytes(), load_params(params).sft.epochs
    assert main(["--check", "--params", str(params), "sft.epochs=99"]) == 0
    assert capsys.readouterr().out == f"sft.epochs: {epochs} -> 99\n"
    assert main(["--params", str(params), "sft.epochs=none"]) == 2
    assert capsys.readouterr().err.startswith("error: params.yaml: sft.epochs = 'none'")
    assert params.read_bytes() == before


BRACES = "rewards:\n  brevity: {function: my_package.rewards:brevity, arguments: {target: 200}, on_failure: skip}\n"


def test_an_import_path_in_braces_is_written_so_that_dvc_reads_and_writes_it(params: Path, tmp_path: Path) -> None:
    assert not survives(BRACES)
    assert not survives(BRACES.replace("my_package.rewards:brevity", "'my_package.rewards:brevity'"))
    overlay = tmp_path / "mine.yaml"
    overlay.write_text(BRACES)
    changes = configure(params, [str(overlay)])
    assert "rewards.brevity: rewritten without braces, in which DVC cannot read it" in changes
    text = params.read_text()
    assert survives(text)
    assert "  brevity:\n    function: my_package.rewards:brevity\n    arguments: {target: 200}\n" in text
    assert configure(params, []) == []


def test_a_file_that_dvc_cannot_read_is_found_and_mended(params: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params.write_text(
        params.read_text().replace(
            "  rm: {function: reward_model}\n", f"  rm: {{function: reward_model}}\n{BRACES[9:]}"
        )
    )
    assert main(["--check", "--absent", "--params", str(params)]) == 0
    assert "rewards.brevity: rewritten without braces" in capsys.readouterr().out
    assert not survives(params.read_text())
    assert main(["--absent", "--params", str(params)]) == 0
    assert survives(params.read_text())


JUDGES = """
def brevity(prompts, completions):
    return [0.0 for _ in prompts]
def swapped(completions, prompts, answer, *, target=3, **columns):
    return [0.0 for _ in prompts]
def needs(prompts, completions, gold, **columns):
    return [0.0 for _ in prompts]
def named(completions, **columns):
    return [0.0 for _ in completions]
def alone(completions):
    return [0.0 for _ in completions]
backwards = lambda completions, prompts, /, **columns: []
made = make()
raise SystemExit("configure ran the module")
"""


@pytest.fixture
def absent(params: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a package of rewards and a file of pairs with almost the right columns."""
    folder = params.parent
    monkeypatch.chdir(folder)
    (folder / "judges.py").write_text(JUDGES)
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_scores": 1.0, "rejected_scores": 0.0}
    (folder / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    return params


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "rewards.mine={function: 'no_package.judges:f'}",
            "rewards.mine.function = 'no_package.judges:f': cannot be imported",
        ),
        ("rewards.mine={function: 'judges:brevty'}", "judges.py defines no brevty; did you mean 'brevity'?"),
        ("model.source=./nowhere.gguf", "model.source = nowhere.gguf: no such file; check the path"),
        ("model.source=./nowhere", "model.source = './nowhere': no such folder, and not a hub id (OWNER/NAME)"),
        ("reward.source=./nowhere", "reward.source = './nowhere': no such folder, and not a hub id (OWNER/NAME)"),
        ("data.sft={source: missing.jsonl}", "missing.jsonl"),
        ("data.sft={source: 'hub:a/b/c/d'}", "a hub data set is written hub:OWNER/NAME"),
        ("data.preferences={source: pairs.jsonl}", "is the column 'chosen_scores' meant to be 'chosen_score'?"),
    ],
)
def test_what_a_run_would_not_find_is_refused_at_once(
    absent: Path, change: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = absent.read_bytes()
    assert main(["--params", str(absent), change]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Nothing was written" in said
    assert absent.read_bytes() == before
    assert main(["--params", str(absent), "--absent", change]) == 0


def test_what_is_there_is_written(absent: Path) -> None:
    columns = "{prompt: prompt, chosen: chosen, rejected: rejected, chosen_score: chosen_scores, rejected_score: rejected_scores}"
    changes = [
        "rewards.mine={function: 'judges:brevity'}",
        f"data.preferences={{source: pairs.jsonl, columns: {columns}}}",
    ]
    assert main(["--params", str(absent), *changes]) == 0
    assert load_params(absent).rewards["mine"].function == "judges:brevity"


def test_rewards_are_bound_as_they_are_called_without_running_their_module(absent: Path) -> None:
    mine = {
        "brevity": "{function: 'judges:brevity'}",
        "needs": "{function: 'judges:needs'}",
        "given": "{function: 'judges:needs', arguments: {gold: 1}}",
        "swapped": "{function: 'judges:swapped', arguments: {target: 4}}",
        "named": "{function: 'judges:named'}",
        "alone": "{function: 'judges:alone'}",
        "backwards": "{function: 'judges:backwards'}",
        "made": "{function: 'judges:made'}",
        "measured": "{function: 'judges:brevity'}",
    }
    configure(absent, [f"rewards.{name}={section}" for name, section in mine.items()])
    weights = {name: 1.0 for name in mine if name != "measured"}
    configure(absent, [f"algorithms.grpo.rewards.{name}={weight}" for name, weight in weights.items()])
    found = problems(load_params(absent))
    assert [line.partition(".function")[0] for line in found] == [
        "rewards.brevity",
        "rewards.needs",
        "rewards.alone",
        "rewards.backwards",
    ]
    assert (
        "got an unexpected keyword argument 'answer'. It is called as f(prompts, completions, **columns), and the rows"
        in found[0]
    )
    assert "missing a required argument: 'gold'" in found[1]
    assert "in rewards.needs.arguments" in found[1]
    assert "its parameters are (completions), and it is called as f(prompts, completions, **columns)" in found[2]
    assert "its parameters are (completions, prompts, /, **columns), and" in found[3]


def test_a_parameter_without_its_value_says_what_to_write(params: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft.epochs"]) == 2
    assert "To change a parameter, write sft.epochs=VALUE." in capsys.readouterr().err
    assert main(["nofile.yaml"]) == 2
    assert "the project's root" not in capsys.readouterr().err


def test_a_reward_that_nothing_computes_is_named(params: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise it would be written and valid, and have no effect."""
    overlay = params.parent / "reward.yaml"
    overlay.write_text(
        "rewards:\n  brevity:\n    function: posttrain.rewards.functions:length\n    arguments: {target: 9, tolerance: 3}\n"
    )
    assert main([str(overlay), "--params", str(params)]) == 0
    said = capsys.readouterr().out
    assert "rewards.brevity.function: (none) -> 'posttrain.rewards.functions:length'" in said
    assert "warning: rewards.brevity is computed by nothing. To train on it, give it a weight" in said
    assert main(["algorithms.other={preset: grpo, rewards: {brevity: 1.0}}", "--params", str(params)]) == 0
    assert "computed by nothing; other would use it, but project.algorithms does not list it" in capsys.readouterr().out
    assert main(["algorithms.grpo.rewards.brevity=1.0", "--params", str(params)]) == 0
    assert "warning" not in capsys.readouterr().out
    assert (
        main(
            [
                "algorithms.grpo.rewards.brevity=null",
                "evaluation.rewards=[answer, rm, brevity]",
                "--params",
                str(params),
            ]
        )
        == 0
    )
    assert "warning" not in capsys.readouterr().out


def test_a_learned_accuracy_and_prompts_that_a_step_repeats_are_named(root: Path) -> None:
    tree = read_yaml(root / "params.yaml")
    assert not notes(parse_params(tree))
    tree["evaluation"]["accuracy"] = "rm"
    tree["align"]["on_policy"]["prompts_per_step"] = 100
    tree["data"]["problems"]["rows"] = 64
    said = "\n".join(notes(parse_params(tree)))
    assert "warning: evaluation.accuracy = rm ranks the models by the mean score of the learned reward" in said
    assert (
        "grpo: each step draws 100 prompts and there are 64 problems, so a step holds some of them more than once"
        in said
    )


def test_a_judge_without_a_server_and_missing_packages_are_named_at_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(root / "params.yaml", tmp_path / "params.yaml")
    changes = tmp_path / "changes.yaml"
    changes.write_text(
        "rewards: {graded: {function: judge, arguments: {model: small}}}\nevaluation: {benchmarks: {tasks: [mine]}}\n"
        "align: {on_policy: {optimizer: {moment_bits: 8}}, lora: {rank: 4, alpha: 8, base_bits: 4}}\n",
        encoding="utf-8",
    )
    for module in ("posttrain.evaluation.harness", "posttrain.extras"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: None)
    monkeypatch.delenv("POSTTRAIN_JUDGE_URL", raising=False)
    configure(tmp_path / "params.yaml", [str(changes)])
    found = problems(load_params(tmp_path / "params.yaml"))
    assert len(found) == 4
    assert found[0].startswith("rewards.graded: ")
    assert "set POSTTRAIN_JUDGE_URL" in found[0]
    assert found[1].startswith("evaluation.benchmarks needs the package lm-eval; install it with")
    assert "'.[benchmarks]'" in found[1]
    assert found[2].startswith("algorithms.ppo.budget.optimizer.moment_bits = 8 needs the package torchao; install it")
    assert found[3].startswith("align.lora.base_bits = 4 needs the package bitsandbytes; install it")


@pytest.mark.parametrize(
    ("answers", "kind", "message"),
    [
        (["City 0", "City 7"], "number", "none of the first 2 answers can be compared, e.g. 'City 0', so validation"),
        (["City 0", "12"], "number", None),
        (["12", "7"], "choice", "the reward `answer` compares a choice; give it arguments: {kind: text} for words"),
        (["B", "(c)"], "choice", None),
        (["City 0", "City 7"], "text", None),
    ],
)
def test_gold_answers_that_validation_would_set_aside_are_found_on_the_first_rows(
    absent: Path, answers: list[str], kind: str, message: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.dumps({"question": f"{i}?", "answer": answer}) for i, answer in enumerate(answers)]
    (absent.parent / "asked.jsonl").write_text("\n".join(rows))
    given = [f"rewards.answer.arguments={{kind: {kind}}}", "data.evaluation={source: asked.jsonl}"]
    assert main([*given, "--params", str(absent)]) == (0 if message is None else 2)
    said = capsys.readouterr().err
    assert (message or "") in said
    if message and kind == "number":
        assert "`posttrain configure 'rewards.answer.arguments={kind: text}'`" in said
