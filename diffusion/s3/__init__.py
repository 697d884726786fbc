"""Search for the best solver schedule of a model (Liu et al. 2024, arXiv 2312.07243)."""
