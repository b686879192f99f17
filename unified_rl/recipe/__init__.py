"""Recipes: every key and what it means, presets, what makes no sense, what a resolved recipe will do. No torch here."""
