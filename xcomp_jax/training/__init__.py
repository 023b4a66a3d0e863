"""Supervised compression tuning: the loop, its step, its checkpoints, what it reports."""
