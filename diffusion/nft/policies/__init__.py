"""Policies as a LightningModule."""
