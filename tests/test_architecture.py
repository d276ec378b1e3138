"""The arrows run one way: flows -> tasks -> pipelines -> posttrain; rooms form no circle; old names are gone."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from inspect import signature
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
    "bitsandbytes": ["posttrain/models/quantised.py"],
    "torchao": ["posttrain/training/low_bit.py"],
    "gguf": ["posttrain/models/gguf_writing.py"],
    "lm_eval": ["posttrain/evaluation/benchmarks.py"],
    "math_verify": ["posttrain/rewards/mathematics.py"],
    "peft": ["posttrain/models/lora.py"],
    # a neighbour, in vLLM's environment
    "posttrain_group": ["posttrain/rollouts/vllm/worker/posttrain_receiver.py"],
    "scipy": ["posttrain/evaluation/crossed.py", "posttrain/evaluation/drift.py", "posttrain/evaluation/runs.py"],
    # it comes with PyTorch for CUDA
    "triton": ["posttrain/models/head_kernels.py"],
    "websockets": ["posttrain/environments/openenv.py"],
}
"""Packages that the library imports only on demand, and the only files that may import them."""


STAGES = {"ingest", "base", "validate", "sft", "reward", "reward_readers", "align", "evaluate", "compare", "gate"}
ROOMS = {
    "aliases": {"commands"},
    "commands": {
        *(
            "config",
            "data",
            "labelling",
            "lineage",
            "promotion",
            "report",
            "runtime",
            "serving",
            "stages",
            "studies",
            "tracking",
            "training",
            "validation",
        )
    },
    "stages": {"config", "data", "promotion", "report", "runtime", "training", "validation"},
    "training": {"config", "data", "runtime"},
    "labelling": {"config", "data", "runtime"},
    "lineage": {"config", "data", "runtime", "tracking"},
    "promotion": {"config", "data", "labelling", "runtime", "tracking"},
    "report": {"config", "labelling", "runtime"},
    "serving": {"config", "promotion", "runtime", "tracking"},
    "studies": {"config", "report", "runtime"},
    "tuning": {"config", "report", "runtime", "studies"},
    "validation": {"config", "data", "runtime"},
    "tracking": {"config", "runtime"},
    "data": {"config"},
    "runtime": {"config"},
    "config": set(),
}
"""Rooms of `pipelines`, and the rooms that each may import. `stages` are the modules directly in `pipelines`."""
OLD_NAMES = (
    r"pipelines[./](common|warm|watch|shape|sections|columns|align_on_policy|align_preference|rewards|samples|sampling)\b",
    r"pipelines[./](step|run|journal|process|publish|identity|environment|redaction|follower|launch)\b",
    r"pipelines[./](sources|files|tables|inbox|admission)\b",
    r"posttrain[./](problems|processes)\b",
    r"models[./](heap|narrow|memory)\b",
    r"algorithms[./]records\b",
    r"flows[./](body|judge)\b",
    r"tasks[./]guard\b|vllm[./]leash\b|\bdie_with_parent\b",
    r"\b(taken_logprobs|token_numbers|plain_again|old_experts|leave_out)\b",
    r"\b(Experts|Asked)\b",
)
"""Module and identifier names that were replaced by the field's terms."""


def imports(path: Path) -> set[str]:
    """Return every module that a file imports, wherever in the file."""
    return imported(ast.parse(path.read_text(encoding="utf-8")), at_run_time=False)


def imported(node: ast.AST, *, at_run_time: bool) -> set[str]:
    """Return the imports below a node; `at_run_time` leaves out those that only a type checker sees."""
    found: set[str] = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            found |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
            found.add(child.module)
            if at_run_time:
                found |= {f"{child.module}.{alias.name}" for alias in child.names}
        elif at_run_time and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            found |= {name for each in child.orelse for name in imported(each, at_run_time=True)}
        else:
            found |= imported(child, at_run_time=at_run_time)
    return found


@cache
def module_arrows(root: Path, *, at_run_time: bool = True) -> dict[str, set[str]]:
    """Return the modules that each module of pipelines and posttrain imports, also inside functions.

    `at_run_time=False` adds the modules that it names only for types.
    """
    paths = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for package in ("pipelines", "posttrain")
        for path in sorted((root / package).rglob("*.py"))
    }
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in paths.items()}
    found = {name: imported(tree, at_run_time=True) | for_types(tree, at_run_time) for name, tree in trees.items()}
    return {name: targets & (paths.keys() - {name}) for name, targets in found.items()}


