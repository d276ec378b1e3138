"""Check at once what a run would find out later: import paths, model and data sources, and columns on the first rows."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from functools import partial
from inspect import Signature
from pathlib import Path
from typing import get_args

from pipelines.commands.first_rows import ROWS, first_row
from pipelines.commands.layers import adapters
from pipelines.commands.model_folders import HUB_ID, adapter_problems, model_problems
from pipelines.commands.source_signatures import signature_in
from pipelines.config.data_schema import TableSource
from pipelines.config.params import Params
from pipelines.data.column_mapping import canonical_rows
from pipelines.data.experts import expert_data, in_experts
from pipelines.data.file_columns import require_alike
from pipelines.data.files import read_file
from pipelines.data.sources import HUB, is_generator, local_files, no_source, require_effect, require_files, table_rows
from pipelines.data.tables import group_labels
from pipelines.validate import answer_kind
from pipelines.validation.gold import advice, can_compare
from posttrain.environments.base import built_in, environment, is_environment, is_wrapped, single_turn_rows
from posttrain.environments.parts import Kind
from posttrain.errors import PosttrainError
from posttrain.evaluation.harness import require_package
from posttrain.extras import require_extra
from posttrain.rewards.judge_server import server_of_environment
from posttrain.rewards.signatures import misfit
from posttrain.text import nearest

FILES = 8
"""Files of a table that are looked into."""


def problems(params: Params, packages: bool = True) -> list[str]:
    """Return one line for each source, import path or column that a run would not find, and missing packages if `packages` is set."""
    return [
        *_functions(params),
        *_judge(params),
        *(missing_packages(params) if packages else ()),
        *model_problems(params),
        *adapter_problems(params),
        *_data(params),
        *_gold_answers(params),
        *_groups(params),
        *_second_task(params),
        *_best_checkpoint(params),
    ]


def _judge(params: Params) -> Iterator[str]:
    """Yield that a judge has no server, because the environment names none."""
    judges = [name for name, reward in params.rewards.items() if reward.function == "judge"]
    if judges:
        yield from _failures([(f"rewards.{judges[0]}", lambda: server_of_environment(None))])


def missing_packages(params: Params) -> list[str]:
    """Return one line for each package of benchmarks or low-bit training that is not installed."""
    checks: list[tuple[str, Callable[[], object]]] = []
    if params.evaluation.benchmarks is not None:
        checks.append(("evaluation.benchmarks", require_package))
    checks += [(key, partial(require_extra, *needed)) for key, *needed in _extras(params)]
    return list(_failures(checks))


def _failures(checks: list[tuple[str, Callable[[], object]]]) -> Iterator[str]:
    for key, check in checks:
        try:
            check()
        except PosttrainError as error:
            yield str(error) if str(error).startswith(key) else f"{key}: {error}"


def _extras(params: Params) -> Iterator[tuple[str, str, str, str]]:
    """Yield the setting, package, reason and extra of each optional package that training will import."""
    optimizers = {"sft": params.sft.optimizer}
    if params.reward.enabled and params.reward.source is None:
        optimizers["reward"] = params.reward.optimizer
    optimizers |= {f"algorithms.{name}.budget": params.budget(name).optimizer for name in params.project.algorithms}
    eight = [f"{section}.optimizer" for section, optimizer in optimizers.items() if optimizer.moment_bits == 8]
    four = [key for key, lora in adapters(params).items() if lora.base_bits == 4]
    for key in eight[:1]:  # the others need the same package
        yield key, "torchao", f"{key}.moment_bits = 8", "low-bit"
    for key in four[:1]:
        yield key, "bitsandbytes", f"{key}.base_bits = 4", "qlora"


def _functions(params: Params) -> Iterator[str]:
    """Yield the reward functions that cannot be imported, or cannot be called with the problems; no code of their module runs."""
    trained = {name for section in params.algorithms.values() for name in section.rewards or {}}
    for name, reward in params.rewards.items():
        if ":" in reward.function:
            why = _missing_function(reward.function)
            if why is None and not is_wrapped(reward.function):
                columns = _reward_columns(params) if name in trained else None
                why = misfit(_written(reward.function), columns, reward.arguments, f"in rewards.{name}.arguments")
            if why:
                yield f"rewards.{name}.function = {reward.function!r}: {why}"
        elif reward.function in ("answer", "math") and name in _weighted(params):
            columns = _reward_columns(params)
            if columns is not None and "answer" not in columns:
                yield (
                    f"rewards.{name}: the function {reward.function!r} reads gold answers, and data.problems has none. Map the column that"
                    f" holds them, as in data.problems.columns.answer=COLUMN, or train without it: algorithms.NAME.rewards.{name}=null"
                )


def _weighted(params: Params) -> set[str]:
    """Return the rewards of the aligned algorithms."""
    return {name for one in params.project.algorithms for name in params.algorithms[one].rewards or {}}


def _written(path: str) -> Signature | None:
    """Return the signature of the function at an import path that exists, as far as its module's text says it."""
    module, _, function = path.partition(":")
    spec = importlib.util.find_spec(module)
    source = Path(spec.origin) if spec and spec.origin else None
    return signature_in(ast.parse(source.read_bytes()), function) if source and source.suffix == ".py" else None


