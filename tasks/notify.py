"""One message to a webhook: what happened and where to look. POSTTRAIN_WEBHOOK is its URL; unset, nobody is told.

The body is JSON with `event` (promoted, refused, rolled back, failed, waiting), `text`, which Slack and Mattermost show as it
is, and `links`. A webhook that does not answer never fails a flow.
"""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException

from pipelines.runtime.redaction import redact
from tasks.console import say

TIMEOUT_SECONDS = 10.0


def notify(event: str, text: str, links: Mapping[str, str | None]) -> bool:
    """Whether the webhook took it."""
    url = os.environ.get("POSTTRAIN_WEBHOOK")
    if not url:
        return False
    there = {name: redact(link) for name, link in links.items() if link}
    lines = [redact(text), *(f"{name}: {link}" for name, link in there.items())]
    body = {"event": event, "text": "\n".join(lines), "links": there}
    headers = {"Content-Type": "application/json", "User-Agent": "posttrain"}
    try:
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS).close()
    except ValueError:
        # what urllib says of it holds the whole address, which is a secret
        say(f"the webhook was not told of `{event}`: POSTTRAIN_WEBHOOK is not an http:// or https:// address")
        return False
    except (OSError, HTTPException) as error:
        say(f"the webhook was not told of `{event}`: {redact(str(error)) or type(error).__name__}")
        return False
    return True
