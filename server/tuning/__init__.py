"""Tuning: from a file of examples to a served delta, on the engine's own weights."""
