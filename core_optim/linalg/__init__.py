"""Linear algebra of the matrix rules, as pure functions."""
