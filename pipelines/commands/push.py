"""Upload a model to the Hugging Face hub, with a card that holds its evaluation. Wraps `hf upload`.

    posttrain push grpo-0 OWNER/NAME --dry-run     # writes the folder, and prints its files, its card and the command
    posttrain push grpo-0 OWNER/NAME --license apache-2.0
    posttrain push sft OWNER/NAME

The folder that is uploaded is .posttrain/push/NAME: the model's files, and a README.md with base model, data sets, results with intervals,
licence and intended use in the hub's metadata format. Sign in first with `hf auth login`. The repository is private unless --public.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipelines.commands.forecast import is_present
from pipelines.config.effective import spec_of
from pipelines.config.params import Params, load_params
from pipelines.data.sources import HUB
from pipelines.data.tables import TRAINING
from pipelines.evaluate import model_folder
from pipelines.runtime import environment
from pipelines.runtime.command_line import command_parser, reports_errors
from pipelines.runtime.identity import input_digests
from pipelines.runtime.journal import read
from pipelines.runtime.measures import GREEDY, SAMPLED, headline_name, with_measures
from pipelines.runtime.publish import JOURNAL
from posttrain.algorithms import OnPolicy, Unpaired
from posttrain.errors import ConfigError
from posttrain.files import read_json

FOLDER = Path(".posttrain") / "push"
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
KEPT_OUT = "*.partial"
_MEANINGS = {
    SAMPLED: "the share of sampled answers that are right",
    GREEDY: "the share of problems whose greedy answer is right",
}


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = command_parser("posttrain push", __doc__)
    parser.add_argument("model", help="sft, or an aligned model, e.g. grpo-0 or models/align/grpo-0")
    parser.add_argument("repository", metavar="OWNER/NAME", help="repository on the hub")
    parser.add_argument("--license", default="other", help="licence of the weights by its hub name (default: other)")
    parser.add_argument("--public", action="store_true", help="create the repository as a public one")
    parser.add_argument("--dry-run", action="store_true", help="write and show everything, and upload nothing")
    options = parser.parse_args(arguments)
    os.chdir(environment.root())
    model = options.model.rstrip("/").removeprefix("models/").removeprefix("align/")
    folder = write_folder(load_params("params.yaml"), model, options.repository, options.license)
    command = upload_command(options.repository, folder, public=options.public)
    if options.dry_run:
        print("\n".join(file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()))
        print((folder / "README.md").read_text(encoding="utf-8"))
    print(shlex.join(command), flush=True)
    if options.dry_run:
        return 0
    return subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "0"}, check=False).returncode


def upload_command(repository: str, folder: Path, *, public: bool) -> list[str]:
    """Return the command that uploads the folder."""
    return [
        str(Path(sys.executable).with_name("hf")), "upload", repository, str(folder), ".",
        "--no-private" if public else "--private", "--commit-message", "Upload by posttrain",
    ]  # fmt: skip


def write_folder(params: Params, model: str, repository: str, licence: str) -> Path:
    """Copy the model's files and write its card; return the folder. Raises ConfigError if the model or the name is not usable."""
    if not REPOSITORY.fullmatch(repository):
        raise ConfigError(f"{repository!r}: not the name of a repository; write OWNER/NAME")
    source = model_folder(model)
    if not (source / "config.json").is_file():
        trained = sorted(path.parent.name for path in Path("models/align").glob("*/config.json"))
        raise ConfigError(
            f"{source} holds no model. Trained here: {', '.join(trained) or 'none'}. `dvc checkout` restores models."
        )
    check_data(params, model)
    folder = FOLDER / repository.partition("/")[2]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(KEPT_OUT))
    written = (source / "README.md").read_text(encoding="utf-8") if (source / "README.md").is_file() else ""
    (folder / "README.md").write_text(card(params, model, repository, licence, written), encoding="utf-8")
    return folder


def check_data(params: Params, model: str) -> None:
    """Raise ConfigError if the model was made from other data than the present: its card would name the wrong ones."""
    runs = [Path("runs/sft") if model == "sft" else Path("runs/align", model), Path("runs/evaluate", model)]
    used: dict[str, str] = {}
    for run in runs:
        starts = (record for record in read(run / JOURNAL) if record["kind"] == "start")
        used |= {p: d for start in starts for p, d in start.get("inputs", {}).items() if p.startswith("data/valid/")}
    there = input_digests("push", sorted(path for path in used if Path(path).is_file()))
    changed = sorted(path for path, digest in used.items() if there.get(path) != digest)
    if used and not (changed or is_present(params)):
        changed = ["params.yaml"]
    if changed:
        raise ConfigError(
            f"{model} was made from other data than the present: {', '.join(changed)} changed since, so its card would name the wrong"
            f" data. Check out the commit that holds its params.yaml and dvc.lock (`git checkout COMMIT`, `dvc checkout`), or train it"
            " again with `dvc repro`."
        )


