"""The part of Amazon's S3 protocol that boto3, DVC and MLflow use, as a WSGI application over an ObjectStore."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from email.utils import format_datetime
from hashlib import md5
from typing import Any, BinaryIO
from urllib.parse import parse_qsl, quote, unquote
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from infra.object_store import CHUNK, Entry, ObjectStore, Stored
from pipelines.runtime.redaction import printable

Reply = tuple[int, dict[str, str], Iterable[bytes]]
NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
PAGE = 1000
"""Most keys of one listing."""
MOST_DOCUMENT_BYTES = 4 << 20
"""A list of 1,000 keys of 1,024 bytes, or of 10,000 parts, is smaller."""
IGNORED_QUERY = {"x-id"}
UNSIGNED = "UNSIGNED-PAYLOAD"
REASONS = {
    200: "OK", 204: "No Content", 206: "Partial Content", 400: "Bad Request", 404: "Not Found", 409: "Conflict", 411: "Length Required",
    412: "Precondition Failed", 416: "Range Not Satisfiable", 501: "Not Implemented", 507: "Insufficient Storage",
}  # fmt: skip


def iso_time(when: datetime) -> str:
    """Return a time in UTC as the protocol writes it."""
    return when.strftime("%Y-%m-%dT%H:%M:%S.000Z")


class Refused(Exception):
    """A request that is answered with an error of the protocol."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class S3Api:
    """Answer the requests of S3 clients. Who may ask is decided before, see infra/s3.py."""

    def __init__(self, store: ObjectStore, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.store, self.now = store, now

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        try:
            status, headers, body = self._reply(_Request(environ))
        except Refused as error:
            status, headers, body = error.status, *_error(error.code, str(error))
        except (ValueError, KeyError, ElementTree.ParseError) as error:  # a number, a field or a document that is none
            status, headers, body = (
                400,
                *_error("InvalidRequest", f"{type(error).__name__}: {printable(str(error))[:200]}"),
            )
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            status, headers, body = 507, *_error("InsufficientStorage", f"no space left in {self.store.folder}")
        start_response(f"{status} {REASONS[status]}", list(headers.items()))
        return [] if environ["REQUEST_METHOD"] == "HEAD" else body

    def _reply(self, request: _Request) -> Reply:
        if not request.bucket:
            return self._list_buckets(request)
        if not request.key:
            return self._bucket(request)
        self._require_bucket(request.bucket)
        return self._object(request)

    def _list_buckets(self, request: _Request) -> Reply:
        request.require("GET")
        rows = "".join(
            f"<Bucket><Name>{escape(name)}</Name><CreationDate>{created}</CreationDate></Bucket>"
            for name, created in self.store.buckets()
        )
        return _xml("ListAllMyBucketsResult", f"<Owner><ID>posttrain</ID></Owner><Buckets>{rows}</Buckets>")

    def _bucket(self, request: _Request) -> Reply:
        bucket, query = request.bucket, request.query
        if request.method == "PUT" and not query:
            self.store.create_bucket(bucket, self._time())
            return 200, {"Location": f"/{bucket}", "Content-Length": "0"}, []
        self._require_bucket(bucket)
        if request.method == "HEAD" and not query:
            return 200, {"Content-Length": "0"}, []
        if request.method == "DELETE" and not query:
            if not self.store.delete_bucket(bucket):
                raise Refused(409, "BucketNotEmpty", f"{bucket} holds objects")
            return 204, {}, []
        if request.method == "POST" and "delete" in query:
            return self._delete_many(request)
        if query.keys() & {"location", "versioning"}:
            request.require("GET", ("location", "versioning"))
            return _xml("LocationConstraint" if "location" in query else "VersioningConfiguration", "")
        return self._list(request)

    def _list(self, request: _Request) -> Reply:
        """List keys, both versions of the protocol: those below a delimiter are grouped under their common prefix."""
        query, second = request.query, request.query.get("list-type") == "2"
        known = {
            "list-type",
            "prefix",
            "delimiter",
            "max-keys",
            "encoding-type",
            "continuation-token",
            "start-after",
            "marker",
            "fetch-owner",
        }
        request.require("GET", known)
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        most = min(int(query.get("max-keys", PAGE)), PAGE)
        after = query.get("continuation-token") or query.get("start-after", "") if second else query.get("marker", "")
        found, groups, last, more = self._page(request.bucket, prefix, delimiter, after, most)
        shown: Callable[[str], str] = quote if query.get("encoding-type") == "url" else escape
        rows = [f"<Name>{escape(request.bucket)}</Name><Prefix>{shown(prefix)}</Prefix><MaxKeys>{most}</MaxKeys>"
                f"<IsTruncated>{str(more).lower()}</IsTruncated>"]  # fmt: skip
        if delimiter:
            rows.append(f"<Delimiter>{shown(delimiter)}</Delimiter>")
        if "encoding-type" in query:
            rows.append("<EncodingType>url</EncodingType>")
        if second:
            rows.append(f"<KeyCount>{len(found) + len(groups)}</KeyCount>")
        if more:
            name = "NextContinuationToken" if second else "NextMarker"
            rows.append(f"<{name}>{escape(last) if second else shown(last)}</{name}>")
        rows += [
            f"<Contents><Key>{shown(e.key)}</Key><LastModified>{e.modified}</LastModified><ETag>&quot;{e.content.etag}&quot;</ETag>"
            f"<Size>{e.content.size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for e in found
        ]
        rows += [f"<CommonPrefixes><Prefix>{shown(group)}</Prefix></CommonPrefixes>" for group in groups]
        return _xml("ListBucketResult", "".join(rows))

    def _page(
        self, bucket: str, prefix: str, delimiter: str, after: str, most: int
    ) -> tuple[list[Entry], list[str], str, bool]:
        """Return the objects and common prefixes of one page, its last name, and whether more follow."""
        found: list[Entry] = []
        groups: list[str] = []
        last = after
        for entry in self.store.entries(bucket, prefix, after):
            head, separator, _ = entry.key[len(prefix) :].partition(delimiter) if delimiter else (entry.key, "", "")
            group = prefix + head + separator
            if separator and (group == after or groups[-1:] == [group]):
                continue
            if len(found) + len(groups) == most:
                return found, groups, last, True
            if separator:
                groups.append(group)
            else:
                found.append(entry)
            last = group if separator else entry.key
        return found, groups, last, False

    def _delete_many(self, request: _Request) -> Reply:
        tree = ElementTree.fromstring(request.document())
        keys = [element.text or "" for element in tree.iter() if element.tag.endswith("Key")]
        self.store.remove(request.bucket, keys)
        quiet = any(element.tag.endswith("Quiet") and element.text == "true" for element in tree.iter())
        rows = "" if quiet else "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
        return _xml("DeleteResult", rows)

    def _object(self, request: _Request) -> Reply:
        method, query = request.method, request.query
        if "uploads" in query or "uploadId" in query:
            return self._multipart(request)
        if method in ("GET", "HEAD"):
            return self._get(request)
        request.require(("PUT", "DELETE"))
        if method == "DELETE":
            self.store.remove(request.bucket, [request.key])
            return 204, {}, []
        content, copied = self._content(request)
        headers = (
            copied.headers
            if copied and request.header("x-amz-metadata-directive") != "REPLACE"
            else request.kept_headers()
        )
        modified = self._put(request, content, headers)
        if copied:
            return _xml(
                "CopyObjectResult", f"<LastModified>{modified}</LastModified><ETag>&quot;{content.etag}&quot;</ETag>"
            )
        return 200, {"ETag": f'"{content.etag}"', "Content-Length": "0"}, []

    def _get(self, request: _Request) -> Reply:
        request.require(("GET", "HEAD"), {"partNumber"} if request.query.get("partNumber") == "1" else ())
        opened = self.store.open(request.bucket, request.key)
        if opened is None:
            raise Refused(404, "NoSuchKey", f"{request.bucket} holds no {request.key}")
        entry, file = opened
        wanted = request.header("if-match")
        if wanted and wanted.strip('"') not in ("*", entry.content.etag):
            file.close()
            raise Refused(412, "PreconditionFailed", f"{request.key} has the ETag {entry.content.etag}")
        modified = datetime.strptime(entry.modified, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
        headers = json.loads(entry.headers) | {
            "ETag": f'"{entry.content.etag}"', "Accept-Ranges": "bytes", "Last-Modified": format_datetime(modified, usegmt=True),
        }  # fmt: skip
        size, status = entry.content.size, 200
        first, end = 0, size
        if request.header("range"):
            first, end = _range(request.header("range"), size)
            status, headers["Content-Range"] = 206, f"bytes {first}-{end - 1}/{size}"
        headers["Content-Length"] = str(end - first)
        if request.method == "HEAD":
            file.close()
            return status, headers, []
        return status, headers, _pieces(file, first, end)

    def _multipart(self, request: _Request) -> Reply:
        method, query = request.method, request.query
        if method == "POST" and "uploads" in query:
            upload = self.store.begin_upload(request.bucket, request.key, request.kept_headers(), self._time())
            return _xml("InitiateMultipartUploadResult", f"<Bucket>{escape(request.bucket)}</Bucket><Key>{escape(request.key)}</Key>"
                        f"<UploadId>{upload}</UploadId>")  # fmt: skip
        request.require(("PUT", "POST", "DELETE"), {"uploadId", "partNumber"})
        upload = query["uploadId"]
        headers = self.store.upload(upload, request.bucket, request.key)
        if headers is None:
            raise Refused(404, "NoSuchUpload", f"there is no upload {upload} of {request.key}")
        if method == "DELETE":
            self.store.end_upload(upload)
            return 204, {}, []
        if method == "PUT":
            content, copied = self._content(request)
            self.store.put_part(upload, int(query["partNumber"]), content)
            if copied:
                return _xml("CopyPartResult", f"<ETag>&quot;{content.etag}&quot;</ETag>")
            return 200, {"ETag": f'"{content.etag}"', "Content-Length": "0"}, []
        return self._complete(request, upload, headers)

    def _complete(self, request: _Request, upload: str, headers: str) -> Reply:
        """Join the parts that the client names, in its order."""
        tree = ElementTree.fromstring(request.document())
        parts, chosen = self.store.parts(upload), []
        for element in tree.iter():
            if element.tag.endswith("}Part") or element.tag == "Part":
                fields = {child.tag.rpartition("}")[2]: child.text or "" for child in element}
                part = parts.get(int(fields["PartNumber"]))
                if part is None or part.etag != fields["ETag"].strip('"'):
                    raise Refused(400, "InvalidPart", f"part {fields['PartNumber']} is not what was uploaded")
                chosen.append(part)
        joined = self.store.receive(self.store.read(chosen))
        assert joined is not None
        digest = md5(b"".join(bytes.fromhex(part.etag) for part in chosen), usedforsecurity=False).hexdigest()
        content = Stored(joined.file, joined.size, f"{digest}-{len(chosen)}")
        self._put(request, content, headers)
        self.store.end_upload(upload)
        return _xml("CompleteMultipartUploadResult", f"<Bucket>{escape(request.bucket)}</Bucket><Key>{escape(request.key)}</Key>"
                    f"<ETag>&quot;{content.etag}&quot;</ETag>")  # fmt: skip

    def _content(self, request: _Request) -> tuple[Stored, Entry | None]:
        """Return the content that a request carries, or copies, with the object that it copies."""
        source = request.header("x-amz-copy-source")
        if not source:
            announced = request.header("x-amz-content-sha256")
            content = self.store.receive(request.body(), "" if announced == UNSIGNED else announced)
            if content is None:
                raise Refused(400, "XAmzContentSHA256Mismatch", "the body is not the one that was signed")
            return content, None
        bucket, _, key = unquote(source).removeprefix("/").partition("/")
        opened = self.store.open(bucket, key)
        if opened is None:
            raise Refused(404, "NoSuchKey", f"{bucket} holds no {key}")
        entry, file = opened
        part = request.header("x-amz-copy-source-range")
        content = self.store.receive(
            _pieces(file, *(_range(part, entry.content.size) if part else (0, entry.content.size)))
        )
        assert content is not None
        return content, entry

    def _put(self, request: _Request, content: Stored, headers: str) -> str:
        modified = self._time()
        self.store.put(request.bucket, Entry(request.key, content, modified, headers))
        return modified

    def _time(self) -> str:
        return iso_time(self.now())

    def _require_bucket(self, bucket: str) -> None:
        if bucket not in {name for name, _ in self.store.buckets()}:
            raise Refused(404, "NoSuchBucket", f"there is no bucket {bucket}")


class _Request:
    """One request. Settings that this store does not know are refused, so that none is silently without effect."""

    def __init__(self, environ: dict[str, Any]) -> None:
        self._environ = environ
        self.method: str = environ["REQUEST_METHOD"]
        path, _, query = (environ.get("RAW_URI") or environ["REQUEST_URI"]).partition("?")
        self.query = {
            name: value for name, value in parse_qsl(query, keep_blank_values=True) if name not in IGNORED_QUERY
        }
        self.bucket, _, self.key = unquote(path).removeprefix("/").partition("/")
        if self.method == "PUT" and (self.header("if-match") or self.header("if-none-match")):
            raise Refused(501, "NotImplemented", "this store takes no conditions for a PUT")

    def header(self, name: str) -> str:
        return str(self._environ.get("HTTP_" + name.upper().replace("-", "_"), ""))

    def require(self, methods: str | tuple[str, ...], query: Iterable[str] = ()) -> None:
        """Refuse other methods, and settings that are not listed."""
        unknown = sorted(set(self.query) - set(query))
        if self.method not in ((methods,) if isinstance(methods, str) else methods) or unknown:
            raise Refused(501, "NotImplemented", f"this store has no {self.method} {' '.join(unknown)}".strip())

    def kept_headers(self) -> str:
        """Return the headers that are stored with an object, as JSON."""
        kept = {
            name[5:].replace("_", "-").lower(): value
            for name, value in self._environ.items()
            if name.startswith("HTTP_X_AMZ_META_")
        }
        kept |= {
            name: self.header(name)
            for name in ("content-encoding", "cache-control", "content-disposition")
            if self.header(name)
        }
        return json.dumps(kept | {"content-type": self._environ.get("CONTENT_TYPE") or "binary/octet-stream"})

    def document(self) -> bytes:
        """Return the body of a request that holds XML. Raises Refused if it is larger than any list of keys or parts."""
        if int(self._environ.get("CONTENT_LENGTH") or 0) > MOST_DOCUMENT_BYTES:
            raise Refused(400, "MaxMessageLengthExceeded", f"a document has at most {MOST_DOCUMENT_BYTES} bytes")
        return b"".join(self.body())

    def body(self) -> Iterator[bytes]:
        """Yield the body in pieces. Raises Refused if it ends early, or is encoded in a way that this store does not know."""
        if "aws-chunked" in self.header("content-encoding") or self.header("x-amz-content-sha256").startswith(
            "STREAMING"
        ):
            raise Refused(501, "NotImplemented", "this store takes no bodies in signed pieces (aws-chunked)")
        if not (length := self._environ.get("CONTENT_LENGTH")):
            raise Refused(411, "MissingContentLength", "a body needs its length")
        left = int(length)
        while left:
            piece: bytes = self._environ["wsgi.input"].read(min(left, CHUNK))
            if not piece:
                raise Refused(400, "IncompleteBody", f"{left} of {length} bytes are missing")
            left -= len(piece)
            yield piece


def _range(text: str, size: int) -> tuple[int, int]:
    """Return the first byte, and the one after the last, of `bytes=1-5`, `bytes=5-` or `bytes=-5`."""
    first, _, last = text.removeprefix("bytes=").partition("-")
    if not (first or last) or not (first + last).isdigit():
        raise Refused(416, "InvalidRange", f"{text} is no range of bytes")
    begin = int(first) if first else max(size - int(last), 0)
    end = min(int(last) + 1, size) if first and last else size
    if begin >= end:
        raise Refused(416, "InvalidRange", f"{text} is outside of {size} bytes")
    return begin, end


def _pieces(file: BinaryIO, first: int, end: int) -> Iterator[bytes]:
    with file:
        file.seek(first)
        while first < end and (piece := file.read(min(CHUNK, end - first))):
            first += len(piece)
            yield piece


def _error(code: str, message: str) -> tuple[dict[str, str], Iterable[bytes]]:
    _, headers, body = _xml("Error", f"<Code>{code}</Code><Message>{escape(message)}</Message>", namespace="")
    return headers, body


def _xml(root: str, inner: str, namespace: str = f' xmlns="{NAMESPACE}"') -> Reply:
    data = f'<?xml version="1.0" encoding="UTF-8"?>\n<{root}{namespace}>{inner}</{root}>'.encode()
    return 200, {"Content-Type": "application/xml", "Content-Length": str(len(data))}, [data]
