"""A copy is recognised in every form in which a program writes texts, and a different text is not."""

from __future__ import annotations

import bz2
import gzip
import html
import io
import json
import lzma
import zipfile
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.lineage import quotes
from pipelines.lineage.quotes import Texts, unescaped

TEXT = 'Ann\'s "own" <café> \\ note \n\u4f60\u597d \U0001f600 & more'


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    found: bytes = sink.getvalue().to_pybytes()
    return found


def zipped(data: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner.json", data)
    return sink.getvalue()


def parquet(rows: list[dict[str, object]], compression: str = "zstd") -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, compression=compression)
    found: bytes = sink.getvalue().to_pybytes()
    return found


def nested(text: str, times: int, *, ascii_only: bool = True) -> str:
    for _ in range(times):
        text = json.dumps({"text": text}, ensure_ascii=ascii_only)
    return text


FORMS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "JSON": lambda text: nested(text, 1),
    "JSON in JSON": lambda text: nested(text, 2),
    "JSON in JSON in JSON, in UTF-8": lambda text: nested(text, 3, ascii_only=False),
    "repr": lambda text: repr([text]),
    "repr of ASCII in JSON": lambda text: json.dumps(ascii({"text": text})),
    "repr of JSON": lambda text: repr(nested(text, 2)),
    "repr of bytes": lambda text: repr(text.encode()),
    "HTML": lambda text: f"<p>{html.escape(text)}</p>",
    "JSON in HTML": lambda text: html.escape(nested(text, 1)),
    "HTML in JSON": lambda text: json.dumps(html.escape(text)).replace("&", "\\u0026"),
}
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstd,
    "zip": zipped,
    "gzip in zip": lambda data: zipped(gzip.compress(data)),
    "cells": lambda data: parquet([{"log": "before " + data.decode() + " after"}]),
    "binary cells": lambda data: parquet([{"log": data}], "snappy"),
    "Parquet in zstd": lambda data: zstd(parquet([{"log": data.decode()}], "gzip")),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_text_is_found_in_every_form(form: str) -> None:
    texts = Texts([{"prompt": TEXT}])
    assert texts.in_text(f"x {FORMS[form](TEXT)} y")
    assert not texts.in_text(f"x {FORMS[form](TEXT.replace('own', 'other'))} y")


@pytest.mark.parametrize("packed", PACKED)
def test_a_text_is_found_in_every_packed_file(packed: str) -> None:
    texts = Texts([{"prompt": TEXT}])
    for form in ("plain", "JSON in JSON"):
        assert texts.in_bytes(PACKED[packed](FORMS[form](TEXT).encode()))
        assert not texts.in_bytes(PACKED[packed](FORMS[form]("something else").encode()))


@given(st.text(min_size=4, max_size=12), st.sampled_from(sorted(FORMS)), st.sampled_from(sorted(FORMS)))
@settings(max_examples=200, deadline=None)
def test_no_text_hides_behind_two_escapes(text: str, first: str, second: str) -> None:
    shown = FORMS[second](FORMS[first](text))
    assert Texts([text]).in_text(shown) or len(unescaped(text)) < quotes.SHORTEST


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz", "zstd", "zip", "cells"])
def test_a_packed_file_that_cannot_be_read_counts_as_a_copy(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = PACKED[kind](b"something else " * 100)
    texts = Texts([{"prompt": TEXT}])
    assert not texts.in_bytes(packed)
    assert texts.in_bytes(packed[: len(packed) // 2])
    if kind != "cells":
        monkeypatch.setattr(quotes, "MOST_BYTES", 100)
        assert texts.in_bytes(packed)


def test_a_row_of_a_table_is_compared_by_its_cells() -> None:
    short, long = Texts([{"prompt": "12+155="}]), Texts([{"prompt": "Which river is the longest?"}])
    other = parquet([{"id": 0, "prompt": "412+155=", "answer": "567"}])
    assert not short.in_bytes(other), "a different sum that ends alike"
    assert short.in_bytes(parquet([{"id": 0, "prompt": "12+155=", "answer": "167"}]))
    assert short.in_bytes(parquet([{"id": 0, "prompt": "x", "tools": json.dumps([{"name": "12+155="}])}]))
    assert long.in_bytes(parquet([{"id": 0, "prompt": "Question: Which river is the longest?\nAnswer:"}])), "a template"
    assert not long.in_bytes(parquet([{"id": 0, "prompt": "Which river is the longest?x"}]))
