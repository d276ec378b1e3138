"""Losses and their parts as pure functions of tensors. Every loss returns sums; denominators are counted by the trainer."""
