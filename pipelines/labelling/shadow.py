"""Make items of the answers that `posttrain serve` and its shadow gave to the same requests, so that people compare them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from pipelines.labelling.session import Answer, Item, pair_up
from posttrain.errors import DataError

SHADOW = "shadow"


def shadow_items(records: Sequence[dict[str, Any]], prompts: Sequence[Any], count: int, seed: int) -> list[Item]:
    """Return up to `count` items, one per prompt, in an order that the seed decides.

    Args:
        records: logged answers, as pipelines.tracking.served has them.
        prompts: those that may be asked about.

    Raises:
        DataError: no such prompt got two different answers.
    """
    shadows = {record["id"].removesuffix(f"-{SHADOW}"): record for record in records if record[SHADOW]}
    allowed = {_key(prompt) for prompt in prompts}
    pairs: dict[str, tuple[Any, list[Answer]]] = {}
    for record in records:
        other = shadows.get(record["id"])
        if not record[SHADOW] and other is not None and _key(record["prompt"]) in allowed:
            answers = [Answer(each["completion"], each["model"], each["md5"]) for each in (record, other)]
            if answers[0].text != answers[1].text:
                pairs[_key(record["prompt"])] = record["prompt"], answers
    if not pairs:
        raise DataError(
            "no logged request has two different answers, of the served model and of a shadow; `posttrain serve --shadow challenger`"
            " collects them"
        )
    chosen = random.Random(f"shadow/{seed}").sample(sorted(pairs), min(count, len(pairs)))
    return [item for number, key in enumerate(chosen) for item in pair_up(*pairs[key], number)]


def _key(prompt: Any) -> str:
    return json.dumps(prompt, sort_keys=True)
