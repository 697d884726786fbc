"""Shared optimizer core: configuration, parameter groups and schedules on top of torch alone."""
