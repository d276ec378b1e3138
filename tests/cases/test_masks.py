"""Which tokens of every file of cases/data train: a golden file per case, with the trained text in double brackets."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.data_schema import DataParams, TableSource
from pipelines.config.params import load_params
from pipelines.data.sources import table_rows
from posttrain.data.tokens import TextEncoder, Tokens, row_tools
from posttrain.models.tiny import byte_tokenizer
from tests.cases.test_data import GIVEN

GOLDEN = Path(__file__).parent / "masks"
CASES = [(file, kind) for file, kind in sorted(GIVEN) if kind in ("sft", "preferences") and file != "big.csv"]
TRAINED = {"sft": ("completion",), "preferences": ("chosen", "rejected")}
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    tokenizer = byte_tokenizer(4096)
    tokenizer.chat_template = TEMPLATE
    return TextEncoder(tokenizer, 4096)


@pytest.fixture(scope="module")
def shipped(root: Path) -> DataParams:
    return load_params(root / "params.yaml").data


def shown(encoder: TextEncoder, tokens: Tokens) -> str:
    """Return the text of a row with its trained parts in double brackets."""
    weights = [0.0] * len(tokens.prompt) + list(tokens.weights or [1.0] * len(tokens.response))
    parts = groupby(zip((*tokens.prompt, *tokens.response), weights, strict=True), key=lambda pair: pair[1])
    texts = [(weight, encoder.tokenizer.decode([token for token, _ in part])) for weight, part in parts]
    return "".join(
        f"[[{text}]]" if weight == 1 else f"[[{weight:g}: {text}]]" if weight else text for weight, text in texts
    )


def page(encoder: TextEncoder, rows: list[dict[str, Any]], kind: str) -> str:
    """Return all rows of a table, one after the other."""
    lines = []
    for row in rows:
        for name in TRAINED[kind]:
            tokens = encoder.pair(row["prompt"], row[name], str(row["id"]), row_tools(row))
            lines.append(f"== row {row['id']}, {name}\n{shown(encoder, tokens)}\n")
    return "".join(lines)


def made(encoder: TextEncoder, cases: Path, shipped: DataParams, file: str, kind: Any) -> str:
    source = TableSource.model_validate({"source": str(cases / "data" / file)} | GIVEN[file, kind][0])
    return page(encoder, table_rows(kind, shipped.model_copy(update={kind: source}), Counter()), kind)


@pytest.mark.parametrize(("file", "kind"), CASES)
def test_the_trained_text_is_that_of_the_golden_file(
    encoder: TextEncoder, cases: Path, shipped: DataParams, file: str, kind: str
) -> None:
    golden = (GOLDEN / f"{file}.{kind}.txt").read_text(encoding="utf-8")
    assert made(encoder, cases, shipped, file, kind) == golden


def test_every_golden_file_is_of_a_case() -> None:
    assert sorted(path.name for path in GOLDEN.iterdir()) == sorted(f"{file}.{kind}.txt" for file, kind in CASES)
