"""Reading, describing and serving PDE trajectories."""
