"""Compares every stage with recorded outputs of the official code."""
