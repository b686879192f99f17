"""A run as one static page."""
