"""Read and change MLflow's model registry: champion, challenger and previous. DVC keeps the weights; a version points at them.

Aliases: `champion` is in production, `challenger` is the last candidate that the gate
checked or the best model of the last comparison, `previous` is the champion before
the current one. A version's source is dvc://PATH?md5=HASH; its tags hold the hash, the remote and the gate's reasons.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipelines.runtime.redaction import printable, redact
from pipelines.tracking.describe import RUN_TAG
from pipelines.tracking.lockfile import default_remote, locked_output
from pipelines.tracking.store import ask, open_client
from posttrain.errors import DataError, TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
ALIASES = (CHAMPION, CHALLENGER, PREVIOUS)
MD5, PATH, SIZE, FILES, REMOTE = "dvc.md5", "dvc.path", "dvc.size", "dvc.nfiles", "dvc.remote"
MODEL, DECISION, REASON, ROLLED_BACK, RETRAIN = "model", "decision", "reason", "rolled_back", "retrain"
AGAINST = "judged_against"
"""Number of the champion that the gate compared with, or none."""
MEASURE = "judged_by"
"""Digest of the evaluation set and of the parameters that the gate judged by."""
EVALUATION = "evaluation"
"""Mark of the evaluation by which the gate judged: its number of rows and a digest."""
_TAG_LENGTH = 4000
_PAGE = 1000
"""Versions of one answer of MLflow."""
_NAME_LENGTH = 100
FOLDER_HASH = re.compile(r"[0-9a-f]{32}\.dir")
_COUNT = re.compile(r"[0-9]{1,18}")
_MODEL_PATH = re.compile(r"models(/[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}){1,3}")
_EVALUATION_MARK = re.compile(r"[0-9]{1,9}:[0-9a-f]{12}")

T = TypeVar("T")


@dataclass(frozen=True)
class Version:
    """One registered model, as a pointer to weights that DVC keeps.

    Its tags are untrusted: whoever has MLflow's password can write them. Only checked values reach a file, a path or a command.
    """

    number: int
    tags: Mapping[str, str]
    aliases: tuple[str, ...]

    @property
    def name(self) -> str:
        """Return the version's number and the model's name, for messages."""
        return f"version {self.number} ({self.words(MODEL, 'unknown')[:_NAME_LENGTH]})"

    def words(self, tag: str, missing: str = "") -> str:
        """Return a tag as one line for terminals and logs: a line feed in it would forge a line of the program's own."""
        return printable(" ".join(self.tags.get(tag, missing).split()))

    @property
    def md5(self) -> str:
        """Return the hash of the weights. Raises DataError if the tag is missing or no hash of a folder."""
        return self._checked(MD5, FOLDER_HASH, "the hash of a folder: 32 hexadecimal digits and .dir")

    @property
    def entry(self) -> dict[str, str | int]:
        """Return the weights as an entry of DVC: md5, size in bytes, number of files. Raises DataError if a tag is missing or wrong."""
        md5 = self.md5
        size, files = (int(self._checked(tag, _COUNT, "a whole number")) for tag in (SIZE, FILES))
        return {"md5": md5, "size": size, "nfiles": files}

    @property
    def path(self) -> str:
        """Return the path in the project under which the weights were made. Raises DataError if the tag is missing or wrong."""
        return self._checked(PATH, _MODEL_PATH, "a path below models/")

    @property
    def evaluation(self) -> str | None:
        """Return the mark of the evaluation by which the gate judged, or None if there is none that can be read."""
        mark = self.tags.get(EVALUATION, "")
        return mark if _EVALUATION_MARK.fullmatch(mark) else None

    @property
    def fault(self) -> str:
        """Return why the version cannot be used, or nothing if it can."""
        try:
            self.entry  # noqa: B018
        except DataError as error:
            return str(error)
        return ""

    def holds(self, md5: str) -> bool:
        """Return True if the version names the weights with this hash."""
        return self.tags.get(MD5) == md5

    def _checked(self, tag: str, form: re.Pattern[str], rule: str) -> str:
        value = self.tags.get(tag)
        if value is not None and form.fullmatch(value):
            return value
        found = "is missing" if value is None else f"= {printable(value)[:_NAME_LENGTH]!r}"
        raise DataError(
            f"{self.name} cannot be used: its tag {tag} {found}, and must be {rule}. This project did not register it so. Nothing was"
            " changed. Promote a different version (`posttrain models` lists them: `python -m flows.promote N`), or delete this one or"
            " its aliases in MLflow's page."
        )


class ProductionChanged(TrackingError):
    """A different version became champion after a decision was made."""


