"""Measure `posttrain lineage` and `posttrain forget` on a project whose DVC cache remembers 100 trained models.

    python benchmarks/lineage.py [--nights 13] [--calls 3] [--write]

Each night has eight align stages and the stages around them, with the inputs that dvc.yaml declares, and preference tables that grow by one
file. Each night has a different seed, so that dvc.lock names all models, as it does after a comparison over seeds. The
commands are those of a user: a new process each. Reported is the call with the shortest wall time: processor seconds, which hardly
depend on other load, and wall seconds. The first call parses the run cache, and later calls use its result. --write puts the table
into benchmarks/lineage.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

ROOT = Path(__file__).resolve().parents[1]
ALGORITHMS = ("dpo", "dpo_soft", "grpo_pairs", "ppo", "grpo", "gspo", "dapo", "chord")
ROWS = 2000
PARSED = ".posttrain/lineage.json"


class Project:
    """A project with finished nights, as DVC records them; no model is trained."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.objects = folder, folder / ".dvc/cache/files/md5"
        self.locked: dict[str, Any] = {}
        self.stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
        self.params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        for name in ("params.yaml", "dvc.yaml"):
            shutil.copy(ROOT / name, folder / name)

    def store(self, data: bytes, suffix: str = "") -> str:
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest() + suffix
        path = self.objects / md5[:2] / md5[2:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return md5

    def store_folder(self, files: dict[str, bytes]) -> tuple[str, dict[str, str]]:
        md5s = {name: self.store(data) for name, data in sorted(files.items())}
        return self.store(
            json.dumps([{"md5": md5, "relpath": name} for name, md5 in md5s.items()]).encode(), ".dir"
        ), md5s

    def record(self, stage: str, command: str, inputs: dict[str, str], outputs: dict[str, str]) -> None:
        code = [path for path in self.stages[stage]["deps"] if path.startswith(("pipelines", "posttrain"))]
        deps = {path: hashlib.md5(path.encode(), usedforsecurity=False).hexdigest() for path in code} | inputs
        entry = {
            "cmd": f"python -m pipelines.{command}",
            "deps": [{"path": path, "hash": "md5", "md5": md5, "size": 1} for path, md5 in deps.items()],
            "params": {"params.yaml": self.params},
            "outs": [{"path": path, "hash": "md5", "md5": md5, "size": 1} for path, md5 in outputs.items()],
        }
        text = yaml.safe_dump(entry)
        key = hashlib.sha256(text.encode()).hexdigest()
        path = self.folder / ".dvc/cache/runs" / key[:2] / key / key[::-1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        self.locked[command] = entry

    def night(self, number: int) -> None:
        """Record one night: its file joins the preferences."""
        sources = {f"data/raw/accepted/preferences/{i:04d}-night.jsonl": sha256(accepted(i)) for i in range(number + 1)}
        rows = [row for i in range(number + 1) for row in accepted(i)] + [pair(f"base {i}") for i in range(ROWS)]
        tables, _ = self.store_folder({"preferences.parquet": parquet(rows), "sft.parquet": parquet([pair("sft")])})
        journal = self.store((json.dumps({"kind": "start", "inputs": sources}) + "\n").encode())
        self.record("ingest", "ingest", {}, {"data/tables": tables, "runs/ingest/journal.jsonl": journal})
        valid, files = self.store_folder({"preferences.parquet": parquet(rows), "sft.parquet": parquet([pair("sft")])})
        aside, _ = self.store_folder({"preferences.parquet": parquet(rows[:1])})
        self.record("validate", "validate", {"data/tables": tables}, {"data/valid": valid, "data/quarantine": aside})
        held = {f"data/valid/{name}": md5 for name, md5 in files.items()}
        sft, _ = self.store_folder({"model.safetensors": b"sft"})
        self.record("sft", "sft", {"data/valid/sft.parquet": held["data/valid/sft.parquet"]}, {"models/sft": sft})
        for name in ALGORITHMS:
            weights, _ = self.store_folder({"model.safetensors": f"{name} {number}".encode()})
            results = self.store(json.dumps({"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6}).encode())
            journal = self.store(lines([{"kind": "sample", "run": f"{name}-{number}", **row} for row in rows[:20]]))
            self.record(
                "align",
                f"align --algorithm {name} --seed {number}",
                held | {"models/sft": sft},
                {f"models/align/{name}-{number}": weights, f"runs/align/{name}-{number}/journal.jsonl": journal},
            )
            self.record(
                "evaluate_aligned",
                f"evaluate --algorithm {name} --seed {number}",
                {f"models/align/{name}-{number}": weights},
                {f"runs/evaluate/{name}-{number}/metrics.json": results},
            )
        for name, data in (("preferences.parquet", parquet(rows)), ("sft.parquet", parquet([pair("sft")]))):
            path = self.folder / "data/valid" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        path = self.folder / f"data/raw/accepted/preferences/{number:04d}-night.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lines(accepted(number)))
        lock = yaml.safe_dump(
            {"schema": "2.0", "stages": {name.replace(" ", "_"): e for name, e in self.locked.items()}}
        )
        (self.folder / "dvc.lock").write_text(lock, encoding="utf-8")


def pair(text: str) -> dict[str, Any]:
    return {"prompt": f"what is {text}?", "chosen": f"the {text}", "rejected": "nothing"}


def accepted(night: int) -> list[dict[str, Any]]:
    return [pair(f"row {night}-{i}") for i in range(20)]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def sha256(rows: list[dict[str, Any]]) -> str:
    return hashlib.sha256(lines(rows)).hexdigest()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([{"id": i, **row} for i, row in enumerate(rows)]), sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def measured(folder: Path, *arguments: str) -> tuple[float, float, str]:
    """Run a command; return processor seconds, wall seconds and its output."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.commands", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{arguments}: {done.stderr}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, wall, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nights", type=int, default=13)
    parser.add_argument("--calls", type=int, default=3, help="how often each command is called")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/lineage.md")
    args = parser.parse_args()
    file = "data/raw/accepted/preferences/0000-night.jsonl"
    cases = (
        ("first call: `posttrain lineage dpo-0`", ("lineage", "dpo-0")),
        ("`posttrain lineage dpo-0`", ("lineage", "dpo-0")),
        (f"`posttrain lineage --file {Path(file).name}`", ("lineage", "--file", file)),
        ("`posttrain lineage --row preferences:17`", ("lineage", "--row", "preferences:17")),
        (f"`posttrain forget {Path(file).name}`, which only shows", ("forget", file)),
    )
    table = ["| command | processor, s | wall, s |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        project = Project(Path(folder))
        for night in range(args.nights):
            project.night(night)
        models = args.nights * len(ALGORITHMS)
        for title, arguments in cases:
            calls = []
            for _ in range(args.calls):
                if title.startswith("first"):
                    (Path(folder) / PARSED).unlink(missing_ok=True)
                calls.append(measured(Path(folder), *arguments))
            print(calls[0][2][-300:], [round(wall, 2) for _, wall, _ in calls])
            processor, wall, _ = min(calls, key=lambda call: call[1])
            table.append(f"| {title} | {processor:.2f} | {wall:.2f} |")
    report = (
        f"# What lineage costs\n\n`python benchmarks/lineage.py --nights {args.nights}`: {models} trained models of"
        f" {args.nights} nights in the run cache. A new process each; the fastest of {args.calls} calls. The machine of two cores had"
        f" other work (load {os.getloadavg()[0]:.1f}).\n\n" + "\n".join(table) + "\n"
    )
    print(report)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
