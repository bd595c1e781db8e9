"""Dense oracles and problems with known answers, for tests of operators and solvers."""
