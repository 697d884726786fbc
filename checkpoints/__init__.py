"""Weights in and out: key maps, hub resolution, safetensors, Lightning checkpoints, model cards."""
