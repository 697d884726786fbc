"""One file per algorithm, each a rule for the engine."""
