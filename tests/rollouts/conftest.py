"""Small models on one thread."""

from tests.training.conftest import _one_thread  # noqa: F401
