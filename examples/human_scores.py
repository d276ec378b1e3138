"""Write pairs with graded human scores, for a reward model: PandaLM's annotators, and OASST's ranks.

    python examples/human_scores.py pandalm ../shared/data/pandalm_human/testset-v1.json data/raw/pandalm.jsonl
    python examples/human_scores.py oasst ../shared/data/oasst_en_100/en_100_tree.jsonl data/raw/oasst.jsonl

PandaLM: a score is the share of three annotators who prefer the answer, ties counting half; pairs without a majority are left out.
OASST: the score of a reply is minus its rank among the replies to the same message, and every two ranked replies are a pair.
Empty answers, and answers that are no text, are left out and counted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def pandalm(path: Path) -> Iterator[Row]:
    """Yield one pair for each row with a majority of the annotators."""
    for row in json.loads(path.read_text(encoding="utf-8")):
        votes = [row[f"annotator{number}"] for number in (1, 2, 3)]
        first = sum({0: 0.5, 1: 1.0, 2: 0.0}[vote] for vote in votes) / 3
        if first != 0.5:
            prompt = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
            yield pair(prompt, (row["response1"], first), (row["response2"], 1 - first))


def oasst(path: Path) -> Iterator[Row]:
    """Yield every two ranked replies to a message, with the conversation before them as the prompt."""
    for line in path.read_text(encoding="utf-8").splitlines():
        yield from replies(json.loads(line)["prompt"], [])


def replies(message: Row, before: list[Row]) -> Iterator[Row]:
    """Yield the pairs below one message of a tree."""
    role = {"prompter": "user", "assistant": "assistant"}[message["role"]]
    conversation = [*before, {"role": role, "content": message["text"]}]
    ranked = [reply for reply in message["replies"] if reply["role"] == "assistant" and reply.get("rank") is not None]
    for one, other in combinations(ranked, 2):
        if one["rank"] != other["rank"]:
            yield pair(plain(conversation), (one["text"], -one["rank"]), (other["text"], -other["rank"]))
    for reply in message["replies"]:
        yield from replies(reply, conversation)


def plain(conversation: list[Row]) -> str:
    """Return a conversation as text for models without a chat template."""
    if len(conversation) == 1:
        return str(conversation[0]["content"])
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in conversation)


def pair(prompt: str, one: tuple[Any, float], other: tuple[Any, float]) -> Row:
    """Return a row of the preferences table."""
    (chosen, high), (rejected, low) = sorted((one, other), key=lambda answer: -answer[1])
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "chosen_score": high, "rejected_score": low}


def main(kind: str, source: str, target: str) -> None:
    """Convert a file."""
    found = list({"pandalm": pandalm, "oasst": oasst}[kind](Path(source)))
    kept = [r for r in found if all(isinstance(r[side], str) and r[side].strip() for side in ("chosen", "rejected"))]
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    Path(target).write_text(lines, encoding="utf-8")
    print(
        f"{target}: {len(kept)} pairs over {len({row['prompt'] for row in kept})} prompts; {len(found) - len(kept)} left out"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