def _reward_columns(params: Params) -> list[str] | None:
    """Return the columns of the problems that reward functions get, None if they are not known before a run."""
    row = None if params.evaluation.turns is not None else first_row(params, "problems")
    return None if row is None else [name for name in row if name not in ("prompt", "id")]


def _best_checkpoint(params: Params) -> Iterator[str]:
    """Yield a choice of the checkpoint that would leave no problem to train on; the rows of files and hub data sets may be fewer still."""
    rule, rows = params.align.best_checkpoint, params.data.problems.rows
    if rule is not None and rows is not None and rule.problems >= rows:
        yield (
            f"align.best_checkpoint.problems = {rule.problems}: data.problems.rows = {rows}, so no problem would be left to train on; lower"
            " the one or raise the other"
        )


def _second_task(params: Params) -> Iterator[str]:
    """Yield why `evaluation.second_task` cannot be asked. A user's module is not imported."""
    task = params.evaluation.second_task
    if task is None:
        return
    key = f"evaluation.second_task.source = {task.source!r}"
    if not is_environment(task.source):
        yield f"{key}: no such environment{nearest(task.source, built_in())}"
    elif task.source in built_in() or is_wrapped(task.source):
        try:
            single_turn_rows(task.source, task.rows, params.evaluation.seed, task.options, "evaluation.second_task")
        except PosttrainError as error:
            yield f"{key}: {error}"
    else:
        why = _missing_function(task.source)
        if why:
            yield f"{key}: {why}"


