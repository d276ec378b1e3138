"""Compare the prompts that arrive, by serving and by the inbox, with those that the models are trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.config.gate_schema import DriftParams
from pipelines.config.params import Params
from pipelines.data.files import read_file
from pipelines.data.sources import accepted_files, file_rows
from pipelines.data.tables import plain, read_rows
from pipelines.tracking.served import SHADOW, read_served
from posttrain.environments.parts import KINDS
from posttrain.errors import DataError
from posttrain.evaluation.drift import TextDrift, compare_texts

TRAINING = ("sft", "preferences", "problems")
SERVED, ACCEPTED = "served prompts", "prompts of accepted files"
FOLDER = Path("data/valid")


@dataclass(frozen=True)
class Drift:
    """One group of prompts compared with the training prompts; `reasons` say which limits it exceeds."""

    name: str
    measured: TextDrift
    reasons: tuple[str, ...]

    @property
    def words(self) -> str:
        """Return the result in one sentence."""
        if not self.reasons:
            return f"The {self.measured.texts} {self.name} look like the training prompts."
        return f"The {self.measured.texts} {self.name} differ from the training prompts: {'; '.join(self.reasons)}."

    def record(self) -> dict[str, Any]:
        """Return the result as JSON."""
        return {"prompts": self.name, "drifted": bool(self.reasons), "words": self.words} | asdict(self.measured)


def arriving(project: Path, params: Params) -> list[Drift]:
    """Return the drift of served prompts and of accepted files; a group with too few prompts is left out."""
    limits = params.gate.drift
    training, served, accepted = training_prompts(project), served_prompts(project), accepted_prompts(params)
    earlier = sorted(set(training) - set(accepted))
    groups = ((SERVED, training, served), (ACCEPTED, earlier, accepted))
    return [
        judged(name, reference, texts, limits)
        for name, reference, texts in groups
        if reference and len(texts) >= limits.min_prompts
    ]


def of_file(project: Path, params: Params, path: Path) -> Drift:
    """Return the drift of a file's prompts. Raises DataError if it has none, or if there are no training prompts."""
    training, texts = training_prompts(project), _prompts(read_file(path))
    if not training:
        raise DataError(f"{FOLDER} has no training prompts yet; type `dvc repro validate`")
    if not texts:
        raise DataError(f"{path}: no record has a `prompt`")
    return judged(f"prompts of {path.name}", training, texts, params.gate.drift)


def judged(name: str, training: Sequence[str], texts: Sequence[str], limits: DriftParams) -> Drift:
    """Compare one group, and say which limits it exceeds. A stability index within chance is no drift."""
    found, reasons = compare_texts(training, texts), []
    if found.length_psi > max(limits.length_psi, found.chance):
        reasons.append(
            f"their lengths have a stability index of {found.length_psi:.2f}, above {max(limits.length_psi, found.chance):.2f}"
        )
    if found.new_words > limits.new_words:
        reasons.append(
            f"{100 * found.new_words:.1f} % of their words are in no training prompt, above {100 * limits.new_words:.1f} %"
        )
    return Drift(name, found, tuple(reasons))


def training_prompts(project: Path) -> list[str]:
    """Return the different prompts of the training tables, sorted."""
    paths = [project / FOLDER / f"{table}.parquet" for table in TRAINING]
    return sorted({text for path in paths if path.is_file() for text in _prompts(read_rows(path))})


def served_prompts(project: Path) -> list[str]:
    """Return the prompt of every logged request, in their order."""
    records = [record for record in read_served(project) if not record[SHADOW]]
    return _prompts({record["request"]: record for record in records}.values())


def accepted_prompts(params: Params) -> list[str]:
    """Return the prompts of the inbox's accepted training files, in the order of their arrival."""
    kinds = [kind for kind in KINDS if kind in TRAINING]
    return [p for kind in kinds for path in accepted_files(kind) for p in _prompts(file_rows(kind, params.data, path))]


def _prompts(rows: Iterable[Any]) -> list[str]:
    """Return the prompts of rows as text; those that are neither text nor messages as JSON."""
    found = [row["prompt"] for row in rows if isinstance(row, dict) and row.get("prompt")]
    return [plain(each) if isinstance(each, str | list) else json.dumps(each) for each in found]
