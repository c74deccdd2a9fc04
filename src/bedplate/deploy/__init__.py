"""Bundles on many machines."""
