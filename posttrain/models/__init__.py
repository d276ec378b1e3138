"""Policies, critics and reward models on top of transformers, and the tiny one that is built from a seed."""
