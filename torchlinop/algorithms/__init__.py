"""Questions asked of a matrix that is known by its products."""
