"""Change the champion: one lock, the weights first and the aliases after, also while a flow is at work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from flows.lock import WorkspaceBusy, only_flow
from pipelines.config.params import load_params
from pipelines.promotion.registry import CHAMPION, Registry, Version
from posttrain.errors import PosttrainError
from tasks.champion import PENDING, follow, put_into_production, switching
from tasks.console import log_line, print_line

T = TypeVar("T")


def registry_of(project: Path) -> Registry:
    """Return the registry of a project."""
    return Registry(project, load_params(project / "params.yaml").project.experiment)


def switch(project: Path, choose: Callable[[], Version], move: Callable[[Version], T]) -> T:
    """Bring the chosen version's weights to models/champion, then move the aliases. A second call waits for the first.

    A flow that is running here keeps its models/champion, and brings the new champion there when it ends.
    """
    with switching(project), ExitStack() as stack:
        version = choose()
        try:
            stack.enter_context(only_flow(project))
        except WorkspaceBusy as error:
            moved = put_into_production(project, version, lambda: move(version), busy=True)
            log_line(
                f"models/champion does not hold {version.name} yet: {error} That flow brings it there when it ends."
            )
            return moved
        return put_into_production(project, version, lambda: move(version))


def reconcile(project: Path) -> None:
    """Bring the registry's champion to models/champion, if a different one is there. Call it only while holding the flow lock."""
    with switching(project):
        champion = registry_of(project).holding(CHAMPION)
        if champion is not None and follow(project, champion):
            log_line(f"models/champion now holds {champion.name}, the champion of the registry")


def bring_pending(project: Path) -> None:
    """Complete a promotion that was made by hand during the flow which ends here; a flow that has begun since completes it."""
    if not (project / ".posttrain").is_dir():
        return
    with switching(project), ExitStack() as stack:
        try:
            stack.enter_context(only_flow(project))
        except WorkspaceBusy:
            return
        if not (project / PENDING).is_file():
            return
        try:
            champion = registry_of(project).holding(CHAMPION)
            if champion is not None and follow(project, champion):
                print_line(f"models/champion now holds {champion.name}, the champion of the registry")
        except PosttrainError as error:  # the flow's own result must not be lost; the next flow tries again
            print_line(f"models/champion does not hold the registry's champion yet: {error}")