def card(params: Params, model: str, repository: str, licence: str, written: str) -> str:
    """Return the card: metadata, results with intervals, intended use, and the table of the training step."""
    results, sources = _results(params, model), trained_sources(params, model)
    first = [name for name in measures(params) if name in results]
    headline = headline_name(params.report.headline)
    body = re.sub(r"\A---\n.*?\n---\n", "", written, flags=re.DOTALL).strip()
    held_out = f"`data.evaluation`: {params.data.evaluation.source}"
    measured = [
        f"On held-out problems ({held_out}); `low` and `high` bound 95 % intervals over problems."
        f" Models are ranked by `{headline}`: {_MEANINGS[headline]}.", "",
        "| measure | value |", "|---|---|",
        *(f"| {name} | {results[name]:.4g} |" for name in (*first, *sorted(results.keys() - set(first)))),
    ]  # fmt: skip
    missing = [f"This model has not been evaluated yet; `dvc repro` does it on held-out problems ({held_out})."]
    use = "A result of an experiment that compares post-training algorithms."
    tested = "It was evaluated on the problems above only; test it" if results else "Test it"
    return "\n".join([
        "---", _yaml(metadata(params, model, repository, licence, results)), "---", "", body, "",
        "## Base model and data", "", f"- base model: {_base(params)}",
        *(f"- `data.{table}`: {', '.join(names)}" for table, names in sources.items()), "",
        "## Evaluation", "", *(measured if results else missing), "",
        "## Intended use", "", f"{use} {tested} before any other use.", "",
    ])  # fmt: skip


def metadata(params: Params, model: str, repository: str, licence: str, results: dict[str, float]) -> dict[str, Any]:
    """Return the metadata block in the hub's format; a base model and data sets are named if they are on the hub."""
    names = [name for sources in trained_sources(params, model).values() for name in sources]
    on_hub = list(dict.fromkeys(name.removeprefix(HUB) for name in names if name.startswith(HUB)))
    found: dict[str, Any] = {
        "license": licence,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["posttrain", *([model.rpartition("-")[0]] if "-" in model else [])],
    }
    if _is_on_hub(params.model.source):
        found["base_model"] = params.model.source
    if on_hub:
        found["datasets"] = on_hub
    metrics = [
        {"type": "accuracy", "name": name, "value": round(results[name], 6)}
        for name in measures(params)
        if name in results
    ]
    evaluated = {"type": "evaluation", "name": f"data.evaluation: {params.data.evaluation.source}"}
    task = {"type": "text-generation"}
    if metrics:
        entry = {"task": task, "dataset": evaluated, "metrics": metrics}
        found["model-index"] = [{"name": repository.partition("/")[2], "results": [entry]}]
    return found


def measures(params: Params) -> list[str]:
    """Return the names of both measures of accuracy and their bounds, the one that ranks the models first."""
    names = sorted((SAMPLED, GREEDY), key=lambda name: name != headline_name(params.report.headline))
    return [f"{name}{end}" for name in names for end in ("", "_low", "_high")]


def trained_sources(params: Params, model: str) -> dict[str, list[str]]:
    """Return the sources of each table that the model was trained on; of all tables if its journal is missing."""
    read_by = _trained_tables(params, model)
    tables = [
        name
        for name in (*TRAINING, "experts")
        if getattr(params.data, name) is not None and (not read_by or name in read_by)
    ]
    return {name: getattr(params.data, name).names for name in tables}


def _trained_tables(params: Params, model: str) -> set[str]:
    """Return the tables from which the model and the one that it started from learnt; empty if that is not known."""
    if model == "sft":
        return {"sft"}
    algorithm = model.rpartition("-")[0]
    records = read(Path("runs/align", model) / JOURNAL)
    values = {name: v for record in records if record["kind"] == "params" for name, v in record["values"].items()}
    if f"algorithms.{algorithm}.preset" not in values:
        return set()
    spec, start = spec_of(algorithm, values), values.get(f"algorithms.{algorithm}.start") or values.get("align.start")
    found = set() if start == "base" else {"sft"}
    if not isinstance(spec, OnPolicy):
        unpaired = isinstance(spec, Unpaired) and params.data.labelled is not None
        return found | ({"labelled"} if unpaired else {"preferences"})
    inputs = {path for record in records if record["kind"] == "start" for path in record.get("inputs", {})}
    demonstrated = {"sft" if params.data.experts is None else "experts"} if spec.has_expert else set()
    return found | {"problems"} | ({"preferences"} if "models/reward" in inputs else set()) | demonstrated


def _base(params: Params) -> str:
    """Return the base model in words."""
    if params.model.source == "tiny":
        return f"`tiny`, random weights of this project (seed {params.model.seed})"
    return (
        f"[{params.model.source}](https://huggingface.co/{params.model.source})"
        if _is_on_hub(params.model.source)
        else f"`{params.model.source}`"
    )


def _is_on_hub(name: str) -> bool:
    """Return True for the name of a repository of the hub that is no local folder."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def _results(params: Params, model: str) -> dict[str, float]:
    """Return the numbers of the model's evaluation by name; empty if it has not been evaluated."""
    path = Path("runs/evaluate", model, "metrics.json")
    if not path.is_file():
        return {}
    flat: dict[str, float] = {}
    stack = [("", read_json(path, f"Type `dvc checkout --force {path}`, or `dvc repro`."))]
    while stack:
        prefix, node = stack.pop()
        for name, value in node.items():
            if isinstance(value, dict):
                stack.append((f"{prefix}{name}/", value))
            elif isinstance(value, int | float):
                flat[f"{prefix}{name}"] = float(value)
    return with_measures(flat, params.evaluation.accuracy)


def _yaml(tree: dict[str, Any]) -> str:
    """Return the tree as YAML in block style."""
    import io

    text = io.StringIO()
    yaml = YAML()
    yaml.dump(tree, text)
    return text.getvalue().rstrip()


if __name__ == "__main__":
    sys.exit(main())
