"""Reinforcement learning for any diffusers pipeline and any transformers generator, with one trainer."""

__version__ = "0.1.0"
