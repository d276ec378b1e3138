"""Write rewards: several functions, a column of the rows, and an answer without a reward. Run: python examples/custom_reward.py"""

import posttrain as pt


def starts_right(prompts, completions, letter, **columns):
    """Return 1 if the answer starts with the row's letter, None (no reward) if it is empty."""
    return [float(text.startswith(wanted)) if text else None for text, wanted in zip(completions, letter, strict=True)]


def brief(prompts, completions, **columns):
    """Return a small penalty per character."""
    return [-0.01 * len(text) for text in completions]


if __name__ == "__main__":
    model = pt.tiny(seed=0, hidden_size=64, intermediate_size=128, layers=1)
    rows = [{"prompt": f"Say {letter}: ", "letter": letter} for letter in "ab"]
    rewards = {"starts_right": starts_right, "brief": brief}
    history = pt.train(
        model,
        "rloo",
        rows,
        reward=rewards,
        steps=20,
        learning_rate=1e-2,
        batch_size=4,
        samples=16,
        max_new_tokens=8,
        threads=1,
    )
    for name in rewards:
        print(f"{name}: {history[0][f'reward/{name}/mean']:.3f} before, {history[-1][f'reward/{name}/mean']:.3f} after")
