"""Rewards: functions of prompts and completions, and the reward model, behind one interface."""

BUILT_IN_NAMES = ("answer", "math", "mentions", "length", "regex", "format")
"""What params.yaml may name without an import path, besides `reward_model`; the functions are in rewards/functions.py."""
