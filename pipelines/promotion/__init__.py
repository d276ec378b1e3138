"""Promotion of a trained model: the gate's decision, its page, and the registry's aliases."""
