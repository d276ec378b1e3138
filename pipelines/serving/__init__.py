"""Serve models over an OpenAI-compatible interface, with the project's own sampling."""
