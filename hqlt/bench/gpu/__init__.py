"""Benchmarks of the kernels on a CUDA device: cases in order of importance, within a budget of time."""
