"""Describe a run for MLflow: name, tags, parameters, a short note."""

from __future__ import annotations

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipelines.config.effective import effective_parameters
from pipelines.config.params import Params, load_params
from pipelines.runtime.measures import GREEDY, SAMPLED, headline_name, in_words
from pipelines.runtime.palette import colour
from pipelines.runtime.prices import judge_tokens, read_prices
from pipelines.runtime.ranking import RANKED, RECORD
from pipelines.runtime.redaction import redact
from pipelines.tracking.lockfile import default_remote, locked_outputs
from pipelines.tracking.rollouts import has_rollouts
from pipelines.tracking.source import COST, RESULT, START, RecordedRun, measured, results
from pipelines.tracking.store import workspace

RUN_TAG, WORKSPACE_TAG, JOURNAL_TAG = "posttrain.run", "posttrain.workspace", "posttrain.journal"
TIMINGS_TAG, REPLACED_TAG = "posttrain.timings", "posttrain.replaced"
REASON_TAG, EVALUATION_TAG = "posttrain.reason", "posttrain.evaluation"
OWN_CODE = "own_code"
"""Name of the digest of the user's own modules among the hyper-parameters of a run."""
RANKED_TAG = "ranked"
"""The place of an align run in the last comparison, or why it has none."""
_NAMES = "named 2"
"""Version of the names of an evaluation's results; a stored run of an earlier one gets the new names as well."""
TRACES_TAG = "posttrain.traces"
"""Number of answers of the evaluation, and of each kind of the training steps, that are sent as traces of the run."""
DVC_TAG = "dvc.md5"
"""The hash of each output in DVC's cache, as JSON in one tag."""
JUDGE = "judge"
"""Stage of the run that records one call of `posttrain judge`. It is no stage of dvc.yaml."""
SYSTEM = "system/"
"""MLflow shows metrics with this prefix under *System metrics*, apart from the model's."""
MACHINE = ("memory/",)
"""Beginnings of the names of measurements that say how the machine was used."""
_PARAM_LENGTH, _TAG_LENGTH, _SHOWN_TABLES = 6000, 8000, 100


def run_name(source: RecordedRun) -> str:
    """Return the run's name, e.g. `align grpo seed 0`."""
    words = [str(source.start["stage"])]
    for key, value in arguments(source).items():
        words.append(str(value) if isinstance(value, str) else f"{key} {value}")
    return " ".join(words)


def arguments(source: RecordedRun) -> dict[str, Any]:
    """Return the step's arguments that have a value."""
    given: dict[str, Any] = source.start.get("arguments", {})
    return {key: value for key, value in given.items() if value is not None}


def entity_name(name: str) -> str:
    """Return a name that MLflow accepts, with the prefix by which its page of a run collects the measurements of the machine.

    Example:
        >>> entity_name("pass@4"), entity_name("memory/peak_mib")
        ('pass_at_4', 'system/memory/peak_mib')
    """
    accepted = re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))
    return f"{SYSTEM}{accepted}" if accepted.startswith(MACHINE) else accepted


def parameters(source: RecordedRun) -> dict[str, str]:
    """Return the hyper-parameters that the run used, under one name each, as text."""
    given = effective_parameters(source.start["stage"], source.start.get("arguments", {}), source.values_of("params"))
    code = {path: digest for path, digest in source.start.get("inputs", {}).items() if path.endswith(".py")}
    if code:  # a run before an edit of own code is no second seed of the run after it
        given = given | {
            OWN_CODE: f"sha256:{hashlib.sha256(json.dumps(code, sort_keys=True).encode()).hexdigest()[:8]}"
        }
    return {entity_name(name): _text(value)[:_PARAM_LENGTH] for name, value in given.items()}


def identity_tags(source: RecordedRun, project: Path) -> dict[str, str]:
    """Return the tags that identify the run and its checkout."""
    return {RUN_TAG: source.identity, WORKSPACE_TAG: workspace(project)}


