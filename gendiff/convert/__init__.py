"""Public PyTorch checkpoints -> Flax parameters; the only folder that knows PyTorch."""
