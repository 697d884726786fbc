"""PDE foundation models: data, solvers, networks, training modules and metrics."""
