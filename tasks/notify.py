"""Send one message to a webhook: the event and links to it. POSTTRAIN_WEBHOOK is its URL; if unset, nothing is sent.

The body is JSON with `event` (promoted, refused, rolled back, failed, waiting), `text`, which Slack and Mattermost show as it
is, and `links`. A webhook that does not answer never fails a flow. Redirects are not followed. With POSTTRAIN_WEBHOOK_SECRET the
header X-Posttrain-Signature holds `sha256=` and the HMAC-SHA256 of the body.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import threading
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException, InvalidURL
from typing import Any

from pipelines.runtime.redaction import redact
from tasks.console import print_line

TIMEOUT_SECONDS = 10.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would let the webhook's host send our request into the private network."""

    # pyrefly: ignore[bad-override]
    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _signature(body: bytes) -> dict[str, str]:
    """Return the header by which the receiver knows the sender, if POSTTRAIN_WEBHOOK_SECRET is set."""
    secret = os.environ.get("POSTTRAIN_WEBHOOK_SECRET")
    if not secret:
        return {}
    return {"X-Posttrain-Signature": "sha256=" + hmac.new(os.fsencode(secret), body, hashlib.sha256).hexdigest()}


def notify(event: str, text: str, links: Mapping[str, str | None]) -> bool:
    """Send the message; return True if the webhook accepted it within TIMEOUT_SECONDS."""
    url = os.environ.get("POSTTRAIN_WEBHOOK")
    if not url:
        return False
    there = {name: redact(link) for name, link in links.items() if link}
    lines = [redact(text), *(f"{name}: {link}" for name, link in there.items())]
    body = {"event": event, "text": "\n".join(lines), "links": there}
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "User-Agent": "posttrain", **_signature(data)}
    answers: list[str] = []
    # urllib's own limit is one for each read: a server that sends a byte every few seconds would hold the flow for hours
    sender = threading.Thread(target=lambda: answers.append(_send(url, data, headers)), name="webhook", daemon=True)
    sender.start()
    sender.join(TIMEOUT_SECONDS)
    problem = answers[0] if answers else f"no answer within {TIMEOUT_SECONDS:g} seconds"
    if problem:
        print_line(f"the webhook did not receive `{event}`: {problem}")
    return not problem


def _send(url: str, data: bytes, headers: Mapping[str, str]) -> str:
    """Post the data; return why it was not accepted, or nothing."""
    try:
        if not url.startswith(("http://", "https://")):
            raise ValueError("not an address of the web")
        _OPENER.open(urllib.request.Request(url, data, dict(headers)), timeout=TIMEOUT_SECONDS).close()
    except (ValueError, InvalidURL):
        # urllib's message contains the address or its path, which is a secret.
        return "POSTTRAIN_WEBHOOK must be an http:// or https:// address, without blanks"
    except (OSError, HTTPException) as error:
        return redact(str(error)) or type(error).__name__
    return ""
