"""Losses and their parts as pure functions of tensors. Every loss returns sums; the trainer counts the denominators."""
