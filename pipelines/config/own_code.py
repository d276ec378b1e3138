"""Find the files of the user's own code: the modules of rewards and environments that params.yaml names by import path.

DVC knows fixed dependencies only. The stage `reward_readers` depends on the folder `project.code` and records, for each algorithm and
for the evaluation, the digests of exactly the files that it imports; the later stages depend on their record.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from pipelines.config.params import Params
from pipelines.config.schema import OnPolicyBudget
from posttrain.environments.base import is_wrapped
from posttrain.errors import ConfigError

LIBRARY = "posttrain"
"""Package whose files are dependencies of the stages already."""


def algorithm_code(params: Params, name: str) -> list[str]:
    """Return the files of own code that an algorithm trains with, relative to the project and sorted."""
    rewards, rule = set(params.algorithms[name].rewards or {}), params.align.best_checkpoint
    if rule is not None:
        rewards.add(rule.reward)
    budget = params.budget(name)
    turns = budget.turns if isinstance(budget, OnPolicyBudget) else None
    return own_files([*_functions(params, rewards), *([turns.environment] if turns else [])])


def evaluation_code(params: Params) -> list[str]:
    """Return the files of own code that the evaluation asks."""
    own, names = params.evaluation, {*params.evaluation.rewards, params.evaluation.accuracy}
    more = [own.turns.environment] if own.turns else []
    return own_files([*_functions(params, names), *more, *([own.second_task.source] if own.second_task else [])])


def used_code(params: Params) -> list[str]:
    """Return the files of own code that any algorithm or the evaluation imports."""
    return sorted(
        {path for name in params.algorithms for path in algorithm_code(params, name)} | {*evaluation_code(params)}
    )


def all_code(params: Params) -> list[str]:
    """Return the files of own code that any algorithm, the evaluation or a table imports."""
    tables = (getattr(params.data, kind) for kind in ("sft", "preferences", "problems", "evaluation", "experts"))
    named = [one.source for one in tables if one is not None and isinstance(one.source, str)]
    return sorted({*used_code(params), *own_files(named)})


def _functions(params: Params, names: Iterable[str]) -> list[str]:
    """Return the functions of the rewards with these names."""
    return [params.rewards[name].function for name in sorted(names) if name in params.rewards]


def own_files(paths: Iterable[str], root: Path = Path()) -> list[str]:
    """Return the files of the modules behind import paths, with every module of the project that they import.

    Installed packages and this project's own are left out. No code runs: the files are read as text.
    """
    waiting = [path.partition(":")[0] for path in paths if ":" in path and not is_wrapped(path)]
    found: dict[str, Path] = {}
    seen: set[str] = set()
    while waiting:
        module = waiting.pop()
        if module in seen or not module or module.partition(".")[0] == LIBRARY:
            continue
        seen.add(module)
        for file in _files_of(module, root):
            found[_shown(file, root)] = file
            waiting += _imports(file, module)
    return sorted(found)


def uncovered(files: Iterable[str], folder: str) -> list[str]:
    """Return the files that are not in the folder `project.code`, so that DVC would not see an edit."""
    return [file for file in files if not PurePosixPath(file).is_relative_to(PurePosixPath(folder))]


def require_covered(params: Params, files: list[str]) -> None:
    """Raise ConfigError if DVC would not see an edit of one of the files."""
    left = uncovered(files, params.project.code)
    if left:
        raise ConfigError(
            f"project.code = {params.project.code!r}: {left[0]} is own code outside of it, so DVC would not see an edit, and results of the"
            f" old code would count as results of the new. {_remedy(files)}"
        )


def _remedy(files: list[str]) -> str:
    """Return the command that covers the files."""
    folder = common_folder(files)
    if folder is None:
        return "Move your modules into one folder and name it: posttrain configure project.code=FOLDER (and the import paths)"
    return f"Type: posttrain configure project.code={folder}"


def code_folder(params: Params) -> str | None:
    """Return the folder to write into project.code, None if it is right already. Raises ConfigError if no folder holds all own code."""
    files = all_code(params)
    if not uncovered(files, params.project.code):
        return None
    folder = common_folder(files)
    if folder is None:
        require_covered(params, files)
    return folder


def common_folder(files: list[str]) -> str | None:
    """Return the smallest folder that holds all files, or the only file if it is in the project's root; None if that is the root."""
    if len(files) == 1 and "/" not in files[0]:
        return files[0]
    parents = [PurePosixPath(file).parent for file in files]
    shared = next(
        (p for p in [parents[0], *parents[0].parents] if all(each.is_relative_to(p) for each in parents)), None
    )
    return None if shared is None or shared in (PurePosixPath(), PurePosixPath("/")) else shared.as_posix()


def _files_of(module: str, root: Path) -> Iterator[Path]:
    """Yield the file of a module that is own code, and the `__init__.py` of the packages around it; none for other modules."""
    parts = module.split(".")
    base = _base(parts[0], root)
    if base is None:
        return
    for depth in range(1, len(parts) + 1):
        place = base.joinpath(*parts[:depth])
        yield from (file for file in (place / "__init__.py", place.with_suffix(".py")) if file.is_file())


def _base(package: str, root: Path) -> Path | None:
    """Return the folder that holds a top-level module: the project, or a folder on the module path that is no installation."""
    if (root / package).is_dir() or (root / f"{package}.py").is_file():
        return root
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    origin = Path(spec.origin).resolve()
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    if any(origin.is_relative_to(folder) for folder in installed):
        return None
    return origin.parent.parent if origin.name == "__init__.py" else origin.parent


def _imports(file: Path, module: str) -> Iterator[str]:
    """Yield the dotted names that a module may import, by its text. A name that is no module has no file."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # the import reports it
        return
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level and package else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" if base else alias.name for alias in node.names)


def _shown(file: Path, root: Path) -> str:
    """Return the file's path relative to the project, or absolute if it is elsewhere."""
    place, here = file.resolve(), root.resolve()
    return place.relative_to(here).as_posix() if place.is_relative_to(here) else place.as_posix()
