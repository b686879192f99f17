"""Rewards that ship with the project, one scorer a file; heavy imports stay inside the functions."""
