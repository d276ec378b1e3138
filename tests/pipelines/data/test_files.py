"""Files as people have them: compressed, in shards, of several formats, with columns of any type."""

from __future__ import annotations

import bz2
import datetime
import gzip
import json
import lzma
import tracemalloc
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config.data_schema import DataParams, TableSource
from pipelines.config.params import load_params
from pipelines.data.column_mapping import canonical_rows
from pipelines.data.files import read_file
from pipelines.data.parquet import table_records
from pipelines.data.sources import is_generator, local_files, table_rows
from pipelines.data.splits import folder_files
from posttrain.errors import DataError
from posttrain.text import normalised

LINE = b'{"prompt": "a", "completion": "b"}\n'
ROWS = [{"prompt": "a", "completion": "b"}]


@pytest.fixture(scope="module")
def shipped(root: Path) -> DataParams:
    return load_params(root / "params.yaml").data


def zstandard(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.ndjson", LINE),
        ("rows.jsonl.gz", gzip.compress(LINE, mtime=0)),
        ("rows.ndjson.bz2", bz2.compress(LINE)),
        ("rows.JSONL.xz", lzma.compress(LINE)),
        ("v1.2.jsonl.zst", zstandard(LINE)),
        ("rows.tsv", b"prompt\tcompletion\na\tb\n"),
        ("rows.csv.gz", gzip.compress(b"prompt,completion\r\na,b\r\n", mtime=0)),
    ],
)
def test_compressed_files_and_other_endings_are_read(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_file(tmp_path / name) == ROWS


@pytest.mark.parametrize(
    ("name", "content"), [("x.jsonl.gz", gzip.compress(LINE, mtime=0)[:-9]), ("x.jsonl.zst", LINE)]
)
def test_a_file_that_is_cut_short_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: cannot be decompressed"):
        read_file(tmp_path / name)


def test_a_csv_field_may_be_long_and_hold_any_line_separator_of_unicode(tmp_path: Path) -> None:
    value = "x" * 140_000 + "\x85\u2028\x0b end"
    (tmp_path / "x.csv").write_text(f"prompt,completion\nq,{value}\n", encoding="utf-8", newline="")
    assert read_file(tmp_path / "x.csv") == [{"prompt": "q", "completion": value}]


def test_a_csv_header_that_repeats_a_column_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("prompt,prompt\na,b\n")
    with pytest.raises(DataError, match="names column 'prompt' twice"):
        read_file(tmp_path / "x.csv")


def test_parquet_numbers_and_texts_are_as_written(tmp_path: Path) -> None:
    columns = {
        "single": pa.array([0.1, None], pa.float32()),
        "money": pa.array([Decimal("7.50"), None], pa.decimal128(10, 2)),
        "bytes": pa.array(["é".encode(), None], pa.binary()),
        "word": pa.array(["a", None]).dictionary_encode(),
        "day": pa.array([datetime.date(2026, 1, 2), None]),
        "nested": pa.array([{"scores": [0.1, 0.7]}, None], pa.struct([("scores", pa.list_(pa.float32()))])),
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    assert read_file(tmp_path / "x.parquet") == [
        {
            "single": 0.1,
            "money": "7.50",
            "bytes": "é",
            "word": "a",
            "day": "2026-01-02",
            "nested": {"scores": [0.1, 0.7]},
        },
        dict.fromkeys(columns),
    ]


def test_values_inside_maps_views_and_extensions_are_as_written(tmp_path: Path) -> None:
    nanoseconds, key = pa.time64("ns"), uuid.UUID(int=7)
    times = pa.array([5, 1_500_000_000], pa.int64()).cast(nanoseconds)
    single = pa.float32()
    columns = {
        "money": pa.array([[("k", Decimal("7.50"))]] * 2, pa.map_(pa.string(), pa.decimal128(10, 2))),
        "bytes": pa.array([[("k", b"7")]] * 2, pa.map_(pa.string(), pa.binary())),
        "floats": pa.array([[("k", 0.1)]] * 2, pa.map_(pa.string(), single)),
        "numbered": pa.array([[(3, "x")]] * 2, pa.map_(pa.int32(), pa.string())),
        "view": pa.array([b"7", None], pa.binary_view()),
        "views": pa.array([[0.1], None], pa.list_view(single)),
        "time": times,
        "nested": pa.StructArray.from_arrays(
            [pa.array([[5], []], pa.list_(pa.int64())).cast(pa.list_(nanoseconds))], ["at"]
        ),
        "key": pa.array([key.bytes, None], pa.uuid()),
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    first, second = read_file(tmp_path / "x.parquet")
    maps = {"money": {"k": "7.50"}, "bytes": {"k": "7"}, "floats": {"k": 0.1}, "numbered": {"3": "x"}}
    assert first == maps | {
        "view": "7", "views": [0.1], "time": "00:00:00.000000005", "nested": {"at": ["00:00:00.000000005"]}, "key": str(key),
    }  # fmt: skip
    assert second == maps | {"view": None, "views": None, "time": "00:00:01.500000", "nested": {"at": []}, "key": None}


NANOSECONDS = pa.array([5, None], pa.time64("ns"))
TIMES = pa.array([5], pa.time64("ns"))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        (NANOSECONDS.dictionary_encode(), "T"),
        (pa.RunEndEncodedArray.from_arrays(pa.array([1, 2], pa.int32()), NANOSECONDS), "T"),
        (pa.ListViewArray.from_arrays([0, 0], [1, 0], TIMES), ["T"]),
        (pa.LargeListViewArray.from_arrays([0, 0], [1, 0], TIMES), ["T"]),
        (pa.ListArray.from_arrays([0, 1, 1], TIMES.dictionary_encode()), ["T"]),
        (pa.FixedSizeListArray.from_arrays(NANOSECONDS, 1), ["T"]),
        (pa.StructArray.from_arrays([NANOSECONDS.dictionary_encode()], ["x"]), {"x": "T"}),
        (pa.MapArray.from_arrays([0, 1, 1], TIMES, pa.array(["k"])), {"T": "k"}),
        (pa.MapArray.from_arrays([0, 1, 1], pa.array(["k"]), TIMES.dictionary_encode()), {"k": "T"}),
    ],
)
def test_times_of_nanoseconds_keep_their_digits_wherever_they_are(column: pa.Array, value: Any) -> None:
    first, second = table_records(pa.table({"t": column, "f": pa.array([0.1, 2], pa.float32())}), "x.parquet")
    assert first == {"t": json.loads(json.dumps(value).replace("T", "00:00:00.000000005")), "f": 0.1}
    assert second["t"] in (None, [], {}, [None], {"x": None})


def test_a_key_that_a_map_has_twice_is_refused(tmp_path: Path) -> None:
    twice = pa.array([[("a", 1)], [("k", 1), ("k", 2)]], pa.map_(pa.string(), pa.int64()))
    pq.write_table(pa.table({"m": twice}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="row 1: column 'm' holds the key 'k' twice in one map"):
        read_file(tmp_path / "x.parquet")


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"ok", b"\xff\xfe"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="row 1: column 'image' holds bytes that are not UTF-8"):
        read_file(tmp_path / "x.parquet")


def shards(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(LINE)


def test_a_folder_is_its_shards_of_one_split_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    shards(folder, "train-00001-of-00002.jsonl", "train-00000-of-00002.jsonl", "test-00000-of-00001.jsonl", "README.md")
    assert [p.name for p in folder_files(folder, "train")] == [
        "train-00000-of-00002.jsonl",
        "train-00001-of-00002.jsonl",
    ]
    assert [p.name for p in local_files(TableSource(source=str(folder), split="test"))] == ["test-00000-of-00001.jsonl"]
    with pytest.raises(DataError, match=r"no file of the split 'dev'; set data\.\*\.split to one of: test, train"):
        folder_files(folder, "dev")


def test_a_folder_with_a_missing_shard_mixed_formats_or_nothing_is_refused(tmp_path: Path) -> None:
    shards(tmp_path / "a", "train-00000-of-00002.jsonl")
    with pytest.raises(DataError, match="has 1 of 2 shards, without number 1"):
        folder_files(tmp_path / "a", "train")
    shards(tmp_path / "b", "x.jsonl", "y.csv")
    with pytest.raises(DataError, match=r"several formats \(1 \.csv, 1 \.jsonl\)"):
        folder_files(tmp_path / "b", "train")
    shards(tmp_path / "c")
    with pytest.raises(DataError, match="no file that can be read"):
        folder_files(tmp_path / "c", "train")


def test_a_source_may_be_a_pattern_or_a_list(tmp_path: Path) -> None:
    shards(tmp_path, "b.jsonl", "a.jsonl", "c.json")
    pattern = f"{tmp_path}/*.jsonl"
    assert [p.name for p in local_files(TableSource(source=pattern))] == ["a.jsonl", "b.jsonl"]
    listed = TableSource(source=[f"{tmp_path}/b.jsonl", f"{tmp_path}/a.jsonl"])
    assert [p.name for p in local_files(listed)] == ["b.jsonl", "a.jsonl"]
    with pytest.raises(DataError, match="no file matches"):
        local_files(TableSource(source=f"{tmp_path}/*.csv"))


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("What is 8-3?", "What is 8+3?", False),
        ("Is x<y?", "Is x>y?", False),
        ("Compute 2.5", "Compute 2/5", False),
        ("दिन", "दान", False),
        ("x²", "x2", False),
        ("Compute 5!", "Compute 5", False),
        ("What is 5?", "what is 5", True),
        ("What  is\n8-3? ", "what is 8-3?", True),
        ("caf\u00e9", "CAFE\u0301", True),
    ],
)
def test_prompts_are_compared_without_case_spacing_and_unicode_form(a: str, b: str, same: bool) -> None:
    assert (normalised(a) == normalised(b)) is same


