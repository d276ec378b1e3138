"""The S3 store of `make up`: objects survive a kill; lost, cut and full disks are named; boto3 finds its protocol."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from botocore.exceptions import BotoCoreError, ClientError

from infra.object_store import Entry, ObjectStore
from posttrain.errors import OrchestrationError
from tests.infra.stores import KEY, SECRET, client, serving

BUCKET = "posttrain"
NOW = "2026-01-02T03:04:05.000Z"


@pytest.fixture(scope="module")
def ours(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with serving(root, tmp_path_factory.mktemp("store") / "s3") as (url, _):
        made = client(url)
        made.create_bucket(Bucket=BUCKET)
        yield made


def body(store: Any, key: str) -> bytes:
    return bytes(store.get_object(Bucket=BUCKET, Key=key)["Body"].read())


def test_objects_survive_a_kill_in_the_middle_of_an_upload(root: Path, tmp_path: Path) -> None:
    old, new = os.urandom(3_000_000), os.urandom(60_000_000)
    with serving(root, tmp_path / "s3") as (url, process):
        store = client(url)
        store.create_bucket(Bucket=BUCKET)
        for key in ("model", "mlflow/1/curve.json"):
            store.put_object(Bucket=BUCKET, Key=key, Body=old, Metadata={"run": "7"})

        def replace() -> None:
            with suppress(ClientError, BotoCoreError):  # the server is killed
                client(url).put_object(Bucket=BUCKET, Key="model", Body=new)

        upload = Thread(target=replace)
        upload.start()
        while upload.is_alive() and len(list((tmp_path / "s3" / "objects").iterdir())) < 3:
            pass
        process.kill()
        process.wait()
        upload.join()
    with serving(root, tmp_path / "s3") as (url, _):
        store = client(url)
        assert body(store, "model") in (old, new)
        assert body(store, "mlflow/1/curve.json") == old
        assert store.head_object(Bucket=BUCKET, Key="mlflow/1/curve.json")["Metadata"] == {"run": "7"}
        assert len(list((tmp_path / "s3" / "objects").iterdir())) == 2  # the half of an upload is gone


def test_an_index_of_lost_content_says_so_and_takes_it_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ObjectStore(tmp_path)
    for key in ("whole", "lost", "cut"):
        content = store.receive([key.encode()])
        assert content is not None
        store.put(BUCKET, Entry(key, content, NOW, "{}"))
    files = {entry.key: tmp_path / "objects" / entry.content.file for entry in store.entries(BUCKET, "", "")}
    files["lost"].unlink()
    files["cut"].write_bytes(b"")
    (tmp_path / "objects" / "nobody's").write_bytes(b"half")
    again = ObjectStore(tmp_path)
    assert [entry.key for entry in again.entries(BUCKET, "", "")] == ["whole"]
    assert sorted((tmp_path / "objects").iterdir()) == [files["whole"]]
    assert (
        capsys.readouterr().err
        == "the content of cut is lost; store it again\nthe content of lost is lost; store it again\n"
    )


@pytest.mark.parametrize("damage", [b"\0" * 4096, b"no database"])
def test_a_damaged_index_is_refused_and_nothing_is_deleted(tmp_path: Path, damage: bytes) -> None:
    store = ObjectStore(tmp_path)
    content = store.receive([b"weights"])
    assert content is not None
    store.put(BUCKET, Entry("model", content, NOW, "{}"))
    (tmp_path / "index.db").write_bytes(damage)
    with pytest.raises(OrchestrationError, match=r"is damaged .*nothing was changed"):
        ObjectStore(tmp_path)
    assert (tmp_path / "objects" / content.file).read_bytes() == b"weights"


def test_a_second_server_on_the_same_folder_is_refused(root: Path, tmp_path: Path) -> None:
    with serving(root, tmp_path), pytest.raises(AssertionError), serving(root, tmp_path):
        pass


def test_listings_group_and_continue_in_the_order_of_bytes(ours: Any) -> None:
    keys = ["l/a", "l/b/1", "l/b/2", "l/b/3", "l/c +&=?%", "l/d/1", "l/é", "l/中", "l/😀"]
    for key in [*keys, "m/other"]:
        ours.put_object(Bucket=BUCKET, Key=key, Body=key.encode())

    def pages(operation: str, size: int, **options: Any) -> list[Any]:
        sized = {"PageSize": size}
        return list(
            ours.get_paginator(operation).paginate(Bucket=BUCKET, Prefix="l/", PaginationConfig=sized, **options)
        )

    for size in (1, 2, 1000):
        for operation in ("list_objects", "list_objects_v2"):
            assert [entry["Key"] for page in pages(operation, size) for entry in page["Contents"]] == keys
            grouped = pages(operation, size, Delimiter="/")
            shown = [entry["Key"] for page in grouped for entry in page.get("Contents", [])]
            groups = [entry["Prefix"] for page in grouped for entry in page.get("CommonPrefixes", [])]
            assert (shown, groups) == (["l/a", "l/c +&=?%", "l/é", "l/中", "l/😀"], ["l/b/", "l/d/"])
    deleted = ours.delete_objects(Bucket=BUCKET, Delete={"Objects": [{"Key": key} for key in keys[:8]]})
    assert [entry["Key"] for entry in deleted["Deleted"]] == keys[:8]
    assert ours.list_objects_v2(Bucket=BUCKET, Prefix="l/")["KeyCount"] == 1


def test_parts_ranges_copies_and_conditions(ours: Any) -> None:
    first, second = os.urandom(5 << 20), b"the end"
    upload = ours.create_multipart_upload(Bucket=BUCKET, Key="big", ContentType="text/x", Metadata={"a": "b"})[
        "UploadId"
    ]
    tags = [ours.upload_part(Bucket=BUCKET, Key="big", UploadId=upload, PartNumber=n, Body=part)["ETag"]
            for n, part in ((1, first), (2, second))]  # fmt: skip
    parts = {"Parts": [{"ETag": tag, "PartNumber": n} for n, tag in enumerate(tags, 1)]}
    wrong = {"Parts": [{"ETag": tags[0], "PartNumber": 2}]}
    with pytest.raises(ClientError, match="InvalidPart"):
        ours.complete_multipart_upload(Bucket=BUCKET, Key="big", UploadId=upload, MultipartUpload=wrong)
    ours.complete_multipart_upload(Bucket=BUCKET, Key="big", UploadId=upload, MultipartUpload=parts)
    assert body(ours, "big") == first + second
    head = ours.head_object(Bucket=BUCKET, Key="big")
    digests = hashlib.md5(first).digest() + hashlib.md5(second).digest()
    assert head["ETag"] == f'"{hashlib.md5(digests).hexdigest()}-2"'
    assert (head["ContentType"], head["Metadata"], head["ContentLength"]) == ("text/x", {"a": "b"}, len(first) + 7)
    with pytest.raises(ClientError, match="NoSuchUpload"):
        ours.upload_part(Bucket=BUCKET, Key="big", UploadId=upload, PartNumber=1, Body=b"")
    for text, wanted in (("bytes=-3", b"end"), (f"bytes={len(first)}-", second), ("bytes=0-1", first[:2])):
        assert ours.get_object(Bucket=BUCKET, Key="big", Range=text)["Body"].read() == wanted
    with pytest.raises(ClientError, match="InvalidRange"):
        ours.get_object(Bucket=BUCKET, Key="big", Range="bytes=99999999-")
    ours.copy_object(Bucket=BUCKET, Key="copy é", CopySource={"Bucket": BUCKET, "Key": "big"})
    ours.delete_object(Bucket=BUCKET, Key="big")
    assert body(ours, "copy é") == first + second
    assert ours.head_object(Bucket=BUCKET, Key="copy é")["Metadata"] == {"a": "b"}
    with pytest.raises(ClientError, match="PreconditionFailed"):
        ours.get_object(Bucket=BUCKET, Key="copy é", IfMatch='"0"')
    with pytest.raises(ClientError, match="NoSuchKey"):
        ours.get_object(Bucket=BUCKET, Key="big")
    with pytest.raises(ClientError, match="NoSuchBucket"):
        ours.put_object(Bucket="nowhere", Key="x", Body=b"")
    with pytest.raises(ClientError, match="BucketNotEmpty"):
        ours.delete_bucket(Bucket=BUCKET)


def test_what_the_store_does_not_know_is_refused(ours: Any) -> None:
    ours.put_object(Bucket=BUCKET, Key="old", Body=b"1")
    for ask in (
        lambda: ours.put_object(Bucket=BUCKET, Key="old", Body=b"2", IfNoneMatch="*"),
        lambda: ours.get_object_tagging(Bucket=BUCKET, Key="old"),
        lambda: ours.get_object(Bucket=BUCKET, Key="old", VersionId="1"),
        lambda: ours.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"}),
    ):
        with pytest.raises(ClientError, match="NotImplemented"):
            ask()
    assert body(ours, "old") == b"1"


@pytest.mark.slow
def test_weights_of_dvc_and_artifacts_of_mlflow_survive_a_restart(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository

    project, folder = tmp_path / "project", tmp_path / "s3"
    weights = os.urandom(20 << 20)
    (project / "models").mkdir(parents=True)
    (project / "models" / "weights").write_bytes(weights)
    for number in range(50):
        (project / "models" / f"part {number}").write_text(str(number))
    keys = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}

    def dvc(*words: str) -> None:
        subprocess.run([sys.executable, "-m", "dvc", *words], cwd=project, env=os.environ | keys, check=True)

    def artifacts(url: str) -> S3ArtifactRepository:
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", url)
        return S3ArtifactRepository(f"s3://{BUCKET}/mlflow/1", access_key_id=KEY, secret_access_key=SECRET)

    with serving(root, folder) as (url, process):
        client(url).create_bucket(Bucket=BUCKET)
        dvc("init", "-q", "--no-scm")
        dvc("remote", "add", "-d", "servers", f"s3://{BUCKET}/dvc")
        dvc("remote", "modify", "servers", "endpointurl", url)
        dvc("add", "-q", "models")
        dvc("push", "-q")
        artifacts(url).log_artifacts(str(project / "models"), "models")
        process.kill()
    shutil.rmtree(project / "models")
    shutil.rmtree(project / ".dvc" / "cache")
    with serving(root, folder) as (url, _):
        dvc("remote", "modify", "servers", "endpointurl", url)
        dvc("pull", "-q")
        assert (project / "models" / "weights").read_bytes() == weights
        assert len(list((project / "models").iterdir())) == 51
        assert len(artifacts(url).list_artifacts("models")) == 51
        copied = artifacts(url).download_artifacts("models", str(tmp_path))
        assert Path(copied, "weights").read_bytes() == weights
        artifacts(url).delete_artifacts("models")
        assert artifacts(url).list_artifacts("models") == []
