"""The S3 store of `make up` serves its key only."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from infra.object_store import ObjectStore
from infra.s3 import Signed
from infra.s3_api import S3Api
from tests.infra.stores import KEY, SECRET, client, serving


@pytest.fixture(scope="module")
def store(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(root, tmp_path_factory.mktemp("store") / "s3") as (url, _):
        yield url


def status(url: str, **headers: str) -> int:
    """Return the status of one request; 0 without an answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


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
    for path in ("/", "/posttrain", "/posttrain?list-type=2", "/posttrain/dvc/files/ab", "/../index.db"):
        assert status(store + path) == 403
        assert status(store + path, Authorization=f"AWS4-HMAC-SHA256 Credential={KEY}/x/y/s3/aws4_request") == 403


@pytest.mark.parametrize(
    "headers",
    [
        {
            "HTTP_AUTHORIZATION": "AWS4-HMAC-SHA256 Credential=key/20260101/r/s3/aws4_request, SignedHeaders=host, Signature=\xff"
        },
        {"HTTP_HOST": "localhost:[1"},
        {"HTTP_AUTHORIZATION": "AWS4-HMAC-SHA256 ,,,="},
        {"HTTP_X_AMZ_DATE": "\uff12026"},
        {"RAW_URI": "http://[evil/"},
    ],
)
def test_a_request_that_cannot_be_read_is_refused_like_any_other(headers: dict[str, str]) -> None:
    """An error in the check would fill the store's log with tracebacks at a stranger's wish."""
    signed = "AWS4-HMAC-SHA256 Credential=key/20260101/r/s3/aws4_request, SignedHeaders=host, Signature=00"
    environ = {"REQUEST_METHOD": "GET", "RAW_URI": "/b/k", "HTTP_HOST": "127.0.0.1:1", "HTTP_AUTHORIZATION": signed}
    environ |= {"HTTP_X_AMZ_DATE": datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")} | headers
    statuses: list[str] = []
    Signed(lambda *_: [b"inside"], "key", "secret")(environ, lambda status, _: statuses.append(status))
    assert statuses == ["403 Forbidden"]


BOMB = b"<!DOCTYPE d [" + b"<!ENTITY a0 'xxxxxxxxxx'>"
BOMB += (
    b"".join(b"<!ENTITY a%d '%s'>" % (i, b"&a%d;" % (i - 1) * 10) for i in range(1, 12))
    + b"]><Delete><Key>&a11;</Key></Delete>"
)


@pytest.mark.parametrize(
    ("method", "uri", "body", "length"),
    [
        ("GET", "/bucket?list-type=2&max-keys=many", b"", None),
        ("PUT", "/bucket/key?uploadId=none&partNumber=x", b"", None),
        ("POST", "/bucket?delete", b"<Delete><Key>", None),
        ("POST", "/bucket?delete", BOMB, None),
        ("POST", "/bucket?delete", b"", "99999999999"),
        ("PUT", "/bucket/key", b"", "many"),
    ],
)
def test_a_request_with_the_key_that_makes_no_sense_is_refused_in_words(
    tmp_path: Path, method: str, uri: str, body: bytes, length: str | None
) -> None:
    api, statuses = S3Api(ObjectStore(tmp_path / "store")), list[str]()
    environ = {"REQUEST_METHOD": "PUT", "RAW_URI": "/bucket"}
    api(environ, lambda status, _: statuses.append(status))
    environ = {
        "REQUEST_METHOD": method,
        "RAW_URI": uri,
        "CONTENT_LENGTH": length or str(len(body)),
        "wsgi.input": BytesIO(body),
    }
    answer = b"".join(api(environ, lambda status, _: statuses.append(status)))
    assert (statuses[0], statuses[1][:1]) == ("200 OK", "4"), answer
    assert answer.startswith(b"<?xml")


@pytest.mark.parametrize(("key", "secret"), [(KEY, "guessed"), ("other", SECRET)])
def test_a_wrong_key_is_refused(store: str, key: str, secret: str) -> None:
    with pytest.raises(ClientError, match="403"):
        client(store, key, secret).list_buckets()
