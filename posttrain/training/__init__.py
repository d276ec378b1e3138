"""One trainer for every objective: exactly normalised, deterministic, resumable."""
