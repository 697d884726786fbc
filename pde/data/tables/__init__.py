"""The published data sets, one table per family of equations."""
