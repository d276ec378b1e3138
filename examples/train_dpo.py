"""Train a tiny model with DPO on preference pairs. Run: python examples/train_dpo.py"""

import posttrain as pt

if __name__ == "__main__":
    sums = [(a, b) for a in range(10) for b in range(10)]
    pairs = [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1)} for a, b in sums]
    model = pt.tiny(seed=0, hidden_size=64, intermediate_size=128, layers=1)
    history = pt.train(model, "dpo", pairs, steps=60, learning_rate=1e-3, batch_size=25, threads=1)
    first, last = history[0], history[-1]
    print(f"loss: {first['loss']:.2f} before, {last['loss']:.2f} after")
    print(f"accuracy of the preferences: {last['preference/accuracy']:.2f}")
