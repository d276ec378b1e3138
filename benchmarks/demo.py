"""Show where the time of the last flow over all stages went, and the least time that its chain and its work allow.

    python benchmarks/demo.py [PROJECT]    # after `make demo` in this folder

A stage's work is the time inside its step; the rest is its process, DVC and imports.
"""

from __future__ import annotations

import argparse
import contextlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.config.params import load_params
from pipelines.report.makespan import critical_path, expected_work
from pipelines.report.measured import FlowTime, all_runs, flow_time
from pipelines.runtime.machine import available_cores
from pipelines.tracking.lockfile import read_lock

GROUPS = {"ppo": "PPO", "grpo": "GRPO", "gspo": "GSPO", "dapo": "DAPO", "chord": "CHORD"}


def group(stage: str) -> str:
    """Return the row of a stage: evaluations together, pairs together, each on-policy algorithm by itself.

    Example:
        >>> group("align@grpo-0"), group("align@dpo_soft-0"), group("evaluate@base"), group("sft")
        ('align: GRPO', 'align: logged pairs', 'evaluations', 'sft')
    """
    kind, _, item = stage.partition("@")
    if kind.startswith("evaluate"):
        return "evaluations"
    return f"align: {GROUPS.get(item.rpartition('-')[0], 'logged pairs')}" if kind == "align" else kind


def by_themselves(above: Mapping[str, Sequence[str]]) -> set[str]:
    """Return the stages next to which no other one can run: each other one is needed by it, or needs it.

    Example:
        >>> sorted(by_themselves({"sft": [], "dpo": ["sft"], "grpo": ["sft"], "compare": ["dpo", "grpo"]}))
        ['compare', 'sft']
    """
    needs: dict[str, set[str]] = {}

    def reach(name: str) -> set[str]:
        if name not in needs:
            needs[name] = set(above[name]).union(*map(reach, above[name]))
        return needs[name]

    every = {name: reach(name) for name in above}
    return {a for a in every if all(a == b or a in every[b] or b in every[a] for b in every)}


def table(flow: FlowTime, project: Path) -> str:
    """Return the rows by kind of stage, the longest chain and the bounds, as Markdown."""
    rows: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for stage in flow.ran:
        row = rows[group(stage.name)]
        rows[group(stage.name)] = [row[0] + 1, row[1] + stage.wall, row[2] + stage.work]
    lines = ["| stages | number | seconds | of it work |", "|---|---|---|---|"]
    lines += [f"| {name} | {count:.0f} | {wall:.1f} | {work:.1f} |" for name, (count, wall, work) in rows.items()]
    wall, work = (sum(row[i] for row in rows.values()) for i in (1, 2))
    lines.append(f"| all | {len(flow.ran)} | {wall:.1f} | {work:.1f} |")
    with contextlib.chdir(project):
        expected = expected_work(Path(), read_lock(Path()), load_params(Path("params.yaml")))
    chain, cores = critical_path(expected), available_cores()
    seconds = sum(expected[name].seconds for name in chain)
    worked = {stage.name: stage.work for stage in flow.ran if stage.name in expected}
    single = sum(
        worked[name] for name in by_themselves({name: each.after for name, each in expected.items()}) & worked.keys()
    )
    lines += [
        "",
        f"Flow: {flow.wall:.1f} s on {cores} cores. Longest chain: {', '.join(chain)}: {seconds:.1f} s.",
        f"Work of stages that run by themselves: {single:.1f} s; the others, evenly on {cores} cores: {(work - single) / cores:.1f} s;"
        f" together {single + (work - single) / cores:.1f} s without any process, import or DVC.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", nargs="?", type=Path, default=Path("."))
    project = parser.parse_args().project.resolve()
    flow = flow_time(project, all_runs(project))
    if flow is None:
        raise SystemExit(f"{project}: no flow has run here; type `make demo` first")
    print(table(flow, project))


if __name__ == "__main__":
    main()
