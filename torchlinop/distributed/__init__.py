"""Vectors, products and solvers over the ranks of a process group."""
