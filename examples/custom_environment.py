"""Define an environment (rows and judge together) and train in it. Run: python examples/custom_environment.py"""

import random

import posttrain as pt


def rows(kind, count, seed):
    """Return rows that ask to repeat a letter; every table has its own random stream."""
    rng = random.Random(f"repeat/{kind}/{seed}")
    letters = [rng.choice("xyz") for _ in range(count)]
    return [{"prompt": f"Repeat {letter}: ", "answer": letter} for letter in letters]


def judge(completion, answer):
    """Return the share of characters that are the asked letter."""
    return completion.count(answer) / max(1, len(completion))


REPEAT = pt.register(pt.Environment("repeat", rows, judge))

if __name__ == "__main__":
    model = pt.tiny(seed=0, hidden_size=64, intermediate_size=128, layers=1)
    task = pt.environment("repeat")
    history = pt.train(
        model,
        "grpo",
        task.rows("problems", 12, 0),
        reward=task.reward,
        steps=20,
        learning_rate=1e-2,
        batch_size=4,
        threads=1,
    )
    print(f"reward: {history[0]['reward/total/mean']:.3f} before, {history[-1]['reward/total/mean']:.3f} after")
