"""Post-training of language models: objectives, trainer, rollouts, evaluation. Knows only text and tensors."""

__version__ = "0.2.0"
