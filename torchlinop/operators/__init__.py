"""Curvature matrices as operators, and what can be built from them."""
