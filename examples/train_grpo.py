"""Train a tiny model with GRPO on your own reward. Run: python examples/train_grpo.py"""

import posttrain as pt


def digits(prompts, completions, **columns):
    """Return the share of digits in each answer."""
    return [sum(map(str.isdigit, text)) / max(1, len(text)) for text in completions]


if __name__ == "__main__":
    model = pt.tiny(seed=0, hidden_size=64, intermediate_size=128, layers=1)
    prompts = ["Count: ", "Dial: ", "My number is ", "Add these: "]
    history = pt.train(
        model,
        "grpo",
        prompts,
        reward=digits,
        steps=40,
        learning_rate=1e-2,
        batch_size=4,
        samples=16,
        max_new_tokens=16,
        threads=1,
    )
    print(f"reward: {history[0]['reward/total/mean']:.2f} before, {history[-1]['reward/total/mean']:.2f} after")
    print(f"answer: {model.generate(['Dial: '], max_new_tokens=16)[0]!r}")
