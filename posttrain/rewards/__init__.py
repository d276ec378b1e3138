"""Rewards: functions of prompts and completions, and the reward model, behind one interface."""