def tags(source: RecordedRun, project: Path) -> dict[str, str]:
    """Return all tags for filters and comparisons. Unknown values are omitted, e.g. for a restored journal."""
    surroundings = source.surroundings()
    locked = locked_outputs(project, source.start["directory"], source.journal)
    found: dict[str, Any] = {
        "stage": source.start["stage"],
        **{key: _text(value) for key, value in arguments(source).items()},
        **grouping(source, project),
        **{name: value for name, value in source.values_of("tags").items() if name != RECORD},
        "mlflow.note.content": _note(source, headline_name(present_params(project).report.headline)),
        "mlflow.source.name": _command(source),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": surroundings.get("commit"),
        "posttrain.dvc_stage": surroundings.get("dvc_stage"),
        "posttrain.flow_run": surroundings.get("flow_run"),
        "device": source.device(),
        **_price(source, project),
        **source.kernels(),
        TIMINGS_TAG: ",".join(sorted({entity_name(name) for name, _ in source.timings})) or None,
        "mlflow.loggedArtifacts": _tables(source),
        REASON_TAG: next((record.get("reason") for record in source.of("end")), None),
        **_model(source, project),
        EVALUATION_TAG: None if source.evaluation is None else f"{source.evaluation.digest} {_NAMES}",
        RANKED_TAG: None if source.place is None else source.place.words,
        TRACES_TAG: present_params(project).tracking.traces if source.evaluation or has_rollouts(source) else None,
        DVC_TAG: json.dumps(locked) if locked else None,
    }
    return {entity_name(k): redact(str(v))[:_TAG_LENGTH] for k, v in found.items() if v not in (None, "")}


def _price(source: RecordedRun, project: Path) -> dict[str, str]:
    """Return money and CO2 of a finished run, and its costs per percentage point of the headline measure that it gained over SFT.

    They are tags, because they follow a changed prices.yaml and report.headline. Unknown values are left out.
    """
    prices, seconds = read_prices(project), source.seconds
    if seconds is None:
        return {}
    costs = {"seconds": (seconds, "s")}
    tokens = judge_tokens(source.measurements)
    if prices is not None:
        device, spent = source.device() or "cpu", source.timings.get((f"{COST}joules", 0))
        money, grams = prices.total(device, seconds, tokens), prices.grams(device, seconds, spent)
        judges = prices.of_judges(tokens) if tokens else None
        costs |= {"money": (money, prices.currency)} if money is not None else {}
        costs |= {"judge_money": (judges, prices.currency)} if judges is not None else {}
        costs |= {"co2_grams": (grams, "g")} if grams is not None else {}
    found = {
        f"cost.{name}": f"{value:.4g} {unit}".rstrip() for name, (value, unit) in costs.items() if name != "seconds"
    }
    gain = _gain(source, project)
    if gain > 0:
        found |= {f"cost.{name}_per_point": f"{value / gain:.4g} {unit}" for name, (value, unit) in costs.items()}
    return found


def headline_metric(params: Params) -> str:
    """Return the name of the metric by which the report ranks models."""
    return RESULT + headline_name(params.report.headline)


def ranked_values(source: RecordedRun) -> dict[str, float]:
    """Return the headline measure of a run that the last comparison ranked, by its name in MLflow; empty for any other run."""
    if source.place is None or not source.place.ranked or source.evaluation is None:
        return {}
    value = results(source.evaluation).get((RESULT + source.place.measure, 0))
    return {} if value is None else {RANKED + source.place.measure: value}


def _gain(source: RecordedRun, project: Path) -> float:
    """Return the percentage points of the headline measure that an aligned model gained over its supervised model; 0 if unknown."""
    if source.evaluation is None or source.supervised is None:
        return 0.0
    name = (headline_metric(present_params(project)), 0)
    after, before = results(source.evaluation).get(name), results(source.supervised).get(name)
    return 0.0 if after is None or before is None else 100 * (after - before)


