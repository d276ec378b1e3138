"""Define two tasks for a study of forgetting: additions and reversed words in one table, and only the reversed words.

evaluation:
  second_task: {source: "examples.two_tasks:REVERSE", rows: 200}
"""

import random

import posttrain as pt

LETTERS = "abcdefgh"


def reversed_words(kind, count, seed):
    """Return rows that ask for a word of four letters from its end; every table has its own random stream."""
    rng = random.Random(f"reverse/{kind}/{seed}")
    words = ["".join(rng.choice(LETTERS) for _ in range(4)) for _ in range(count)]
    return [{"prompt": f"{word}<", "completion": word[::-1], "answer": word[::-1]} for word in words]


def judge(completion, answer):
    """Return 1 if the completion is the reversed word, else 0."""
    return float(completion.strip() == answer)


def both(kind, count, seed):
    """Return demonstrations of both tasks in turn. 65 % of the additions are wrong."""
    sums = pt.environment("arithmetic").rows(kind, count - count // 2, seed, terms=2, max_term=99, careless=0.65)
    words = reversed_words(kind, count // 2, seed)
    return [row for pair in zip(sums, words, strict=False) for row in pair] + sums[len(words) :]


REVERSE = pt.Environment("reverse", reversed_words, judge)
BOTH = pt.Environment("two_tasks", both, pt.environment("arithmetic").judge)
