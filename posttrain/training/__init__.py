"""One trainer for all objectives: exact normalisation, deterministic, resumable."""
