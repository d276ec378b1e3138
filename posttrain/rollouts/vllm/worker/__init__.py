"""Code that runs inside vLLM's workers, in vLLM's own environment: this folder is on their PYTHONPATH, and nothing else of the project."""
