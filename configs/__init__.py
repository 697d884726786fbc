"""Shipped YAML: one folder per app, plus trainer overlays. Data only."""
