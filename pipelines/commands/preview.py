"""Show which tokens of a table's row are trained.

    posttrain preview TABLE ROW

TABLE: sft, preferences, preferences_heldout, problems or evaluation. ROW: its id. Trained tokens are green and underlined in a
terminal, and in [[brackets]] elsewhere; those of sft follow `sft.train_on`.
"""

from __future__ import annotations

import os
import sys
from typing import get_args

from pipelines.config.params import load_params
from pipelines.data.tables import FOLDER, Table, read_rows
from pipelines.runtime import environment
from pipelines.runtime.command_line import command_parser, reports_errors, whole
from posttrain.errors import ConfigError

_GREEN, _PLAIN = "\033[4;32m", "\033[0m"


def preview(table: Table, row_id: int, colour: bool) -> str:
    """Return the row's text with its trained tokens marked. Raises ConfigError if there is no such row."""
    from pipelines.validate import base_encoder
    from pipelines.validation.masks import trained_parts

    rows = read_rows(FOLDER / f"{table}.parquet")
    row = next((row for row in rows if row["id"] == row_id), None)
    if row is None:
        if not rows:
            raise ConfigError(f"table {table} has no rows; data.{table} in params.yaml names its source")
        ids = sorted(row["id"] for row in rows)
        raise ConfigError(f"table {table} has no row {row_id}; its ids go from {ids[0]} to {ids[-1]}")
    encoder, lines, train_on = base_encoder(), [], load_params().sft.train_on
    setting = f" (sft.train_on: {train_on})" if table == "sft" else ""
    for name, parts in trained_parts(encoder, table, row, train_on).items():
        count = sum(tokens for _, tokens, trained in parts if trained)
        lines.append(
            f"{table} {row_id}, {name}{setting}: {count} of {sum(tokens for _, tokens, _ in parts)} tokens are trained"
        )
        lines.append("".join(_marked(text, colour) if trained else text for text, _, trained in parts))
    return "\n".join(lines)


def _marked(text: str, colour: bool) -> str:
    return f"{_GREEN}{text}{_PLAIN}" if colour else f"[[{text}]]"


@reports_errors
def main(argv: list[str] | None = None) -> int:
    parser = command_parser("posttrain preview", __doc__)
    parser.add_argument("table", choices=get_args(Table))
    parser.add_argument("row", type=whole(0), help="the row's id")
    args = parser.parse_args(argv)
    environment.quiet()
    os.chdir(environment.root())
    print(preview(args.table, args.row, sys.stdout.isatty()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
