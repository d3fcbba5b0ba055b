"""Each paper's algorithm, readable beside its pseudo-code."""
