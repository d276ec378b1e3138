"""Evaluation of a policy: its answers, and statistics over them."""
