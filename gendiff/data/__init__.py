"""Data sets, one a file, each with a small embedded default."""
