"""Tiny random instances of diffusers' pipelines, built from configs alone: no download, no file."""
