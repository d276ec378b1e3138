"""The section `data` of params.yaml: sources of the tables, and the settings of the generators."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipelines.config.types import Count, Finite, NonNegative, Section, Seed, Share, Source
from posttrain.environments.base import built_in, is_environment
from posttrain.text import nearest


class ArithmeticParams(Section):
    """Settings of the generator `arithmetic`."""

    terms: Annotated[int, Field(ge=2, le=8)]
    max_term: Annotated[int, Field(ge=1, le=10**6)]
    careless: Share
    notation: Literal["chain", "terse"] = "chain"
    """Style of the demonstrations: chain names every running sum of a column, terse only its total. Pairs are always chains."""


class GradedAnswers(Section):
    """Make pairs of records that hold several graded answers: every better answer against every worse one."""

    columns: Annotated[list[str], Field(min_length=2)] | None = None
    """Columns that hold one answer each,"""
    answers: str | None = None
    """or the column or path of one list of answers."""
    text: str = ""
    """The name of an answer's text within it; not needed for a list of strings."""
    score: str
    """The name of an answer's score within it; for a list of strings, the column of their scores."""
    better: Literal["higher", "lower"] | None = None
    """Whether a higher score is better or a lower one, such as a rank. Needed unless the scores are booleans."""

    @model_validator(mode="after")
    def _one_place(self) -> GradedAnswers:
        if (self.columns is None) == (self.answers is None):
            raise ValueError("give either columns (one answer each) or answers (one list)")
        if len({*(self.columns or ())}) < len(self.columns or ()):
            raise ValueError(
                f"columns {self.columns}: names a column twice, so its answer would be compared with itself"
            )
        return self


class PreferredAnswer(Section):
    """Make pairs of records that hold two answers and a label, or several annotators' labels, of the better one."""

    columns: Annotated[list[str], Field(min_length=1)]
    """The label's column, or one column for each annotator; most of them decide."""
    answers: Annotated[dict[str, str], Field(min_length=2, max_length=2)]
    """Label to the column of the better answer, e.g. {a: response_a, b: response_b}."""
    ties: list[str] = Field(default_factory=list)
    """Labels that say neither is better. Such records are left out and counted."""

    @model_validator(mode="after")
    def _without_contradiction(self) -> PreferredAnswer:
        if len({*self.answers.values()}) < len(self.answers):
            raise ValueError(f"answers {self.answers}: both labels name the same column, so no answer is better")
        if both := sorted({*self.ties} & {*self.answers}):
            raise ValueError(f"ties: {both[0]!r} is also a label of answers; a label means either a winner or a tie")
        if len({*self.columns}) < len(self.columns):
            raise ValueError(f"columns {self.columns}: names a column twice, so its label would count twice")
        return self


class TableSource(Section):
    """The source of one canonical table.

    `columns` maps canonical names to a column, a dotted path, or a template such as '{Body} {Question}'.
    """

    source: Source | Annotated[list[Source], Field(min_length=1)]
    """An environment (arithmetic, stories, word_problems, calculator, guess, or package.module:ENVIRONMENT), a file, a folder of files, a
    pattern such as data/*.jsonl, hub:OWNER/NAME, or a list of these."""
    rows: Count | None = None
    columns: dict[str, str] | None = None
    extract: dict[str, str] | None = None
    """Maps a canonical column to a regular expression; its first group replaces the value."""
    graded: GradedAnswers | None = None
    preferred: PreferredAnswer | None = None
    system: str | None = None
    """The system message of every row that has none; plain prompts become a user's turn."""
    template: str | None = None
    """Text of a user's turn, with {prompt} for the prompt: plain rows become conversations, e.g. "{prompt}"."""
    split: str | None = None
    """Split of a hub data set, and of files whose names say their split, in a folder or of a pattern. Without it train; a pattern that
    matches files of several splits needs it."""
    heldout: Annotated[Finite, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _usable(self) -> TableSource:
        if self.graded and self.preferred:
            raise ValueError("give either graded or preferred: each makes pairs in its own way")
        if self.template is not None and "{prompt}" not in self.template:
            raise ValueError(f"template {self.template!r} must contain {{prompt}}, else every row would ask the same")
        return self

    @property
    def wanted_split(self) -> str:
        """Return the split that is read."""
        return "train" if self.split is None else self.split

    @property
    def names(self) -> list[str]:
        """Return all sources; usually one."""
        return [self.source] if isinstance(self.source, str) else self.source


class ExpertSource(TableSource):
    """The source of CHORD's demonstrations, in the form of `sft`."""

    options: dict[str, Any] = Field(default_factory=dict)
    """Changes of the generator's options for these rows only, such as {careless: 0.0, notation: terse}."""


class StoriesParams(Section):
    """Settings of the generator `stories`."""

    words: Annotated[list[str], Field(min_length=1)]
    openings: Annotated[list[str], Field(min_length=1)]
    careless: Share = 0.5
    """Share of stories in the sft table that omit the word."""


class NoiseParams(Section):
    """Label noise of the training pairs, for studies of robustness; held-out pairs are kept as they are."""

    flipped: Share = 0.0
    """Share of pairs whose answers are swapped."""
    scores: NonNegative = 0.0
    """Standard deviation of the noise of each score; a pair whose order it reverses is swapped."""


class DataParams(Section):
    """Sources of all tables."""

    seed: Seed
    environments: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Options of other environments, by the name or import path that is their tables' source."""
    arithmetic: ArithmeticParams
    stories: StoriesParams | None = None
    noise: NoiseParams = NoiseParams()
    sft: TableSource
    preferences: TableSource
    problems: TableSource
    evaluation: TableSource
    labelled: TableSource | None = None
    """Single answers with thumbs up or down (columns prompt, completion, label) for KTO. null: the answers of the pairs are used."""
    experts: ExpertSource | None = None
    """Demonstrations that only CHORD trains on, such as an expert's answers in another style. null: CHORD trains on those of `sft`."""

    @model_validator(mode="after")
    def _every_environment_is_known(self) -> DataParams:
        """Refuse options of an environment that does not exist. The sources of the tables are checked where they are read."""
        tables = (self.sft, self.preferences, self.problems, self.evaluation, self.labelled, self.experts)
        sources = {name for table in tables if table is not None for name in table.names}
        for name in self.environments:
            if name not in sources and not is_environment(name):
                raise ValueError(
                    f"environments.{name}: no such environment, so its options would have no effect{nearest(name, [*built_in()])}"
                )
        return self
