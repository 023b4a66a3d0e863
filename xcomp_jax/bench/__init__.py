"""Measures how fast every part is, beside what the device could do."""
