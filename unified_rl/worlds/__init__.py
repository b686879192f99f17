"""Small worlds with exact answers, for tests, quickstarts and benchmarks."""
