"""Benchmarks, each a command whose last line is one JSON object."""
