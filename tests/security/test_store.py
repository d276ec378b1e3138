"""The S3 store of `make up` serves its key only."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from pipelines.commands.ui import free_port

KEY, SECRET = "posttrain-store-key", "the-store's-secret"


@pytest.fixture(scope="module")
def store(root: Path) -> Iterator[str]:
    port = free_port(0)
    environment = os.environ | {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    process = subprocess.Popen(
        [sys.executable, "-m", "infra.s3", str(port)], cwd=root, env=environment, stderr=subprocess.DEVNULL
    )
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while status(url) == 0:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield url
    finally:
        process.kill()
        process.wait()


def status(url: str, **headers: str) -> int:
    """Return the status of one request; 0 without an answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def client(url: str, key: str = KEY, secret: str = SECRET) -> Any:
    return boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id=key, aws_secret_access_key=secret
    )


def test_who_has_the_key_writes_lists_and_reads(store: str) -> None:
    ours = client(store)
    ours.create_bucket(Bucket="posttrain")
    for name in ("dvc/files/ab", "odd name +=&?%/é.txt"):
        ours.put_object(Bucket="posttrain", Key=name, Body=b"weights")
        assert ours.get_object(Bucket="posttrain", Key=name)["Body"].read() == b"weights"
    listed = ours.list_objects_v2(Bucket="posttrain", Prefix="dvc/", Delimiter="/")
    assert [entry["Prefix"] for entry in listed["CommonPrefixes"]] == ["dvc/files/"]
    upload = ours.create_multipart_upload(Bucket="posttrain", Key="large")["UploadId"]
    part = ours.upload_part(Bucket="posttrain", Key="large", UploadId=upload, PartNumber=1, Body=b"x")
    parts = {"Parts": [{"ETag": part["ETag"], "PartNumber": 1}]}
    ours.complete_multipart_upload(Bucket="posttrain", Key="large", UploadId=upload, MultipartUpload=parts)
    ours.delete_object(Bucket="posttrain", Key="dvc/files/ab")


def test_nobody_else_lists_reads_or_resets(store: str) -> None:
    for path in ("/", "/posttrain", "/posttrain?list-type=2", "/moto-api/", "/moto-api/data.json"):
        assert status(store + path) == 403
        assert status(store + path, Authorization=f"AWS4-HMAC-SHA256 Credential={KEY}/x/y/s3/aws4_request") == 403


@pytest.mark.parametrize(("key", "secret"), [(KEY, "guessed"), ("other", SECRET)])
def test_a_wrong_key_is_refused(store: str, key: str, secret: str) -> None:
    with pytest.raises(ClientError, match="403"):
        client(store, key, secret).list_buckets()
