"""Compare the prompts that arrive, by serving and by the inbox, with those that the models are trained on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from posttrain.evaluation.drift import TextDrift, chance_limit, compare_texts, stability_index

TRAINING = ("sft", "preferences", "problems")
ANSWERS = {"sft": "completion", "preferences": "chosen"}
"""Tables with good answers, and the column that holds them."""
SERVED, ACCEPTED = "served prompts", "prompts of accepted files"
FOLDER = Path("data/valid")


SCORED = 256
"""Most answers of each side that the reward model scores, evenly spaced."""
Answer = tuple[Any, str]
"""A prompt and an answer to it."""
Score = Callable[[Sequence[Answer]], list[float]]
Rules = Callable[[Mapping[str, tuple[float, float]]], list[str]]
"""Return the names of the measures that exceed their limits; given value and limit by name."""


@dataclass(frozen=True)
class ScoreDrift:
    """The reward model's scores of arriving answers, compared with those of training answers.

    Attributes:
        answers: how many were compared.
        psi: population stability index of the scores.
        chance: 95 % quantile of the index for so many answers without any drift.
    """

    answers: int
    psi: float
    chance: float


@dataclass(frozen=True)
class Drift:
    """One group of prompts compared with the training prompts; `reasons` say which limits it exceeds."""

    name: str
    measured: TextDrift
    reasons: tuple[str, ...]
    scores: ScoreDrift | None = None
    """None: no reward model, or too few answers."""

    @property
    def words(self) -> str:
        """Return the result in one sentence."""
        if not self.reasons:
            return f"The {self.measured.texts} {self.name} look like the training prompts."
        return f"The {self.measured.texts} {self.name} differ from the training prompts: {'; '.join(self.reasons)}."

    def record(self) -> dict[str, Any]:
        """Return the result as JSON."""
        scores = None if self.scores is None else asdict(self.scores)
        found = {"prompts": self.name, "drifted": bool(self.reasons), "words": self.words}
        return found | asdict(self.measured) | {"scores": scores}


@dataclass(frozen=True)
class Group:
    """Prompts and answers that arrive, with those of training to compare them with."""

    name: str
    training: Sequence[str]
    prompts: Sequence[str]
    training_answers: Sequence[Answer]
    answers: Sequence[Answer]


def arriving(project: Path, params: Params, rules: Rules, reward: Callable[[], Score] | None = None) -> list[Drift]:
    """Return the drift of served prompts and of accepted files; a group with too few prompts is left out.

    `reward` loads the reward model; it is called only if there are answers to score.
    """
    limits, score = params.gate.drift, None
    found = []
    for group in (_served(project), _accepted(project, params)):
        if not group.training or len(group.prompts) < limits.min_prompts:
            continue
        enough = min(len(group.answers), len(group.training_answers)) >= limits.min_prompts
        if enough and reward is not None:
            score = score or reward()
        compared = score_drift(score, group.training_answers, group.answers) if score and enough else None
        found.append(judged(group.name, group.training, group.prompts, limits, rules, compared))
    return found


def _served(project: Path) -> Group:
    records = [record for record in read_served(project) if not record[SHADOW]]
    answers = [(record["prompt"], record["completion"]) for record in records if record.get("completion")]
    return Group(SERVED, training_prompts(project), served_prompts(project), training_answers(project), answers)


def _accepted(project: Path, params: Params) -> Group:
    prompts, answers = accepted_prompts(params), accepted_answers(params)
    earlier, known = sorted(set(training_prompts(project)) - set(prompts)), set(map(json.dumps, answers))
    before = [answer for answer in training_answers(project) if json.dumps(answer) not in known]
    return Group(ACCEPTED, earlier, prompts, before, answers)


def score_drift(score: Score, training: Sequence[Answer], answers: Sequence[Answer]) -> ScoreDrift | None:
    """Compare the scores of answers with those of training answers; of many, some that are evenly spaced.

    None if the reward model could score none of one side.
    """
    expected, actual = (score(_spread(side)) for side in (training, answers))
    if not expected or not actual:
        return None
    psi, bins = stability_index(expected, actual)
    return ScoreDrift(len(actual), psi, chance_limit(bins, len(expected), len(actual)))


def _spread(answers: Sequence[Answer]) -> list[Answer]:
    """Return up to SCORED answers, evenly spaced."""
    count = min(SCORED, len(answers))
    return [answers[i * len(answers) // count] for i in range(count)]


def of_file(project: Path, params: Params, path: Path, rules: Rules) -> Drift:
    """Return the drift of a file's prompts. Raises DataError if it has none, or if there are no training prompts."""
    training, texts = training_prompts(project), _prompts(read_file(path))
    if not training:
        raise DataError(f"{FOLDER} has no training prompts yet; type `dvc repro validate`")
    if not texts:
        raise DataError(f"{path}: no record has a `prompt`")
    return judged(f"prompts of {path.name}", training, texts, params.gate.drift, rules)


