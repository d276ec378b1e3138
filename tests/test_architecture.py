"""The arrows run one way: flows -> tasks -> pipelines -> posttrain."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

FORBIDDEN = {
    "posttrain": {
        "prefect",
        "mlflow",
        "dvc",
        "great_expectations",
        "pandas",
        "pydantic",
        "ruamel",
        "pipelines",
        "tasks",
        "flows",
    },
    "pipelines": {"prefect", "tasks", "flows"},
    "tasks": {"flows", "posttrain.training", "posttrain.models", "pipelines.sft", "pipelines.align"},
}
BARE_BOX = {"torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "tqdm", "posttrain"}
EXTRAS = {
    "math_verify": ["posttrain/rewards/mathematics.py"],
    "peft": ["posttrain/models/lora.py"],
    "scipy": ["posttrain/evaluation/crossed.py"],
}
"""What the library does without until it is asked for, and the only files that may import it."""


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_no_arrow_runs_backwards(root: Path, package: str) -> None:
    offences = [
        f"{path.relative_to(root)} imports {module}"
        for path in sorted((root / package).rglob("*.py"))
        for module in sorted(imports(path))
        if any(module == f or module.startswith(f + ".") for f in FORBIDDEN[package])
    ]
    assert offences == []


def test_the_library_needs_only_what_a_bare_gpu_box_has(root: Path) -> None:
    allowed = BARE_BOX | set(sys.stdlib_module_names)
    others: dict[str, set[str]] = {}
    for path in sorted((root / "posttrain").rglob("*.py")):
        for package in {module.split(".")[0] for module in imports(path)} - allowed:
            others.setdefault(package, set()).add(str(path.relative_to(root)))
    assert {package: sorted(files) for package, files in others.items()} == EXTRAS


def test_the_library_reads_no_parameter_file(root: Path) -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted((root / "posttrain").rglob("*.py"))]
    assert not [text for text in texts if 'params.yaml"' in text or "load_params" in text]


@pytest.mark.parametrize(
    "module",
    [
        "pipelines.config.params",
        "pipelines.runtime.step",
        "pipelines.ingest",
        "posttrain.algorithms",
        "posttrain.rewards.worker",
        "posttrain.rewards.functions",
    ],
)
def test_what_needs_no_model_imports_no_torch(root: Path, module: str) -> None:
    code = (
        f"import sys, {module}; print([m for m in ('torch', 'transformers', 'mlflow', 'prefect') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("folder", ["posttrain/objectives", "posttrain/algorithms"])
def test_an_algorithm_reads_on_one_screen(root: Path, folder: str) -> None:
    lines = {p.name: len(p.read_text(encoding="utf-8").splitlines()) for p in sorted((root / folder).glob("*.py"))}
    assert {name: n for name, n in lines.items() if n > 160} == {}


def test_the_names_of_built_in_rewards_are_those_of_the_functions() -> None:
    from posttrain.rewards import BUILT_IN_NAMES
    from posttrain.rewards.functions import BUILT_IN

    assert tuple(BUILT_IN) == BUILT_IN_NAMES
