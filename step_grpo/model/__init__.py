"""Qwen3 and Qwen2 in Flax, their cache, and their Hugging Face weights."""
