"""Write benchmarks/RESULTS.md from the tables that the other scripts have written.

    python benchmarks/results.py

`make bench` repeats all measurements and ends with this script.
"""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
TABLES = (
    "training",
    "limits",
    "async_grpo",
    "rollouts",
    "logprobs",
    "scaling",
    "journal",
    "orchestration",
    "lineage",
    "moe_gspo",
    "plan_memory",
    "gpu",
)
HEAD = """# Results

Every table below is one script's, with the command that makes it anew; `make bench` runs them all in turn (about an hour on two cores).
Ratios are medians of runs that alternate within one process tree on one machine. A ratio below what was wanted stands there as it is.
"""


def main() -> None:
    parts = [HEAD]
    for name in TABLES:
        table = HERE / f"{name}.md"
        if table.exists():
            parts.append(re.sub(r"^#", "##", table.read_text(encoding="utf-8").strip(), flags=re.MULTILINE) + "\n")
    (HERE / "RESULTS.md").write_text("\n".join(parts), encoding="utf-8")
    print(f"wrote {HERE.name}/RESULTS.md from {len(parts) - 1} tables")


if __name__ == "__main__":
    main()
