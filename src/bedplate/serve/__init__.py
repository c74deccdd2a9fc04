"""A server of bundles: every adapter is a model (`bedplate serve`)."""
