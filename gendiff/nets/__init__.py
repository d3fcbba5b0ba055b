"""Flax modules, one architecture a file; the only folder that imports Flax."""
