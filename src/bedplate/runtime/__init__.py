"""Run bundles: programs, sessions, sampling. Imports no torch."""
