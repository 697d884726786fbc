"""Rewards of images: one small interface, a registry of names, weighted sums, workers, and servers."""
