"""Benchmarks of jaxnorm: `python -m benchmarks.compare` and others, from the root of the repository."""
