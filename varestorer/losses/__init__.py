"""Losses: pure functions of tensors, and the few networks that a loss needs."""
