"""Every command of README and docs is run by a test, or marked with its requirement; every link leads somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from pipelines.commands import plan
from pipelines.commands.configure import configure

ONE_MACHINE = "tests/servers/test_one_machine.py"
PIPELINE = "tests/end_to_end/test_pipeline.py"
HERE = "tests/test_readme.py"
RETRAIN = "tests/flows/test_retrain.py"
TUNE, STUDY = "tests/end_to_end/test_tune.py", "tests/end_to_end/test_study.py"
BACKUP = "tests/servers/test_faults.py::test_the_databases_come_back_as_they_were_backed_up"
LABEL = "tests/pipelines/labelling/test_intake.py::test_judgements_of_two_people_who_disagree_are_taken_in"
NEEDS = {"needs: GPU", "needs: hub", "needs: server"}
VALID = "test_the_changes_that_the_pages_show_are_valid_and_can_be_planned"
COMMANDS = {
    "make demo": (f"{PIPELINE}::test_the_flow_in_another_clone_gives_the_same_lock", "flows.compare"),
    "make demo PANEL=reward_model": (
        "tests/pipelines/commands/test_panels.py::test_ppo_and_grpo_get_a_twin_on_the_reward_model",
        "flows.compare",
    ),
    "make ui": (f"{ONE_MACHINE}::test_ui_is_heard_on_loopback_alone", "pipelines.commands.ui"),
    "make serve": (f"{ONE_MACHINE}::test_serve_retrains_and_is_heard_on_loopback_alone", "flows.serve"),
    "make retrain": (f"{RETRAIN}::test_new_data_runs_the_chain_and_no_new_data_stops_at_once", "flows.retrain"),
    "source .venv/bin/activate": ("runs: changes only the caller's shell", ""),
    "mkdir -p inbox/preferences && cp more.jsonl inbox/preferences/more.part"
    " && mv inbox/preferences/more.part inbox/preferences/more.jsonl": (
        "tests/pipelines/commands/test_intake.py::test_bad_files_are_set_aside_with_their_reason_and_never_block_good_ones",
        "",
    ),
    "posttrain configure examples/gsm8k.yaml": (f"{HERE}::{VALID}", ""),
    "posttrain configure algorithms.ppo.options.kl_coefficient=0.1": (f"{HERE}::{VALID}", ""),
    "posttrain configure 'project.seeds=[0, 1, 2, 3, 4]'": (f"{HERE}::{VALID}", ""),
    "posttrain plan": (f"{HERE}::{VALID}", ""),
    "posttrain plan --device cuda --memory 80": (
        "tests/pipelines/commands/test_plan.py::test_a_plan_for_a_gpu_needs_no_gpu_no_weights_and_no_package",
        "",
    ),
    "python examples/train_grpo.py": (
        "tests/test_library.py::test_train_grpo_lifts_the_reward_in_under_twenty_lines",
        "",
    ),
    "posttrain chat champion": (
        "tests/pipelines/commands/test_chat.py::test_the_command_reads_lines_and_ends_with_them",
        "",
    ),
    "posttrain lineage champion": (f"{PIPELINE}::test_a_model_leads_to_its_data_and_a_row_to_its_models", ""),
    "make demo-real": ("needs: hub", "flows.compare"),
    'make test-slow ARGS="-m real_model"': ("needs: hub", "pytest"),
    "git checkout params.yaml": ("runs: changes only the caller's files", ""),
    "make label": (LABEL, ""),
    'make label ARGS="challenger sft"': (LABEL, ""),
    "make serve-model": (
        "tests/pipelines/serving/test_promotion.py::test_no_request_fails_while_a_promotion_happens",
        "",
    ),
    "export OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=$(cat .posttrain/secrets/model)": (
        "needs: server",
        "",
    ),
    'curl -s $OPENAI_BASE_URL/completions -H "Authorization: Bearer $OPENAI_API_KEY" -H "Content-Type: application/json"'
    """ -d '{"model": "champion", "prompt": "482+155=", "temperature": 0}'""": ("needs: server", ""),
    "dvc repro": (f"{PIPELINE}::test_a_second_repro_runs_no_stage", ""),
    "make test": ("runs: .ci/run", "pytest"),
    "make lint": ("runs: .ci/run", "pyrefly"),
    "make setup": ("runs: .ci/run", ""),
    "make test ARGS=tests/objectives/test_kl.py": ("runs: .ci/run", "pytest"),
    'make test ARGS="tests/objectives/test_kl.py -k by_hand"': ("runs: .ci/run", "pytest"),
    "make tune": (f"{TUNE}::test_tuning_trains_equal_trials_and_writes_sections_that_params_accept", "flows.tune"),
    "make calibrate": (
        "tests/pipelines/commands/test_calibrate.py::test_the_table_holds_both_methods_and_the_power",
        "pipelines.commands.calibrate",
    ),
    "make study NAME=group_size": (
        f"{STUDY}::test_a_study_runs_is_decided_and_is_up_to_date_afterwards",
        "flows.study",
    ),
    "make studies": (f"{STUDY}::test_a_study_runs_is_decided_and_is_up_to_date_afterwards", "flows.study"),
    "posttrain study": ("tests/pipelines/studies/test_studies.py::test_a_study_is_decided_saved_and_shown", ""),
    "python -m flows.study group_size --base my.yaml": (
        f"{STUDY}::test_a_study_runs_is_decided_and_is_up_to_date_afterwards",
        "",
    ),
    "posttrain configure model.source=path/to/model sft.epochs=2": (f"{HERE}::{VALID}", ""),
    "POSTTRAIN_ACCELERATE=infra/accelerate/fsdp2_gpu.yaml dvc repro": ("needs: GPU", ""),
    "python -m flows.node align@grpo-0 --rank 0 --hosts 2 --address HOST0 --config infra/accelerate/fsdp2_gpu.yaml": (
        "tests/end_to_end/test_node.py::test_a_stage_is_recorded_by_rank_0_and_goes_on_elsewhere_if_its_host_is_lost",
        "",
    ),
    "accelerate launch --config_file infra/accelerate/ddp_cpu.yaml -m pipelines.sft": (
        "tests/reliability/test_processes.py::test_accelerate_launch_by_hand",
        "",
    ),
    "infra/models/smollm2.sh": ("needs: hub", ""),
    "posttrain chat .posttrain/models/smollm2": ("needs: hub", ""),
    "posttrain configure model.source=.posttrain/models/smollm2": (f"{HERE}::{VALID}", ""),
    "posttrain configure 'data.sft={source: data/mine/chat.jsonl, rows: null}'"
    " 'data.problems={source: data/mine/tasks.jsonl, columns: {prompt: question}}' --absent": (f"{HERE}::{VALID}", ""),
    "posttrain configure examples/all_presets.yaml": (f"{HERE}::{VALID}", ""),
    "posttrain configure examples/tell_apart.yaml": (f"{HERE}::{VALID}", ""),
    "posttrain configure examples/gsm8k.yaml model.source=HuggingFaceTB/SmolLM2-135M"
    " data.sft.source=hub:openai/gsm8k:main data.problems.source=hub:openai/gsm8k:main": (f"{HERE}::{VALID}", ""),
    "HF_HUB_OFFLINE=0 dvc repro": ("needs: hub", ""),
    "export PREFECT_API_URL=http://127.0.0.1:4200/api"
    " PREFECT_API_AUTH_STRING=posttrain:$(cat .posttrain/secrets/prefect)": ("needs: server", ""),
    "export PREFECT_API_URL=http://127.0.0.1:4200/api": ("needs: server", ""),
    'export PREFECT_API_AUTH_STRING="posttrain:$(cat .posttrain/secrets/prefect)"': ("needs: server", ""),
    "python -m infra.servers backup backups/monday": (BACKUP, ""),
    "python -m infra.servers stop worker prefect mlflow": (BACKUP, ""),
    "python -m infra.servers restore backups/monday": (BACKUP, ""),
    "source .posttrain/servers/env && python -m infra.servers backup backups/before-upgrade": (BACKUP, ""),
    "make up": (BACKUP, "infra.servers"),
    "make down": ("needs: server", "infra.servers"),
    "git pull && make setup": ("needs: server", ""),
    "python -m pipelines.sft --replay .posttrain/runs/sft-\u2026/faults/fault-00000001": (
        "tests/reliability/test_faults.py::test_the_default_is_to_stop_and_to_say_which_row",
        "",
    ),
    "infra/vllm/setup.sh": ("needs: server", ""),
    "python examples/human_scores.py pandalm testset-v1.json data/raw/pandalm.jsonl": (
        "tests/data/test_human_scores.py::test_votes_become_scores_and_ties_and_dirt_are_left_out",
        "",
    ),
    "posttrain configure examples/human_scores.yaml": (f"{HERE}::{VALID}", ""),
    "dvc repro reward": (f"{PIPELINE}::test_a_new_reward_model_leaves_algorithms_that_do_not_read_it_up_to_date", ""),
    "export POSTTRAIN_JUDGE_URL=http://127.0.0.1:8000/v1": ("needs: server", ""),
    "pip install -c constraints.txt '.[openenv]'": ("needs: hub", ""),
    "export POSTTRAIN_OPENENV_GAME=http://127.0.0.1:8000": ("needs: server", ""),
    "python -m venv .venv-openenv && .venv-openenv/bin/pip install openenv": ("needs: hub", ""),
    "POSTTRAIN_OPENENV_PYTHON=$PWD/.venv-openenv/bin/python make test-slow ARGS=tests/environments/test_openenv_real.py": (
        "needs: server",
        "",
    ),
    "posttrain configure judge.model=champion": (f"{HERE}::{VALID}", ""),
    "export POSTTRAIN_JUDGE_URL=https://\u2026/v1 POSTTRAIN_JUDGE_API_KEY=\u2026": ("needs: server", ""),
    "posttrain judge SESSION --dry-run": (
        "tests/pipelines/labelling/test_judging.py::test_a_model_of_this_machine_judges_too_and_mistakes_are_words",
        "",
    ),
    "posttrain configure align.on_policy.rollouts.keep=all": (f"{HERE}::{VALID}", ""),
    "posttrain replay grpo-0 --step 37": (
        "tests/reliability/test_replay.py::test_a_replay_gives_the_numbers_of_the_run_and_names_the_first_that_differs",
        "",
    ),
    "posttrain configure algorithms.grpo.budget.rollouts.staleness=1 algorithms.grpo.options.anchor=rollout": (
        f"{HERE}::{VALID}",
        "",
    ),
    "posttrain configure align.on_policy.rollouts.engine=vllm": (f"{HERE}::{VALID}", ""),
    "dvc repro align@grpo-0": (
        "tests/end_to_end/test_vllm.py::test_the_stage_starts_its_server_resumes_after_a_kill_and_leaves_none_behind",
        "",
    ),
    "VLLM_SERVER_DEV_MODE=1 .venv-vllm/bin/python -m vllm.entrypoints.openai.api_server --model FOLDER --host 127.0.0.1 --port 8000"
    " --dtype float32 --generation-config vllm --logprobs-mode processed_logprobs": ("needs: server", ""),
    "POSTTRAIN_VLLM_URLS=http://127.0.0.1:8000,http://127.0.0.1:8001 dvc repro align@grpo-0": ("needs: server", ""),
}
"""A command, the test that runs it (or the requirement that a test lacks), and the module that a make target starts."""
ROOT = Path(__file__).parents[1]
EXPERIMENTS = "docs/experiments.md"
"""Its commands are typed as they are by tests/pipelines/test_experiments.py."""
PAGES = [
    page.relative_to(ROOT).as_posix()
    for page in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")))
    if re.search(r"```|~~~|<pre", page.read_text(encoding="utf-8")) and page.relative_to(ROOT).as_posix() != EXPERIMENTS
]
PYTHON = {
    "README.md": "tests/environments/test_one_file.py",
    "README.zh-CN.md": "tests/environments/test_one_file.py",
    "docs/library.md": "tests/test_library.py",
    "docs/environments.md": "tests/environments/test_turns_file.py",
    "docs/real-model.md": "tests/models/test_real_model.py",
}
"""The file of tests that runs the page's Python block."""
LANGUAGES = {"bash", "yaml", "python", "text"}
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def text(root: Path, name: str) -> str:
    return (root / name).read_text(encoding="utf-8")


