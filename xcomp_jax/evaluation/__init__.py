"""Benchmarks as released: their questions, answers on disk, scores, needles, lmms-eval."""
