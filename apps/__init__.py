"""Application layer: registry, command line, evaluation, reports. Only this package imports everything."""
