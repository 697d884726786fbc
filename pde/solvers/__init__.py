"""Solvers that generate PDE data in the published layout."""
