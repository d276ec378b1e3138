"""The reference pages name every parameter, environment variable, command and error, and no other."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import posttrain.errors as errors
from pipelines.config.params import Params, flatten, load_params

VARIABLE = re.compile(r"POSTTRAIN_[A-Z]+(?:_[A-Z]+)*")
PROGRAM = 'if __name__ == "__main__":'
INNER = {
    "pipelines.report.costs",
    "pipelines.runtime.fork_server",
    "pipelines.runtime.garbage",
    "pipelines.runtime.step",
    "pipelines.tracking.server",
}
"""Modules that only other commands start."""


@pytest.fixture(scope="module")
def generate(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", root / "docs" / "reference" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_parameters_has_every_section_key_and_value(root: Path, generate: ModuleType) -> None:
    page = generate.on_page_markdown("<!-- params -->")
    assert [name for name in Params.model_fields if f"\n## {name}\n" not in page] == []
    assert "| `sft.optimizer.learning_rate` | `0.002` | `LearningRate` | peak learning rate of AdamW |" in page
    named = set(re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE))
    fixed = {
        key for key in flatten(load_params(root / "params.yaml")) if not key.startswith(("algorithms.", "rewards."))
    }
    open_ended = (
        "data.",
        "sft.lora",
        "reward.lora",
        "align.lora",
        "gate.format",
        "gate.benchmarks",
        "gate.people",
        "tune.space",
    )
    open_ended += (
        "align.best_checkpoint",
        "align.on_policy.turns",
        "evaluation.turns",
        "evaluation.benchmarks",
        "evaluation.second_task",
    )
    assert sorted(key for key in fixed - named if not key.startswith(open_ended)) == []


def test_the_page_of_errors_has_every_error_with_its_exit_status(generate: ModuleType) -> None:
    page = generate.on_page_markdown("<!-- errors -->")
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.PosttrainError)]
    for kind in kinds:
        assert f"| `{kind.__name__}` | `{kind.__bases__[0].__name__}` | {kind.exit_code} |" in page


def test_every_environment_variable_is_documented_and_no_other(root: Path) -> None:
    used: set[str] = set()
    for folder in ("posttrain", "pipelines", "tasks", "flows", "infra"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in {".py", ".sh", ".yaml"}:
                used |= set(VARIABLE.findall(path.read_text(encoding="utf-8")))
    page = (root / "docs" / "reference" / "environment.md").read_text(encoding="utf-8")
    documented = set(VARIABLE.findall(page))
    assert sorted(used - {"POSTTRAIN_VLLM", "POSTTRAIN_OPENENV"} - documented) == []
    assert sorted(documented - used) == []


def test_every_command_is_documented_and_no_other(root: Path) -> None:
    page = (root / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):.*?## ", makefile, re.MULTILINE)) - {"help"}
    assert set(re.findall(r"`make ([a-z-]+)`", page)) == targets
    modules = {
        ".".join(path.relative_to(root).with_suffix("").parts)
        for folder in ("pipelines", "flows", "infra")
        for path in (root / folder).rglob("*.py")
        if PROGRAM in path.read_text(encoding="utf-8") and "aliases" not in path.parts
    }
    named = {f"pipelines.commands.{name}" for name in re.findall(r"`posttrain ([a-z]+)", page)}
    assert set(re.findall(r"`python -m ([\w.]+)", page)) | named == modules - INNER