def test_a_jsonl_file_is_not_held_next_to_its_records(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{i} " + "x" * 300, "completion": "y" * 100}) + "\n" for i in range(2000))
    )
    read_file(path)
    tracemalloc.start()
    records = read_file(path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(records) == 2000
    assert peak - held < path.stat().st_size / 4


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 3\n"


def test_lines_keep_their_numbers_with_a_mark_and_with_windows_ends(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + LINE.replace(b"\n", b"\r\n") + b"\r\n" + LINE)
    assert read_file(tmp_path / "x.jsonl") == ROWS + ROWS
    (tmp_path / "y.jsonl").write_bytes(b"\xef\xbb\xbf" + LINE + b'{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=f"y.jsonl: not UTF-8 text at byte {3 + len(LINE) + 12}; save it as UTF-8"):
        read_file(tmp_path / "y.jsonl")
    (tmp_path / "z.jsonl").write_bytes(LINE + b"\n{]\n")
    with pytest.raises(DataError, match=r"z\.jsonl, line 3, column 2: not JSON"):
        read_file(tmp_path / "z.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"prompt;completion\na;b\n", r"seems to be separated by ';' instead of ','"),
        ("a.csv", b"prompt\tcompletion\na\tb\n", r"or name it \.tsv"),
        ("a.tsv", b'prompt\tcompletion\na\t"b\n', r"record 1 .*a field begins with a quote that nothing closes"),
        ("a.csv", b'prompt\n"a\nb"\n"a "b" c"\n', r"record 2 \(line 4\): not CSV"),
        (
            "a.csv",
            b"sep=,\nprompt,completion\na,b\n",
            "line 1: 'sep=,' is a note to Excel, and no header; remove line 1",
        ),
        ("a.jsonl", b'{"prompt": "a"}\n\xef\xbb\xbf{"prompt": "b"}', r"line 2: holds a byte order mark .*; remove it"),
        ("a.jsonl", b'[{"prompt": "a"}]', r"an array of objects, which is \.json; rename"),
        ("a.jsonl", b'{\n "prompt": "a"\n}', r"one JSON document over several lines, name it \.json"),
        ("a.jsonl", gzip.compress(b'{"prompt": "a"}', mtime=0), r"seems to be compressed \(name it \.gz\)"),
        ("a.csv", "prompt\na\n".encode("utf-16"), r"seems to be UTF-16 \(save it as UTF-8\)"),
        ("a.csv", "prompt\na\n".encode("utf-32"), r"seems to be UTF-32 \(save it as UTF-8\)"),
        ("a.jsonl", b"\xe9", "not UTF-8 text at byte 0; save it as UTF-8"),
        *(
            (f"a.{kind}", LFS, r"a git-lfs pointer instead of the data; type: git lfs pull")
            for kind in ("jsonl", "csv", "json.gz", "parquet")
        ),
    ],
)
def test_a_file_of_another_kind_than_its_name_says_so(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_file(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl", '{"p": 1}\n{"p": 1, "p": 2}\n'), ("a.json", '[{"x": [{"p": 1, "p": 2}]}]')]
)
def test_a_key_that_occurs_twice_is_refused_because_one_value_would_be_lost(
    tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    where = ", line 2" if name.endswith("l") else ""
    with pytest.raises(DataError, match=f"{name}{where}: cannot be held: the key 'p' occurs twice in one object"):
        read_file(tmp_path / name)


def mixed(folder: Path, *files: list[dict[str, Any]]) -> Path:
    for number, records in enumerate(files):
        (folder / f"{number}.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8"
        )
    return folder


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            {"question": "c", "response": "d"},
            r"0\.jsonl: prompt and completion \(completion, prompt\); .*1\.jsonl: no known format \(question, r",
        ),
        ({"instruction": "c", "output": "d"}, r"1\.jsonl: Alpaca \(instruction, output\)"),
        ({"prompt": "c", "response": "d"}, r"1\.jsonl: no known format \(prompt, response\)"),
        # together, the columns would be those of KTO, which leaves out rows whose label is not true
        ({"prompt": "c", "completion": "d", "label": True}, r"1\.jsonl: KTO \(completion, label, prompt\)"),
    ],
)
def test_files_of_a_folder_with_different_columns_are_named(
    shipped: DataParams, tmp_path: Path, other: dict[str, Any], words: str
) -> None:
    folder = mixed(tmp_path, [{"prompt": "a", "completion": "b"}], [other])
    with pytest.raises(DataError, match=words):
        table_rows("sft", shipped.model_copy(update={"sft": TableSource(source=str(folder))}))


