"""Environments with a verifiable answer: one file each, with rows, answer and judge."""
