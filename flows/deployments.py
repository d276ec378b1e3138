"""Read and check prefect.yaml, and keep the pauses that a person has set in Prefect's UI."""

from __future__ import annotations

import difflib
import importlib
import platform
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.objects import DeploymentStatus
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectNotFound, ParameterTypeError
from pydantic import ValidationError

from pipelines.config.yaml_files import read_yaml
from posttrain.errors import ConfigError, OrchestrationError

PROJECT = "project:"
ENTRY = ("name", "entrypoint", "description", "tags", "schedules", "parameters", "work_pool")
SCHEDULE = ("cron", "timezone", "active")


@dataclass(frozen=True)
class PlannedRun:
    """One schedule. `active` is None if prefect.yaml does not set it: then a pause set in the UI is kept."""

    cron: str
    timezone: str
    active: bool | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.cron, self.timezone


@dataclass(frozen=True)
class Entry:
    """One deployment of prefect.yaml."""

    name: str
    flow: Flow[..., Any]
    entrypoint: str
    description: str
    tags: tuple[str, ...]
    schedules: tuple[PlannedRun, ...]
    parameters: Mapping[str, Any]

    @property
    def full_name(self) -> str:
        return f"{self.flow.name}/{self.name}"


@dataclass(frozen=True)
class Pauses:
    """Pauses that a person set in Prefect's UI: of the deployment, or of single schedules by cron and time zone."""

    paused: bool = False
    inactive: frozenset[tuple[str, str]] = frozenset()
    schedules: Collection[Any] = field(default=())

    def active(self, planned: PlannedRun) -> bool:
        return planned.key not in self.inactive if planned.active is None else planned.active


