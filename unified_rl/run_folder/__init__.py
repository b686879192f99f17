"""A run's folder: what is written for people and what a run goes on from, exactly."""
