"""Benchmarks against gradients and peers; ``python -m torchlinop.bench gpu --out DIR``."""