def commands(page: str) -> list[str]:
    """Return the lines of the page's bash blocks, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    whole = re.sub(r"\s*\\\n\s*", " ", "".join(blocks))
    return [line.split("  #")[0].strip() for line in whole.splitlines() if line.strip()]


def unread_blocks(page: str) -> list[str]:
    """Return the lines of a page that begin a block, or a command in a block of text, which no test of this file would read."""
    fences = [line for line in page.splitlines() if re.match(r"\s*(`{3}|~{3})|.*<pre", line)]
    known = {f"```{language}" for language in LANGUAGES}
    wrong = [line for i, line in enumerate(fences) if line not in (known if i % 2 == 0 else {"```"})]
    outputs = "".join(re.findall(r"^```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    programs = {shlex.split(command)[0] for command in COMMANDS}
    return wrong + [line for line in outputs.splitlines() if line.removeprefix("$ ").split(" ")[0] in programs]


def test_every_block_has_a_language_and_is_read(root: Path) -> None:
    """A block without one, indented, or in a different kind of fence would be run by no test."""
    for name in (*PAGES, EXPERIMENTS):
        assert unread_blocks(text(root, name)) == [], name


@pytest.mark.parametrize(
    "fence", ["```", "  ```bash", "~~~bash", "````bash", "```sh", "```bash title", "<pre>", "```text"]
)
def test_a_planted_command_is_found(fence: str) -> None:
    page = f"```bash\nmake demo\n```\n\n{fence}\nposttrain plan --new\n{fence.rstrip('abehilstx ')}\n"
    assert unread_blocks(page) != []
    planted = "```bash\nposttrain plan --new\n```\n"
    assert unread_blocks(planted) == []
    assert [command for command in commands(planted) if command not in COMMANDS] == ["posttrain plan --new"]


def test_python_blocks_are_run_by_their_tests(root: Path) -> None:
    shown = {name for name in PAGES if "```python" in text(root, name)}
    assert shown == set(PYTHON)
    for name, file in PYTHON.items():
        read = name.replace(".zh-CN", "")
        blocks = [re.findall(r"```python\n(.*?)```", text(root, page), re.DOTALL) for page in (name, read)]
        assert blocks[0] == blocks[1], f"{name} shows different code from {read}"
        assert Path(read).name in text(root, file), f"{file} does not read {read}"


@pytest.mark.parametrize("name", PAGES)
def test_every_command_shown_has_a_test_that_runs_it(root: Path, name: str) -> None:
    shown = commands(text(root, name))
    assert [command for command in shown if command not in COMMANDS] == [], "add the command and its test to COMMANDS"


def test_no_command_is_listed_that_no_page_shows_and_every_test_exists(root: Path) -> None:
    shown = {command for name in PAGES for command in commands(text(root, name))}
    assert sorted(set(COMMANDS) - shown) == []
    for by, _ in COMMANDS.values():
        file, _, test = by.partition("::")
        assert by.startswith("runs: ") or by in NEEDS or f"def {test}(" in text(root, file), by


def test_make_starts_the_module_that_the_test_runs(root: Path) -> None:
    targets = {command: module for command, (_, module) in COMMANDS.items() if command.startswith("make ")}
    for command, module in targets.items():
        made = subprocess.run([*shlex.split(command), "-n"], cwd=root, capture_output=True, text=True, check=True)
        assert not module or f"-m {module} " in made.stdout.replace("\n", " ") + " ", command


def test_make_lists_its_commands_in_100_columns_and_what_set_up_costs(root: Path) -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # set inside `make test`
    made = subprocess.run(["make"], cwd=root, env=plain, capture_output=True, text=True, check=True)
    lines = made.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert all(line[:5] == "make " and line[17] == " " and line[18] != " " for line in lines)
    (setup,) = [line for line in lines if line.startswith("make setup ")]
    assert "3 GB" in setup
    assert "min by network" in setup


def test_the_changes_that_the_pages_show_are_valid_and_can_be_planned(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = tmp_path / "params.yaml"
    shown = {command for name in PAGES for command in commands(text(root, name)) if "posttrain configure" in command}
    for command in sorted(shown):
        params.write_text(text(root, "params.yaml"), encoding="utf-8")
        assert configure(params, [word for word in shlex.split(command)[2:] if word != "--absent"]) != [], command
    params.write_text(text(root, "params.yaml"), encoding="utf-8")
    configure(params, ["project.seeds=[0, 1, 2, 3, 4]"])
    assert plan.main(["--params", str(params)]) == 0
    assert "dpo" in capsys.readouterr().out


def test_every_link_of_a_readme_leads_to_a_file(root: Path) -> None:
    for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "SECURITY.md", "AGENTS.md"):
        missing = [to for to in LINK.findall(text(root, name)) if "://" not in to and not (root / to).exists()]
        assert [to for to in missing if to != "docs/security.md"] == [], name
