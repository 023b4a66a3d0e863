"""Worlds of synthetic videos whose answers are known."""