class Registry:
    """The versions of one registered model. Raises TrackingError if MLflow does not respond."""

    def __init__(self, project: Path, name: str) -> None:
        self.project, self.name = project, name
        self._client: MlflowClient = open_client(project)

    def versions(self) -> list[Version]:
        """Return all versions, newest first."""
        ask_page = partial(self._client.search_model_versions, f"name = '{self.name}'", _PAGE)
        page = self._ask(ask_page)
        found = list(page)
        while page.token:
            page = self._ask(partial(ask_page, page_token=page.token))
            found += page
        aliases = self._aliases()
        listed = [_version(each, aliases) for each in found]
        return sorted(listed, key=lambda version: -version.number)

    def holding(self, alias: str) -> Version | None:
        """Return the version that holds an alias, or None."""
        return next((version for version in self.versions() if alias in version.aliases), None)

    def version(self, number: int) -> Version:
        """Return one version by its number. Raises TrackingError if there is none."""
        for version in self.versions():
            if version.number == number:
                return version
        known = ", ".join(str(version.number) for version in self.versions()) or "none"
        raise TrackingError(f"the registry has no version {number} of {self.name}; it has: {known}")

    def register(self, model: str, folder: str, tags: Mapping[str, str], description: str) -> Version:
        """Register the weights that dvc.lock names under `folder`, or update the existing version with the same weights."""
        entry = locked_output(self.project, folder)
        if entry is None:
            raise TrackingError(
                f"{folder} is not in dvc.lock, so there are no weights to register; make it with `dvc"
                " repro`, then run again"
            )
        return self.register_entry(model, folder, entry, tags, description)

    def adopt(self, folder: str, entry: Mapping[str, Any]) -> Version:
        """Register the weights in production, which this registry does not know, and make them champion."""
        words = "adopted: these weights were in production before this registry existed"
        version = self.register_entry("adopted", folder, entry, {DECISION: "adopted", REASON: words}, words)
        return self.promote(version.number)

    def register_entry(
        self, model: str, folder: str, entry: Mapping[str, Any], tags: Mapping[str, str], description: str
    ) -> Version:
        """Create a version for the weights of a DVC entry, or update the one that has them."""
        md5 = str(entry["md5"])
        known = next((version for version in self.versions() if version.holds(md5)), None)
        pointer = {MODEL: model, MD5: md5, PATH: folder, SIZE: str(entry["size"]), FILES: str(entry.get("nfiles", 1))}
        remote = default_remote(self.project)
        every = pointer | ({REMOTE: remote} if remote else {}) | dict(tags)
        every = {key: _fitting(value) for key, value in every.items()}
        if known is not None:
            self.tag(known.number, every)
            return self.version(known.number)
        self._create_model()
        run_id = self._run_id(tags.get(RUN_TAG))
        source = f"dvc://{folder}?md5={md5}"
        created = self._ask(
            lambda: self._client.create_model_version(
                self.name, source, run_id=run_id, tags=every, description=redact(description)
            )
        )
        return self.version(int(created.version))

    def promote(self, number: int, seen: Sequence[Version | None] = ()) -> Version:
        """Make a version champion; the champion until now becomes previous, if it can be used. Removes the version's roll-back mark.

        `seen` may hold the champion, or None, for which the decision was made. Raises ProductionChanged if a different version is champion
        now: a different project of this registry, or a person, has changed production while the weights were brought here.
        """
        before = self.holding(CHAMPION)
        if before is not None and before.number not in (
            number,
            *(each.number if each else 0 for each in seen or (before,)),
        ):
            raise ProductionChanged(
                f"{before.name} became champion of {self.name} while version {number} was to be promoted, by a different project or by"
                " hand. Nothing was changed here. `posttrain models` lists the versions; type the command again if it is still wanted."
            )
        if before is not None and before.number != number and not before.fault:
            self._set_alias(PREVIOUS, before.number)
        self._set_alias(CHAMPION, number)
        after = self.version(number)
        if CHALLENGER in after.aliases:
            self._drop_alias(CHALLENGER)
        if ROLLED_BACK in after.tags:
            self._ask(lambda: self._client.delete_model_version_tag(self.name, str(number), ROLLED_BACK))
        return self.version(number)

    def challenge(self, number: int) -> None:
        """Give a version the alias `challenger`."""
        self._set_alias(CHALLENGER, number)

    def roll_back(self, reason: str, pair: tuple[Version, Version] | None = None) -> tuple[Version, Version]:
        """Make `previous` champion again and bar the current champion; return (new champion, old champion).

        Raises TrackingError on a second call: the same command, repeated after an error, must not restore the version it removed. With
        `pair`, an earlier result of `roll_back_pair`, also if a different project of this registry has changed production since.
        """
        champion, previous = self.roll_back_pair()
        if pair is not None and (champion.number, previous.number) != tuple(version.number for version in pair):
            raise TrackingError(
                f"{champion.name} became champion of {self.name} while this roll-back of {pair[0].name} began, by a different project or"
                " by hand. Nothing was rolled back. `posttrain models` lists the versions; type the roll-back again if it is still wanted."
            )
        self.tag(champion.number, {ROLLED_BACK: reason})
        self._set_alias(CHAMPION, previous.number)
        self._set_alias(PREVIOUS, champion.number)
        return self.version(previous.number), self.version(champion.number)

    def roll_back_pair(self) -> tuple[Version, Version]:
        """Return champion and previous. Raises TrackingError if a roll-back is not possible."""
        champion, previous = self.holding(CHAMPION), self.holding(PREVIOUS)
        if champion is None or previous is None:
            raise TrackingError(
                f"nothing to roll back to: {self.name} has no {'champion' if champion is None else 'previous version'} yet."
                " `posttrain models` lists the versions; promote one by its number."
            )
        if ROLLED_BACK in previous.tags or previous.number == champion.number:
            raise TrackingError(
                f"{champion.name} is champion after a roll-back, and no version before it is known to be better. `python -m"
                f" flows.promote {champion.number}` copies its weights to models/champion; to promote a different version, give its number."
            )
        return champion, previous

    def barred(self) -> dict[str, Version]:
        """Return the versions that were rolled back by hand, by the hash of their weights; the gate refuses these weights."""
        return {v.md5: v for v in self.versions() if ROLLED_BACK in v.tags and not v.fault}

    def state(self) -> dict[str, str]:
        """Return the weights under each alias, and those that were rolled back. A decision holds only for this state."""
        versions = self.versions()
        weights = {version.number: version.tags.get(MD5, "") for version in versions}
        held = {alias: f"{v.number} {weights[v.number]}" for v in versions for alias in v.aliases}
        return held | {f"rolled back {v.number}": weights[v.number] for v in versions if ROLLED_BACK in v.tags}

    def tag(self, number: int, tags: Mapping[str, str]) -> None:
        """Set tags on a version, without credentials and cut to the length that MLflow takes."""
        for key, value in tags.items():
            self._ask(partial(self._client.set_model_version_tag, self.name, str(number), key, _fitting(value)))

    def link(self, number: int) -> str | None:
        """Return the URL of the version's page, or None if MLflow is not a server."""
        uri = str(self._client.tracking_uri)
        return (
            f"{redact(uri).rstrip('/')}/#/models/{self.name}/versions/{number}"
            if uri.startswith(("http://", "https://"))
            else None
        )

    def _aliases(self) -> dict[str, int]:
        """Return the version number of each alias."""
        found = self._ask(lambda: self._client.search_registered_models(f"name = '{self.name}'"))
        return {alias: int(number) for model in found for alias, number in model.aliases.items()}

    def _create_model(self) -> None:
        """Create the registered model if it does not exist."""
        if not self._ask(lambda: self._client.search_registered_models(f"name = '{self.name}'")):
            self._ask(lambda: self._client.create_registered_model(self.name))

    def _run_id(self, identity: str | None) -> str | None:
        """Return the MLflow run that trained the weights, if its journal was copied to MLflow."""
        if identity is None:
            return None
        experiment = self._ask(lambda: self._client.get_experiment_by_name(self.name))
        if experiment is None:
            return None
        query = f"tags.`{RUN_TAG}` = '{identity}'"
        runs = self._ask(lambda: self._client.search_runs([experiment.experiment_id], query))
        return str(runs[0].info.run_id) if runs else None

    def _set_alias(self, alias: str, number: int) -> None:
        """Point an alias at a version."""
        self._ask(lambda: self._client.set_registered_model_alias(self.name, alias, str(number)))

    def _drop_alias(self, alias: str) -> None:
        """Remove an alias."""
        self._ask(lambda: self._client.delete_registered_model_alias(self.name, alias))

    def _ask(self, call: Callable[[], T]) -> T:
        """Call MLflow. Raises TrackingError with advice if it does not respond."""
        advice = "The trained models and the decision are kept; run again when it responds."
        return ask(self._client, call, "did not respond to a request for the registry", advice)


def _version(found: ModelVersion, aliases: Mapping[str, int]) -> Version:
    """Convert MLflow's version object."""
    number = int(found.version)
    mine = tuple(alias for alias in ALIASES if aliases.get(alias) == number)
    tags: dict[str, Any] = dict(found.tags)
    return Version(number, tags, mine)


def _fitting(value: str) -> str:
    return redact(value).encode("utf-8", "backslashreplace").decode()[:_TAG_LENGTH]
