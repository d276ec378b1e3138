"""Free DVC's cache of everything that neither this folder nor the registry's aliases need.

    python -m flows.clean_cache            shows how many files would be deleted
    python -m flows.clean_cache --yes      deletes them
    python -m flows.clean_cache --projects ../second     if a project that is no git worktree of this one uses the same cache

`dvc gc --workspace` keeps the files that dvc.lock and .dvc files name, the champion included. This command also keeps the weights of
`previous`, to which a roll-back goes, and of `challenger`. The same is kept for each git worktree of this project, because worktrees may
share a cache. Remotes are left as they are. It refuses while a flow is running here, or in one of the projects that use the cache.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from flows.lock import only_flow
from flows.production import registry_of
from pipelines.promotion.registry import CHAMPION, Version
from pipelines.runtime import environment
from pipelines.runtime.command_line import command_parser, print_text, reports_errors
from posttrain.errors import OrchestrationError
from posttrain.files import write_atomic
from tasks.cache import cache_folder
from tasks.champion import KEPT, POINTER, pointer, remove_left_pointers, switching
from tasks.dag import open_workspace
from tasks.process import child_environment


def aliased(project: Path) -> list[Version]:
    """Return the versions that hold an alias.

    Raises TrackingError if the registry does not respond, and OrchestrationError if it is lost or has no champion: the weights to keep
    are unknown then.
    """
    versions = [version for version in registry_of(project).versions() if version.aliases]
    if (project / POINTER).is_file() and not any(CHAMPION in version.aliases for version in versions):
        raise OrchestrationError(
            f"{POINTER} names weights in production, and the registry of {project} names no champion, so the weights that a roll-back needs"
            " are unknown. Nothing was deleted. `make retrain` or `posttrain models` shows more."
        )
    return versions


def worktrees(project: Path) -> list[Path]:
    """Return the other git worktrees of this project that use DVC."""
    done = subprocess.run(
        ["git", "worktree", "list", "--porcelain"], cwd=project, capture_output=True, text=True, check=False
    )
    folders = [
        Path(line.removeprefix("worktree ")) for line in done.stdout.splitlines() if line.startswith("worktree ")
    ]
    return [each for each in folders if each.resolve() != project.resolve() and (each / ".dvc").is_dir()]


def require_all_users(project: Path, known: Sequence[Path]) -> None:
    """Raise OrchestrationError if the cache is outside of all known projects: a project that is not known may use it too."""
    cache = cache_folder(project)
    if cache is None or not any(cache.resolve().is_relative_to(each.resolve()) for each in (project, *known)):
        raise OrchestrationError(
            f"DVC's cache is {cache or 'unknown'}, outside of this project: other projects may use it, and their files would be deleted."
            f" Name all that use it: --projects DIR ... (`--projects {project}` if there is no other one)."
        )


@contextmanager
def named_for_dvc(project: Path, versions: Sequence[Version]) -> Iterator[None]:
    """Write a .dvc file for the weights of each version, and remove these files at the end."""
    remove_left_pointers(project)
    files = {
        project / f"{KEPT}-{each.number}.dvc": pointer(each, Path("models") / f".{KEPT}-{each.number}")
        for each in versions
    }
    try:
        for path, text in files.items():
            write_atomic(path, text.encode())
        yield
    finally:
        for path in files:
            path.unlink(missing_ok=True)


def collect(project: Path, others: Sequence[Path] = (), *, delete: bool) -> int:
    """Delete unneeded files of DVC's cache, or only count them. Returns their number. `others` use the same cache."""
    kept = list(dict.fromkeys(each for each in (*worktrees(project), *others) if each.resolve() != project.resolve()))
    if not others:
        require_all_users(project, kept)
    with open_workspace(project):  # a damaged dvc.yaml or dvc.lock is named before anything is deleted
        pass
    command = [sys.executable, "-m", "dvc", "gc", "--workspace", "--force", *(() if delete else ("--dry",))]
    command += ["--projects", *map(str, kept)] if kept else []
    with only_flow(project), switching(project), ExitStack() as stack:
        for each in kept:  # a stage there may have stored results that its dvc.lock does not name yet
            stack.enter_context(only_flow(each))
        for each in (project, *(folder for folder in kept if (folder / "mlflow.db").is_file())):
            stack.enter_context(named_for_dvc(each, aliased(each)))
        done = subprocess.run(
            command, cwd=project, env=child_environment(), capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise OrchestrationError(f"`dvc gc` failed: {(done.stderr or done.stdout).strip()[-1000:]}")
    return sum(int(count) for count in re.findall(r"^Removed (\d+) objects", done.stdout + done.stderr, re.MULTILINE))


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = command_parser("python -m flows.clean_cache", __doc__)
    parser.add_argument("--yes", action="store_true", help="delete; without it the files are only counted")
    parser.add_argument(
        "--projects", type=Path, nargs="+", default=[], metavar="DIR", help="other projects that use the same cache"
    )
    args = parser.parse_args(argv)
    environment.quiet()
    project = environment.root()
    environment.require_writable(project)
    count = collect(project, [each.absolute() for each in args.projects], delete=args.yes)
    print_text(f"{count} files of DVC's cache {'are deleted' if args.yes else 'would be deleted; --yes deletes them'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
