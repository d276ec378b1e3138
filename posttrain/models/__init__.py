"""Policies, critics and reward models on top of transformers, and a tiny model that is built from a seed."""
