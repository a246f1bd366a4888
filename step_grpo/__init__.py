"""Step-GRPO in JAX: truncated rollouts, step-aware rewards and GRPO updates for reasoning models."""

__version__ = "0.1.0"
