"""Benchmarks that print ratios: every figure comes with its baseline, measured in the same run, interleaved, medians."""
