"""Operators handed to other numerical libraries, and theirs to ours."""
