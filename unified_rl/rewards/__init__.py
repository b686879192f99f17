"""Rewards: found by name, run where they can be killed, local or behind HTTP, and made one number a sample."""
