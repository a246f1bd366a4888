"""Benchmarks, each a command that prints a table and, as its last line, one JSON object."""
