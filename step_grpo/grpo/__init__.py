"""Advantages, log-probs, loss and update."""
