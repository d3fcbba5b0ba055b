"""Metrics: arrays in, estimates with intervals out."""
