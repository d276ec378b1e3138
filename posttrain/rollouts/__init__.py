"""Sampling from the policy: prompts in; token ids, log-probabilities and finish reasons out."""
