"""Benchmarks of a bundle's engine against other libraries: the results, the comparison, and the process of a contender."""