def _missing_function(path: str) -> str | None:
    """Return why an import path leads nowhere, or None."""
    if is_wrapped(path):
        return _missing_task(path)
    module, _, function = path.partition(":")
    try:
        spec = importlib.util.find_spec(module)
    except Exception as error:  # the package around the module is imported, and may raise anything
        return f"cannot be imported: {type(error).__name__}: {error}"
    if spec is None or spec.origin is None:
        return f"there is no module {module} here. Write it, or start the command in the folder that holds it."
    if spec.origin in ("frozen", "built-in"):  # a module of Python's own, which has no file here
        known = dir(importlib.import_module(module))
        return None if function in known else f"Python's module {module} has no {function}{nearest(function, known)}"
    source = Path(spec.origin)
    if source.suffix != ".py":
        return None
    try:
        tree = ast.parse(source.read_bytes())
    except (SyntaxError, ValueError, OSError) as error:
        return f"{source.name} cannot be read as Python ({type(error).__name__}: {error}); correct it"
    later = {node.name for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef)}
    if function in later:
        return f"{function} of {source.name} is asynchronous; define it with def"
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {
        node.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    names |= {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    names |= {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom | ast.Import)
        for alias in node.names
    }
    return None if function in names else f"{source.name} defines no {function}{nearest(function, names)}"


def _missing_task(path: str) -> str | None:
    """Return why a task of a wrapped package cannot be used, or None. This imports the package, which is no code of the user's."""
    try:
        environment(path)
    except PosttrainError as error:
        return str(error)
    return None


def _gold_answers(params: Params) -> Iterator[str]:
    """Yield tables of local files of whose first gold answers none has the form that the reward compares."""
    kind = answer_kind(params)
    if params.validation.rules.unparseable_answer == "warn":
        return
    for table in ("problems", "evaluation"):
        source: TableSource = getattr(params.data, table)
        if any(is_generator(name) or name.startswith(HUB) for name in source.names):
            continue
        try:
            first = read_file(local_files(source)[0])[:ROWS]
            rows = canonical_rows(table, source.model_copy(update={"rows": None}), first)
        except (PosttrainError, IndexError):  # reported with the data
            continue
        answers = [answer for row in rows if isinstance(answer := row.get("answer"), str)]
        if answers and not any(can_compare(answer, kind) for answer in answers):
            yield (
                f"data.{table} ({', '.join(source.names)}): none of the first {len(answers)} answers can be compared, e.g."
                f" {answers[0][:60]!r}, so validation would keep no row: {advice(kind)}"
            )


def _groups(params: Params) -> Iterator[str]:
    """Yield why the evaluation's prompts have no groups. All rows of local files are read; a user's module and the hub are not."""
    name, source = params.evaluation.groups, params.data.evaluation
    if name is None or any(one.startswith(HUB) for one in source.names):
        return
    if is_generator(source.source) and source.source not in built_in():
        return
    try:
        rows = table_rows("evaluation", params.data)
    except PosttrainError:  # reported with the data
        return
    try:
        group_labels(name, [{n: v for n, v in row.items() if n != "id"} for row in rows])
    except PosttrainError as error:
        yield str(error)


def _held_out(kind: str, source: TableSource) -> Iterator[str]:
    """Yield a share of held-out rows that is missing, or that would have no effect."""
    if kind == "preferences" and not source.heldout:
        yield "data.preferences.heldout: must be greater than 0, e.g. 0.1, because held-out pairs measure the reward model"
    elif kind != "preferences" and source.heldout:
        yield f"data.{kind}.heldout = {source.heldout}: has no effect, because only pairs are held out. Remove it."


def _data(params: Params) -> Iterator[str]:
    """Yield what is wrong with a table's source, or with the columns of the first rows of its files."""
    for kind in (*get_args(Kind), *(["labelled"] if params.data.labelled else [])):
        yield from _table(kind, getattr(params.data, kind), params.sft.train_on == "marked")
    if params.data.experts is not None:
        try:
            source = expert_data(params.data, params.data.experts).sft
        except PosttrainError as error:
            yield str(error)
            return
        yield from (in_experts(line) for line in _table("sft", source))


def _table(kind: str, source: TableSource, marked: bool = False) -> Iterator[str]:
    """Yield what is wrong with one table's source. `marked`: the table sft must hold conversations."""
    for name in source.names:
        if name.startswith(HUB) and not re.fullmatch(HUB_ID.pattern + r"(:[\w.-]+)?", name.removeprefix(HUB)):
            yield f"data.{kind}.source = {name!r}: a hub data set is written hub:OWNER/NAME"
        elif is_wrapped(name) and (why := _missing_task(name)):
            yield f"data.{kind}.source = {name!r}: {why}"
    yield from _held_out(kind, source)
    try:
        if is_generator(source.source) and kind != "labelled":
            # pyrefly: ignore[bad-argument-type]
            require_effect(kind, source)
        elif kind == "labelled" or len(source.names) > 1:
            # pyrefly: ignore[bad-argument-type]
            require_files(kind, source)
        if any(is_generator(name) or name.startswith(HUB) for name in source.names):
            return
        files = local_files(source)
        if not files:
            yield f"data.{kind}.source = {source.source!r}: {no_source(source.names[0])}"
            return
        parts = [(str(path), read_file(path)[:ROWS]) for path in files[:FILES]]
        # pyrefly: ignore[bad-argument-type]
        require_alike(kind, source, parts)
        for _, records in parts:
            # pyrefly: ignore[bad-argument-type]
            rows = canonical_rows(kind, source.model_copy(update={"rows": None}), records)
            if kind == "sft" and marked and isinstance(rows[0]["completion"], str):
                yield "sft.train_on = 'marked': the rows of data.sft are plain text, which has no marks; set sft.train_on: completion"
                return
    except PosttrainError as error:
        yield str(error)
