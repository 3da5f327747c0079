"""Benchmarks that print ratios: each figure has a baseline from the same run, interleaved, by medians."""