def read_entries(path: Path) -> list[Entry]:
    """Return the deployments of prefect.yaml. Raises ConfigError that names entry, value and the nearest valid name."""
    tree = read_yaml(path)
    listed = tree.get("deployments") if isinstance(tree, dict) else None
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise ConfigError(f"{path.name}: `deployments` must be a list of entries with name, entrypoint and schedules.")
    entries = [_entry(each, path) for each in listed]
    names = [entry.name for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{path.name}: {', '.join(twice)} occurs more than once; give each deployment its own name.")
    return entries


def find_flow(path: Path, name: str) -> Flow[..., Any]:
    """Return the flow of the deployment with that name in prefect.yaml. Raises ConfigError if there is none."""
    for tree in read_yaml(path)["deployments"]:
        if tree["name"] == name:
            return _flow(tree["entrypoint"], path.parent, f"{path.name}, deployment {name!r}")
    raise ConfigError(
        f"{path} deploys no {name!r}; deploy again with `python -m flows.deploy`, or restart `make serve`."
    )


def _entry(tree: Mapping[str, Any], path: Path) -> Entry:
    name = tree.get("name")
    where = f"{path.name}, deployment {name!r}"
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{path.name}: a deployment has no name; add e.g. `name: nightly`.")
    _refuse_unknown(tree, ENTRY, where)
    flow = _flow(tree.get("entrypoint"), path.parent, where)
    description, tags = tree.get("description") or "", tree.get("tags") or []
    if not isinstance(description, str) or not isinstance(tags, list):
        raise ConfigError(f"{where}: description must be text, and tags a list.")
    schedules = tree.get("schedules") or []
    if not isinstance(schedules, list):
        raise ConfigError(f"{where}: schedules must be a list; `schedules: []` runs it only by hand.")
    return Entry(
        name,
        flow,
        str(tree["entrypoint"]),
        description,
        tuple(map(str, tags)),
        tuple(_planned(each, where) for each in schedules),
        _parameters(tree.get("parameters") or {}, flow, where),
    )


def _flow(entrypoint: object, root: Path, where: str) -> Flow[..., Any]:
    """Import the flow of an entry point such as flows/retrain.py:retrain."""
    module, _, function = str(entrypoint).partition(":")
    if not (root / module).is_file() or not module.endswith(".py"):
        files = [f"flows/{file.name}" for file in sorted((root / "flows").glob("*.py"))]
        raise ConfigError(f"{where}: entrypoint {entrypoint!r}: there is no file {module!r}{_nearest(module, files)}.")
    loaded = importlib.import_module(module.removesuffix(".py").replace("/", "."))
    flow = getattr(loaded, function, None)
    if not isinstance(flow, Flow):
        known = [name for name, value in vars(loaded).items() if isinstance(value, Flow)]
        raise ConfigError(
            f"{where}: entrypoint {entrypoint!r}: {module} has no flow {function!r}{_nearest(function, known)}."
        )
    return flow


def _planned(tree: object, where: str) -> PlannedRun:
    if not isinstance(tree, dict):
        raise ConfigError(f'{where}: a schedule must be a mapping, e.g. `- cron: "0 2 * * *"`, and is {tree!r}.')
    if "interval" in tree or "rrule" in tree:
        raise ConfigError(
            f'{where}: schedules are given as cron, e.g. `- cron: "0 2 * * *"`; `interval` and `rrule` are not supported.'
        )
    _refuse_unknown(tree, SCHEDULE, f"{where}, schedule")
    cron, zone, active = tree.get("cron"), tree.get("timezone", "UTC"), tree.get("active")
    if active is not None and not isinstance(active, bool):
        raise ConfigError(f"{where}: active: {active!r} must be true or false.")
    try:
        CronSchedule.model_validate({"cron": cron, "timezone": zone})
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(
            f"{where}: cron {cron!r} in time zone {zone!r} is not valid ({reason}), so it would never run. A cron line is minute"
            " (0-59), hour (0-23), day, month, weekday; a time zone is a name such as Europe/Berlin."
        ) from None
    return PlannedRun(str(cron), str(zone), active)


def _parameters(tree: object, flow: Flow[..., Any], where: str) -> Mapping[str, Any]:
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: parameters must be a mapping of names to values, and is {tree!r}.")
    _refuse_unknown(tree, tuple(flow.parameters.properties), f"{where}, parameters")
    try:
        flow.validate_parameters(tree)
    except (ValidationError, ParameterTypeError) as error:
        reason = " ".join(str(error).split("\n")[1:3]).strip() or str(error)
        raise ConfigError(
            f"{where}, parameters: {flow.name} does not accept {tree}: {reason[:200]}. Every run would crash; correct the value."
        ) from None
    return tree


def _refuse_unknown(tree: Mapping[str, Any], known: Collection[str], where: str) -> None:
    wrong = [str(name) for name in tree if name not in known]
    if wrong:
        raise ConfigError(
            f"{where}: unknown name {wrong[0]!r}{_nearest(wrong[0], known)}. It would have no effect. Valid names: {', '.join(known)}."
        )


def _nearest(wrong: str, known: Collection[str]) -> str:
    found = difflib.get_close_matches(wrong, known, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def read_pauses(entries: Collection[Entry]) -> dict[str, Pauses]:
    """Return the pauses on the server now, by deployment."""
    found: dict[str, Pauses] = {}
    with get_client(sync_client=True) as client:
        for entry in entries:
            try:
                deployment = client.read_deployment_by_name(entry.full_name)
            except ObjectNotFound:
                continue
            inactive = frozenset(key for key, each in _crons(deployment).items() if not each.active)
            found[entry.full_name] = Pauses(bool(deployment.paused), inactive, tuple(deployment.schedules))
    return found


def project_tag(root: Path) -> str:
    """Return the tag by which a deployment names the folder that serves it."""
    return f"{PROJECT}{platform.node()}:{root.resolve()}"


def container_tag(experiment: str, folder: str) -> str:
    """Return the tag of a project inside containers, whose host names change: the experiment of params.yaml identifies the project."""
    return f"{PROJECT}{experiment}:{folder}"


def refuse_foreign(entries: Collection[Entry], root: Path, tag: str) -> None:
    """Raise OrchestrationError if a different project than `tag` serves deployments of these names from the same Prefect server.

    Two projects on one server would replace each other's schedules, and either would run the other's flows. A deployment that nothing
    has polled for a minute is taken over.
    """
    with get_client(sync_client=True) as client:
        for entry in entries:
            try:
                found = client.read_deployment_by_name(entry.full_name)
            except ObjectNotFound:
                continue
            owner = next((each for each in found.tags if each.startswith(PROJECT)), tag)
            if owner != tag and found.status == DeploymentStatus.READY:
                raise OrchestrationError(
                    f"{entry.full_name} on this Prefect server is served from {owner.removeprefix(PROJECT)}. A second project would"
                    " replace its schedules. Stop that one and wait a minute, or unset PREFECT_API_URL and give this project its own"
                    f" database: PREFECT_HOME={root / '.posttrain' / 'prefect'} make serve PREFECT_PORT=0"
                )


def mark_owner(entries: Collection[Entry], tag: str) -> None:
    """Add the project's tag to the deployments, in place of an earlier one; `prefect deploy` sets only the tags of prefect.yaml."""
    with get_client(sync_client=True) as client:
        for entry in entries:
            deployment = client.read_deployment_by_name(entry.full_name)
            kept = [each for each in deployment.tags if not each.startswith(PROJECT)]
            client.update_deployment(deployment.id, DeploymentUpdate(tags=[*kept, tag]))


def remove_old_schedules(entries: Collection[Entry], before: Mapping[str, Pauses]) -> None:
    """Delete the server's schedules of entries with `schedules: []`: Prefect takes an empty list for "unchanged"."""
    with get_client(sync_client=True) as client:
        for entry in entries:
            if entry.schedules or not before.get(entry.full_name, Pauses()).schedules:
                continue
            deployment = client.read_deployment_by_name(entry.full_name)
            for each in deployment.schedules:
                client.delete_deployment_schedule(deployment.id, each.id)


def apply_schedules(entries: Collection[Entry], before: Mapping[str, Pauses]) -> None:
    """Make the server's schedules those of prefect.yaml: remove others, and keep the pauses that were there before."""
    with get_client(sync_client=True) as client:
        for entry in entries:
            deployment = client.read_deployment_by_name(entry.full_name)
            pauses, planned = before.get(entry.full_name, Pauses()), {each.key: each for each in entry.schedules}
            for each in deployment.schedules:
                run = planned.get(_key(each))
                if run is None:
                    client.delete_deployment_schedule(deployment.id, each.id)
                elif each.active != pauses.active(run):
                    client.update_deployment_schedule(deployment.id, each.id, active=pauses.active(run))
            if bool(deployment.paused) != pauses.paused:
                (client.pause_deployment if pauses.paused else client.resume_deployment)(deployment.id)


def _crons(deployment: DeploymentResponse) -> dict[tuple[str, str], Any]:
    return {_key(each): each for each in deployment.schedules}


def _key(schedule: Any) -> tuple[str, str]:
    return str(getattr(schedule.schedule, "cron", "")), str(getattr(schedule.schedule, "timezone", None) or "UTC")