def grouping(source: RecordedRun, project: Path) -> dict[str, str]:
    """Return the tags by which runs are grouped: algorithm, seed, study, protocol, and the algorithm's colour.

    `protocol` is a hash of the supervised model, which all algorithms start from or are compared with.
    """
    given, inputs = source.start.get("arguments", {}), source.start.get("inputs", {})
    name, _, seed = str(given.get("model") or "").rpartition("-") if source.start["stage"] == "evaluate" else ("",) * 3
    algorithm = str(given.get("algorithm") or name or seed)
    settings = present_params(project).project
    found = {
        "algorithm": algorithm,
        "seed": seed if name else "",
        "study": str(source.surroundings().get("experiment") or settings.experiment),
        "protocol": hashlib.sha256(inputs[START].encode()).hexdigest()[:8] if START in inputs else "",
        "mlflow.runColor": colour(algorithm, settings.algorithms) or "",
    }
    return {key: value for key, value in found.items() if value}


def present_params(project: Path) -> Params:
    """Return the parameters in params.yaml. The file is read again only after a change."""
    path = project / "params.yaml"
    return _load(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _load(path: Path, changed: int) -> Params:
    """Return the parameters of a file; the time of its last change is part of the key of the cache."""
    return load_params(path)


def _model(source: RecordedRun, project: Path) -> dict[str, Any]:
    """Return the tags of a recorded model."""
    models = source.of("model")
    if not models:
        return {}
    return {
        "posttrain.model.path": models[-1]["path"],
        "posttrain.model.sha256": models[-1]["sha256"],
        "posttrain.model.remote": default_remote(project),
    }


def _tables(source: RecordedRun) -> str | None:
    """Return the list of tables for MLflow's UI."""
    shown = [{"path": record["path"], "type": "table"} for record in source.of("table")]
    return json.dumps(shown[-_SHOWN_TABLES:]) if shown else None


def _note(source: RecordedRun, headline: str) -> str:
    """Return the run's description: its result in words, its files, and the command that repeats it."""
    stage, given = source.start["stage"], run_name(source)
    return (
        f"Stage **{stage}**{', ' + given.removeprefix(stage).strip() if given != stage else ''}.{_result(source, headline)}\n\n"
        f"* files: `{source.start['directory']}`\n"
        f"* comparison of all runs: `report/`\n"
        f"* run only this stage: `{_command(source)}`\n"
    )


def _command(source: RecordedRun) -> str:
    """Return the command that runs only this stage."""
    if source.start["stage"] == JUDGE:
        return f"posttrain judge {source.start['arguments']['session']}"
    options = "".join(f" --{key.replace('_', '-')} {value}" for key, value in arguments(source).items())
    return f"python -m pipelines.{source.start['stage']}{options}"


def _result(source: RecordedRun, headline: str) -> str:
    """Return sentences with both measures of the evaluated model, the headline first, and its place; empty if it has none."""
    evaluation = source if source.start["stage"] == "evaluate" else source.evaluation
    found = {} if evaluation is None else measured(evaluation)
    shares = [_share(found, name) for name in (SAMPLED, GREEDY)]
    if headline == GREEDY:
        shares.reverse()
    place = "" if source.place is None else source.place.sentence()
    return "".join(shares) + place


def _share(found: dict[str, Any], name: str) -> str:
    """Return one measure with its interval in a sentence, empty if it was not recorded; only numbers from 0 to 1 are percentages."""
    if name not in found:
        return ""
    numbers = [float(found[each]) for each in (name, f"{name}_low", f"{name}_high") if each in found]
    start = f" {in_words(name).capitalize()}:"
    if len(numbers) < 3:
        return f"{start} **{numbers[0]:.4g}** (no interval from equal values)."
    if not all(0 <= number <= 1 for number in numbers):
        value, low, high = (f"{number:.3f}" for number in numbers)
        return f"{start} **{value}** (95 % interval {low} to {high})."
    value, low, high = (f"{100 * number:.1f}" for number in numbers)
    return f"{start} **{value} %** (95 % interval {low} to {high} %)."


def _text(value: Any) -> str:
    """Return a value as text."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
