"""Baselines trained by the same command as Poseidon."""