def judged(
    name: str,
    training: Sequence[str],
    texts: Sequence[str],
    limits: DriftParams,
    rules: Rules,
    scores: ScoreDrift | None = None,
) -> Drift:
    """Compare one group, and say which limits it exceeds. A stability index within chance is no drift."""
    found = compare_texts(training, texts)
    measures = {
        "length_psi": (found.length_psi, max(limits.length_psi, found.chance)),
        "new_words": (found.new_words, limits.new_words),
    }
    if scores is not None:
        measures["score_psi"] = (scores.psi, max(limits.score_psi, scores.chance))
    return Drift(name, found, tuple(_reason(measure, *measures[measure]) for measure in rules(measures)), scores)


def _reason(measure: str, value: float, limit: float) -> str:
    """Return the words about an exceeded limit."""
    if measure == "new_words":
        return f"{100 * value:.1f} % of their words are in no training prompt, above {100 * limit:.1f} %"
    subject = {"length_psi": "their lengths have", "score_psi": "the reward model's scores of their answers have"}
    return f"{subject[measure]} a stability index of {value:.2f}, above {limit:.2f}"


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
    # pyrefly: ignore[bad-argument-type]
    return [p for kind in kinds for path in accepted_files(kind) for p in _prompts(file_rows(kind, params.data, path))]


def training_answers(project: Path) -> list[Answer]:
    """Return the demonstrations and chosen answers of the training tables, in their order."""
    tables = [(project / FOLDER / f"{table}.parquet", column) for table, column in ANSWERS.items()]
    return [pair for path, column in tables if path.is_file() for pair in _answers(read_rows(path), column)]


def accepted_answers(params: Params) -> list[Answer]:
    """Return the demonstrations and chosen answers of the inbox's accepted files, in the order of their arrival."""
    kinds = [kind for kind in KINDS if kind in ANSWERS]
    # pyrefly: ignore[bad-argument-type]
    paths = [(kind, path) for kind in kinds for path in accepted_files(kind)]
    # pyrefly: ignore[bad-argument-type]
    return [pair for kind, path in paths for pair in _answers(file_rows(kind, params.data, path), ANSWERS[kind])]


def _answers(rows: Iterable[Any], column: str) -> list[Answer]:
    """Return prompt and answer of rows that have both; an answer of messages as the text of its last one."""
    pairs = [(row.get("prompt"), row.get(column)) for row in rows if isinstance(row, dict)]
    return [(p, str(a[-1]["content"]) if isinstance(a, list) else str(a)) for p, a in pairs if p and a]


def _prompts(rows: Iterable[Any]) -> list[str]:
    """Return the prompts of rows as text; those that are neither text nor messages as JSON."""
    found = [row["prompt"] for row in rows if isinstance(row, dict) and row.get("prompt")]
    return [plain(each) if isinstance(each, str | list) else json.dumps(each) for each in found]
