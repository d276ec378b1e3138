"""Measure the memory that `posttrain intake` needs for one large file, as a multiple of the file's size.

    python benchmarks/intake.py [--megabytes 20] [--write]

Each measurement is the peak resident memory of a separate process over a new project, minus that of the same command with a file of
50 rows, which is mostly libraries. --write puts the table into benchmarks/intake.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pipelines.commands.configure import configure

ROOT = Path(__file__).parents[1]
TEXTS = {"sft": ("prompt", "completion"), "preferences": ("prompt", "chosen", "rejected")}
SCORES = {"chosen_score": 1.0, "rejected_score": 0.0}
ROW_BYTES = (160, 1100)
INTAKE = (
    "import sys; from pipelines.commands.intake import main; from pipelines.runtime.machine import peak_resident_mib;"
    "status = main([]); print(peak_resident_mib()); sys.exit(status)"
)
"""The command reports its own peak: `wait4` may report that of the program that started it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/intake.md")
    args = parser.parse_args()
    lines = [
        "# Memory of the intake",
        "",
        f"`python benchmarks/intake.py --megabytes {args.megabytes}`: peak memory besides that of the same command with 50 rows.",
        "",
        "| table | bytes a row | rows | file, MB | libraries, GB | besides, MB | times the file |",
        "|---|---|---|---|---|---|---|",
    ]
    for table in TEXTS:
        for width in ROW_BYTES:
            small, _, _ = measured(table, width, 50)
            peak, size, rows = measured(table, width, args.megabytes * 1_000_000 // width)
            more = peak - small
            lines.append(
                f"| {table} | {size / rows:.0f} | {rows:,} | {size / 1e6:.1f} | {small / 1e9:.2f} | {more / 1e6:.0f}"
                f" | {more / size:.1f} |"
            )
            print(lines[-1], flush=True)
    report = "\n".join(lines) + "\n"
    if args.write:
        Path(__file__).with_suffix(".md").write_text(report, encoding="utf-8")


def measured(table: str, width: int, rows: int) -> tuple[int, int, int]:
    """Return peak memory in bytes, the file's size in bytes, and its rows."""
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        (project / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
        configure(project / "params.yaml", [str(ROOT / "tests/end_to_end/tiny.yaml")])
        path = project / "inbox" / table / "rows.jsonl"
        path.parent.mkdir(parents=True)
        with path.open("w", encoding="utf-8") as file:
            file.writelines(line(table, width, number) for number in range(rows))
        size = path.stat().st_size
        environment = os.environ | {"PYTHONPATH": str(ROOT), "POSTTRAIN_SETTLE_SECONDS": "0"}
        done = subprocess.run(
            [sys.executable, "-c", INTAKE], cwd=project, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"accepted {table}/rows.jsonl: {rows} rows" in done.stdout, done.stdout
        return round(float(done.stdout.split()[-1]) * 2**20), size, rows


def line(table: str, width: int, number: int) -> str:
    """Return one record of about `width` bytes; all texts differ."""
    names = TEXTS[table]
    record = {**dict.fromkeys(names, ""), **(SCORES if table == "preferences" else {})}
    room = (width - len(json.dumps(record)) - 1) // len(names)
    return json.dumps(record | {name: f"{name[0]} {number} ".ljust(room, "w") for name in names}) + "\n"


if __name__ == "__main__":
    main()