def test_a_file_without_a_mapped_column_is_named_and_an_optional_one_may_be_absent(
    shipped: DataParams, tmp_path: Path
) -> None:
    folder = mixed(tmp_path, [{"q": "a", "r": "b", "topic": "x"}], [{"q": "c", "r": "d"}, {"q": "e", "r": "f"}])
    columns = {"prompt": "q", "completion": "{r}", "topic": "topic"}
    table = shipped.model_copy(update={"sft": TableSource(source=str(folder), columns=columns)})
    assert [row["completion"] for row in table_rows("sft", table)] == ["b", "d", "f"]
    mixed(tmp_path, [{"q": "a", "r": "b", "topic": "x"}], [{"q": "c", "answer": "d"}])
    with pytest.raises(
        DataError, match=r"1\.jsonl has no 'r', from which .* reads completion; its columns are answer, q\."
    ):
        table_rows("sft", table)


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ('{"prompt": "x", "completion": "\\ud800"}', "line 1, column 'completion'"),
        ('{"messages": [{"role": "user", "content": "a\\udfff"}]}', "line 1, column 'messages'"),
        ('{"\\ud83d": 1}', "line 1, the name of a column"),
    ],
)
def test_half_a_character_names_its_column(tmp_path: Path, line: str, place: str) -> None:
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(DataError, match=rf"a.jsonl, {place}: holds half of a character \(a?\\ud"):
        read_file(tmp_path / "a.jsonl")


def test_numbers_beyond_a_float_are_as_written_and_nan_is_missing(tmp_path: Path) -> None:
    texts = ["0.1234567890123456789", "12345678901234567890.5", "0.30000000000000004", "51.0", "1.50", "NaN"]
    (tmp_path / "a.jsonl").write_text("".join(f'{{"prompt": "p", "answer": {text}}}\n' for text in texts))
    rows = canonical_rows("problems", TableSource(source="x", rows=None), read_file(tmp_path / "a.jsonl"))
    assert [row["answer"] for row in rows] == [*texts[:3], "51", "1.5", None]


def test_a_parquet_column_twice_and_a_date_beyond_python_are_refused(tmp_path: Path) -> None:
    texts = pa.array(["a"])
    pq.write_table(pa.table([texts, texts], names=["prompt", "prompt"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has the column 'prompt' twice, so one would be lost; rename it"):
        read_file(tmp_path / "a.parquet")
    pq.write_table(pa.table({"day": pa.array([3_000_000], pa.int32()).cast(pa.date32())}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="holds a date or time that Python cannot represent"):
        read_file(tmp_path / "b.parquet")


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no file that can be read"):
        local_files(TableSource(source="d", rows=None))
    assert not is_generator("x" * 300)
