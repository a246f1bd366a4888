"""Rollouts: plain and truncated sampling in one jitted loop over lanes."""
