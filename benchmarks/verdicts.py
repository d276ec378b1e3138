"""Measure how often the reward `answer` gives answers of models no verdict, or a wrong one.

    python benchmarks/verdicts.py ../shared/data/gsm8k/example_model_solutions.jsonl

The file is example_model_solutions.jsonl of github.com/openai/grade-school-math: answers of four models to 1,319 questions, each with the
judgement of its authors. An answer there ends with a line `A: 18`, which is written as each of FORMS in turn. A line of the table counts,
for one form and one extractor, the answers without a verdict and those whose verdict differs from the judgement.

Or a file of own answers, one object a line with `answer` and `gold`: then only answers without a verdict are counted.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from posttrain.rewards.extraction import EXTRACTS, equal, extracted

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
FORMS = {
    "####": "{reasons}\n#### {number}",
    "Answer:": "{reasons}\nAnswer: {number}",
    "box": "{reasons}\nSo it is $\\boxed{{{number}}}$.",
    "the answer is": "{reasons}. So the answer is {number}.",
}


class Judged(NamedTuple):
    """An answer in one form, its gold answer, and the authors' judgement; None without one."""

    form: str
    text: str
    gold: str
    is_correct: bool | None


def answers(path: Path) -> Iterator[Judged]:
    """Yield the answers of a file."""
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "ground_truth" not in record:
            yield Judged("as written", record["answer"], record["gold"], None)
            continue
        gold = record["ground_truth"].rpartition("A: ")[2].strip()
        for name in MODELS:
            reasons, _, number = record[name]["solution"].rpartition("\nA: ")
            if reasons:  # a solution of another shape was cut before its answer
                for form, text in FORMS.items():
                    yield Judged(form, text.format(reasons=reasons, number=number), gold, record[name]["is_correct"])


def measured(path: Path) -> dict[tuple[str, str], Counter[str]]:
    """Return the counts of each form and extractor: `answers`, `none` (no verdict), `differ` and `right`."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for judged in answers(path):
        for extract in EXTRACTS:
            found = extracted(judged.text, extract)
            right = found is not None and equal(found, judged.gold)
            differs = found is not None and judged.is_correct is not None and right != judged.is_correct
            counts.setdefault((judged.form, extract), Counter()).update(
                {"answers": 1, "none": found is None, "differ": differs, "right": right}
            )
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    print("| form | extractor | answers | right | no verdict | verdict differs |\n|---|---|---|---|---|---|")
    for (form, extract), count in measured(parser.parse_args().path).items():
        print(
            f"| {form} | {extract} | "
            + " | ".join(f"{count[n]:,}" for n in ("answers", "right", "none", "differ"))
            + " |"
        )


if __name__ == "__main__":
    main()
