"""One message to a webhook: what happened and where to look. POSTTRAIN_WEBHOOK is its URL; unset, nobody is told.

The body is JSON with `event` (promoted, refused, rolled back, failed, waiting), `text`, which Slack and Mattermost show as it
is, and `links`. A webhook that does not answer never fails a flow.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping

from pipelines.redaction import redact
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
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json", "User-Agent": "posttrain"}
    )
    try:
        urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS).close()
    except (urllib.error.URLError, OSError, ValueError) as error:
        say(f"the webhook was not told of `{event}`: {redact(str(error))}")
        return False
    return True
