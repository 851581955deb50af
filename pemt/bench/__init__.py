"""Measurements: what the op and a training step cost beside what they could cost."""
