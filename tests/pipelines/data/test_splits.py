"""Folders of several splits, shards and compressed files: every row is read once, or the source is refused."""

from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import Path

import pytest

from pipelines.config.data_schema import TableSource
from pipelines.data.files import read_file
from pipelines.data.sources import local_files, unread
from pipelines.data.splits import folder_files, unread_files
from posttrain.errors import DataError
from tests.pipelines.data.test_files import LINE, ROWS, shards, zstandard


@pytest.mark.parametrize(
    "names",
    [
        ("train/d.jsonl", "test/d.jsonl"),
        ("gsm_train.jsonl", "gsm_test.jsonl"),
        ("a-train-00000-of-00001.jsonl", "a-test-00000-of-00001.jsonl"),
        ("Train.jsonl", "Test.jsonl"),
        ("gsmTrain2.jsonl.gz", "gsmVal2.jsonl.gz"),
        ("TRAIN/a.jsonl", "DEV/a.jsonl"),
    ],
)
def test_a_split_is_read_in_folders_suffixes_and_middles_in_any_case(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(LINE)
    assert folder_files(tmp_path, "train") == [tmp_path / names[0]]
    assert unread_files(tmp_path, "train") == [tmp_path / names[1]]


def test_a_pattern_of_several_splits_needs_to_know_which(tmp_path: Path) -> None:
    """Before, `data/*.jsonl` read the test file, too."""
    for name in ("a_train.jsonl", "a_test.jsonl"):
        (tmp_path / name).write_bytes(LINE)
    everything, one = f"{tmp_path}/*.jsonl", f"{tmp_path}/a_te*.jsonl"
    with pytest.raises(
        DataError, match=r"several splits .*\(a_test\.jsonl: test; a_train\.jsonl: train\).* one of: test, train"
    ):
        local_files(TableSource(source=everything))
    for split in ("train", "test"):
        named = TableSource(source=everything, split=split)
        assert local_files(named) == [tmp_path / f"a_{split}.jsonl"]
        assert unread(named) == [f"{tmp_path}/a_{'test' if split == 'train' else 'train'}.jsonl"]
    assert local_files(TableSource(source=one)) == [tmp_path / "a_test.jsonl"]
    assert unread(TableSource(source=one)) == []
    with pytest.raises(
        DataError, match=r"no file of the split 'train'; set data\.\*\.split to one of: test, or remove it"
    ):
        local_files(TableSource(source=one, split="train"))
    (tmp_path / "a_train.jsonl").rename(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"several splits by their names \(a\.jsonl: none; a_test\.jsonl: test\)"):
        local_files(TableSource(source=everything))


def test_a_name_of_two_splits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    shards(tmp_path / "test", "train_like.jsonl")
    for split in ("train", "test"):
        with pytest.raises(DataError, match=r"the name test/train_like\.jsonl names two splits \(test, train\)"):
            folder_files(tmp_path, split)


def test_shards_may_count_from_one_and_are_complete_in_each_folder(tmp_path: Path) -> None:
    shards(tmp_path / "a", "x-00001-of-00002.jsonl", "x-00002-of-00002.jsonl")
    assert len(folder_files(tmp_path / "a", "train")) == 2
    shards(tmp_path / "b", "x-00001-of-00003.jsonl", "x-00003-of-00003.jsonl")
    with pytest.raises(DataError, match="x has 2 of 3 shards, without number 2"):
        folder_files(tmp_path / "b", "train")
    shards(tmp_path / "c", "x-00000-of-00002.jsonl")
    shards(tmp_path / "c" / "d", "x-00001-of-00002.jsonl")
    with pytest.raises(DataError, match=r"d/x has 1 of 2 shards, without number 0"):
        folder_files(tmp_path / "c", "train")


def test_a_file_is_not_read_twice(tmp_path: Path) -> None:
    shards(tmp_path / "a", "train.jsonl", "train.jsonl.gz")
    with pytest.raises(
        DataError, match=r"train\.jsonl\.gz: its rows would be read twice, .* also holds .*train\.jsonl\."
    ):
        folder_files(tmp_path / "a", "train")
    shards(tmp_path, "b.jsonl", "c.jsonl")
    (tmp_path / "link.jsonl").symlink_to("b.jsonl")
    for again in ("b.jsonl", "link.jsonl", "*.jsonl"):
        named = TableSource(source=[f"{tmp_path}/b.jsonl", f"{tmp_path}/{again}"])
        with pytest.raises(DataError, match="its rows would be read twice"):
            local_files(named)


PACKERS = {"bz2": bz2.compress, "xz": lzma.compress, "gz": gzip.compress, "zst": zstandard}


@pytest.mark.parametrize("kind", PACKERS)
def test_every_stream_of_a_compressed_file_is_read_or_the_file_is_refused(tmp_path: Path, kind: str) -> None:
    """Python's own bz2 and lzma files leave out a second stream that is damaged."""
    path, one, two = tmp_path / f"x.jsonl.{kind}", PACKERS[kind](LINE * 3000), PACKERS[kind](LINE)
    path.write_bytes(one + two)
    assert read_file(path) == ROWS * 3001
    damaged = bytes([two[0] ^ 1]) + two[1:]
    for content in (one + damaged, one + b"garbage", one + b"B", one + two[:-3], one[:-3]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"cannot be decompressed"):
            read_file(path)
    if kind == "xz":  # its format allows zeros between streams
        path.write_bytes(one + b"\0" * 8 + two + b"\0" * 4)
        assert read_file(path) == ROWS * 3001


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b'prompt,completion\nq, "a, b"\n',
            r"has 3 fields, the header has 2\. A field begins with a space and a quote",
        ),
        (
            b"# made by hand\nprompt,completion\na,b\n",
            r"the header has 1\. Line 1 is taken for the header, .*'# made by hand'",
        ),
        (b"# a, b, c\nprompt,completion\na,b\n", r"the header has 3\. Line 1 is taken for the header"),
        (b"prompt,completion\na,b,c\n", r"the header has 2$"),
    ],
)
def test_a_wrong_number_of_fields_names_its_cause(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_file(tmp_path / "x.csv")
