"""The S3 store of `python -m infra.servers`: objects in a folder, behind a check of every request's signature.

    python -m infra.s3 PORT FOLDER

A request must be signed (AWS signature version 4) with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of the environment, and be
addressed to this machine.
"""

from __future__ import annotations

import hmac
import os
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from infra.object_store import ObjectStore
from infra.s3_api import S3Api, iso_time
from pipelines.runtime.command_line import reports_errors
from pipelines.runtime.process import Lock
from posttrain.errors import OrchestrationError

HOST = "127.0.0.1"
SCHEME = "AWS4-HMAC-SHA256 "
SKEW = timedelta(minutes=15)
ABANDONED = timedelta(days=7)
"""Age of an upload in parts that its client has given up."""
App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Signed:
    """WSGI middleware: forward requests signed with the store's key, and refuse all others with 403."""

    def __init__(self, app: App, key: str, secret: str) -> None:
        self.app, self.credentials = app, Credentials(key, secret)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if self._accepts(environ):
            return self.app(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "text/plain")])
        return [b"the store takes only requests that are signed with its key\n"]

    def _accepts(self, environ: dict[str, Any]) -> bool:
        given = environ.get("HTTP_AUTHORIZATION", "")
        if not given.startswith(SCHEME) or environ.get("HTTP_HOST", "").rpartition(":")[0] not in (HOST, "localhost"):
            return False
        parts = dict(part.strip().partition("=")[::2] for part in given.removeprefix(SCHEME).split(","))
        key, *scope = parts.get("Credential", "").split("/")
        when = environ.get("HTTP_X_AMZ_DATE", "")
        names = parts.get("SignedHeaders", "").split(";")
        if key != self.credentials.access_key or len(scope) != 4 or "host" not in names or not _is_recent(when):
            return False
        try:
            expected = self._signature(environ, names, when, scope[1])
        except ValueError:  # an address that cannot be read, e.g. of Host: localhost:[1
            return False
        return hmac.compare_digest(expected.encode(), parts.get("Signature", "").encode())

    def _signature(self, environ: dict[str, Any], names: list[str], when: str, region: str) -> str:
        path = environ.get("RAW_URI") or environ.get("REQUEST_URI") or environ["PATH_INFO"]
        headers = {name: _header(environ, name) for name in names}
        request = AWSRequest(environ["REQUEST_METHOD"], f"http://{environ['HTTP_HOST']}{path}", headers)
        request.context["timestamp"] = when
        request.context["payload_signing_enabled"] = False
        signer = _Verifier(self.credentials, "s3", region)
        text = signer.string_to_sign(request, signer.canonical_request(request))
        return str(signer.signature(text, request))


class _Verifier(S3SigV4Auth):
    """Sign the headers that the client named, and the digest of its body."""

    def headers_to_sign(self, request: Any) -> Any:
        return request.headers

    def payload(self, request: Any) -> str:
        return str(request.headers.get("x-amz-content-sha256", "UNSIGNED-PAYLOAD"))


def _header(environ: dict[str, Any], name: str) -> str:
    key = name.upper().replace("-", "_")
    return str(environ.get(key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}", ""))


def _is_recent(when: str) -> bool:
    try:
        signed = datetime.strptime(when, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        return False
    return abs(datetime.now(UTC) - signed) < SKEW


@reports_errors
def main() -> int:
    """Serve until the process is stopped."""
    from werkzeug.serving import run_simple

    folder = Path(sys.argv[2])
    if not Lock(folder / "lock").acquire():
        raise OrchestrationError(
            f"a different process serves {folder}. Stop it first: `python -m infra.servers stop s3`"
        )
    store = ObjectStore(folder)
    store.end_uploads_before(iso_time(datetime.now(UTC) - ABANDONED))
    app = Signed(S3Api(store), os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
    run_simple(HOST, int(sys.argv[1]), app, threaded=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
