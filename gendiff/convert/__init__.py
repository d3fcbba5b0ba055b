"""Conversion of public PyTorch checkpoints to Flax parameters; only this folder imports PyTorch."""
