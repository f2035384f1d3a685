"""Judging models: benchmarks through lm-eval, perplexity of a text, speed and memory, kept in one `scores.json`."""
