"""Load a study: a question, one factor, arms, seeds, claims about outcomes, and the source of the claim.

A study is one YAML file in examples/studies. An arm is a section of `algorithms` in params.yaml, and may change other parameters, such
as the data. A claim states that a weighted sum of arms exceeds a number:

    claims:
      - claim: a group of 8 is better than a group of 2
        outcome: answers/accuracy
        contrast: {group_8: 1, group_2: -1}
        at_least: 0.0
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from pipelines.config.types import Finite, Name, Section, Seed
from pipelines.config.yaml_files import read_yaml
from posttrain.errors import ConfigError
from posttrain.text import nearest

FOLDER = Path("examples/studies")
FIXED = ("base", "sft")
"""Models that every arm starts from; a claim may name them."""


class Arm(Section):
    """One value of the factor: an algorithm, and other parameters that the arm changes."""

    algorithm: dict[str, Any]
    """A section of `algorithms`: preset, options, rewards, budget."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Changes of other sections of params.yaml; arms with equal changes share their data and their supervised model."""


class Claim(Section):
    """A statement that the study decides: the contrast of the outcome is more than `at_least`."""

    claim: str
    outcome: Annotated[
        str, Field(pattern=r"^((answers|measured)/[a-z_]+|(evaluation|training)/[\w@/]+(:(first|last|mean|max|min))?)$")
    ]
    """`answers/COLUMN`: per prompt, over all sampled answers. `evaluation/NAME`: a number of metrics.json. `training/METRIC:last`: a
    number of the curve, also first, mean, max or min. `measured/NAME`: seconds or memory on this machine, see `measured.py`."""
    contrast: Annotated[dict[Name, Finite], Field(min_length=1)]
    """Weight of each arm."""
    at_least: Finite = 0.0
    """The number that the contrast must exceed: 0, a difference that matters, or a tolerated loss if it is negative."""


class Study(Section):
    """One study as in its file."""

    question: str
    source: Annotated[str, Field(pattern=r"^\d{4}\.\d{4,5}$")]
    """The arXiv number of the paper that makes the claim."""
    factor: str
    base: str = "tiny.yaml"
    """A file next to the study with the changes of params.yaml that all arms share."""
    params: dict[str, Any] = Field(default_factory=dict)
    pretraining: dict[str, Any] | None = None
    """Changes of params.yaml for a supervised model that is trained first and is the base model of all arms; null for none."""
    seeds: Annotated[list[Seed], Field(min_length=2)]
    arms: Annotated[dict[Name, Arm], Field(min_length=1)]
    claims: Annotated[list[Claim], Field(min_length=1)]
    level: Finite | None = None
    """The true reward that `measured/seconds_to_level` is about."""
    shown: list[str] = Field(default_factory=list)
    """Further outcomes for the table of the arms."""
    remark: str = ""
    """A limit of the design that a reader of the verdict must know."""

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        """Check that every claim names arms of the study."""
        names = [*self.arms, *FIXED]
        for i, claim in enumerate(self.claims):
            for name in claim.contrast:
                if name not in names:
                    raise ValueError(f"claims.{i}.contrast: no arm {name!r}{nearest(name, names)}")
        return self

    @property
    def digest(self) -> str:
        """Return a hash of everything that the results depend on in this file."""
        # words change no run, and an option that is not used leaves the digests of other studies as they are
        unused = {name for name in ("pretraining", "level") if getattr(self, name) is None}
        ignored = {"remark"} | unused
        return hashlib.sha256(self.model_dump_json(exclude=ignored).encode()).hexdigest()[:16]


def names(root: Path) -> list[str]:
    """Return the names of all studies, sorted."""
    found = (path.stem for path in (root / FOLDER).glob("*.yaml"))
    return sorted(name for name in found if not name.startswith("tiny"))


def load_study(root: Path, name: str) -> Study:
    """Return a study by its name. Raises ConfigError if there is none or it is not valid."""
    known = names(root)
    if name not in known:
        raise ConfigError(f"no study {name!r} in {FOLDER}{nearest(name, known)}")
    path = root / FOLDER / f"{name}.yaml"
    try:
        return Study.model_validate(read_yaml(path))
    except ValidationError as error:
        lines = [f"{path.name}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise ConfigError("\n".join(lines)) from None
