"""Application layer: registry, command line, evaluation and reports. The only package that imports everything."""
