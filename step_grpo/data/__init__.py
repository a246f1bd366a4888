"""Questions: sources, prompts, and the built-in arithmetic."""
