"""Diffusion and flow-matching models: samplers, search, fine-tuning."""