def for_types(tree: ast.AST, at_run_time: bool) -> set[str]:
    """Return the imports that only a type checker sees; none if `at_run_time`."""
    return set() if at_run_time else imported(tree, at_run_time=False)


def room(module: str, packages: set[str]) -> str:
    """Return the package of a module: `pipelines.runtime`, `posttrain.models`, `pipelines.stages`; else the module itself."""
    top, *rest = module.split(".")
    if rest and f"{top}.{rest[0]}" in packages:
        return f"{top}.{rest[0]}"
    return "pipelines.stages" if top == "pipelines" else module


def room_arrows(root: Path) -> dict[str, set[str]]:
    arrows = module_arrows(root)
    packages = {
        f"{p.parent.parent.name}.{p.parent.name}"
        for top in ("pipelines", "posttrain")
        for p in (root / top).glob("*/__init__.py")
    }
    rooms: dict[str, set[str]] = {}
    for module, targets in arrows.items():
        here = room(module, packages)
        rooms.setdefault(here, set()).update({room(target, packages) for target in targets} - {here})
    return rooms


def circle(arrows: dict[str, set[str]]) -> tuple[str, ...]:
    """Return one circle of the arrows, or nothing."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return tuple(error.args[1])
    return ()


def test_a_circle_is_found() -> None:
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == ()
    tree = ast.parse("if TYPE_CHECKING:\n    import a\ndef f():\n    from b import c\n")
    assert imported(tree, at_run_time=True) == {"b", "b.c"}
    assert imported(tree, at_run_time=False) == {"a", "b"}


@pytest.mark.parametrize("at_run_time", [True, False])
def test_no_module_imports_itself_through_others(root: Path, at_run_time: bool) -> None:
    assert circle(module_arrows(root, at_run_time=at_run_time)) == ()


def test_no_room_imports_itself_through_others(root: Path) -> None:
    assert circle(room_arrows(root)) == ()


def test_the_rooms_of_pipelines_import_only_what_is_drawn(root: Path) -> None:
    found = {
        name.removeprefix("pipelines."): {t.removeprefix("pipelines.") for t in targets if t.startswith("pipelines.")}
        for name, targets in room_arrows(root).items()
        if name.startswith("pipelines.")
    }
    assert found.keys() == ROOMS.keys()
    assert {name: targets - ROOMS[name] for name, targets in found.items() if targets - ROOMS[name]} == {}


def test_pipelines_holds_only_the_stages_and_no_stage_imports_a_stage(root: Path) -> None:
    assert {path.stem for path in (root / "pipelines").glob("*.py")} == STAGES | {"__init__"}
    between = {
        (module, target)
        for module, targets in module_arrows(root).items()
        for target in targets
        if {module, target} <= {f"pipelines.{stage}" for stage in STAGES}
    }
    assert between == set()


@pytest.mark.parametrize("pattern", OLD_NAMES)
def test_no_old_name_is_left(root: Path, pattern: str) -> None:
    if shutil.which("git") is None or not (root / ".git").exists():
        pytest.skip("this needs the git checkout")
    command = ["git", "grep", "-nIP", pattern, "--", ".", ":!tests/test_architecture.py", ":!CHANGELOG.md"]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert found.returncode in (0, 1), found.stderr
    assert found.stdout == ""


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


@pytest.mark.parametrize(
    ("pattern", "home"),
    [
        (r"\bprctl\b|pidfd_open|PDEATHSIG", "posttrain/guard.py"),
        (r"os\.replace\(|\.replace\((path|final|target)\)", "posttrain/files.py"),
        (r"\.bind\(\(", "posttrain/network.py"),
    ],
)
def test_one_module_does_it_for_all(root: Path, pattern: str, home: str) -> None:
    packages = ("posttrain", "pipelines", "tasks", "flows", "infra", "benchmarks")
    paths = [path for package in packages for path in sorted((root / package).rglob("*.py"))]
    found = [path for path in paths if re.search(pattern, path.read_text(encoding="utf-8"))]
    assert [path.relative_to(root).as_posix() for path in found] == [home]


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
    from pipelines.config.reward_arguments import KNOWN
    from posttrain.rewards import BUILT_IN_NAMES
    from posttrain.rewards.functions import BUILT_IN

    assert tuple(BUILT_IN) == BUILT_IN_NAMES
    for name, known in KNOWN.items():
        own = set(signature(BUILT_IN[name]).parameters) - {"prompts", "completions", "answer", "_"}
        assert own == set(known), name
