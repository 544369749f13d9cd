"""Metrics that run a model. Nothing here downloads one: models come loaded, or from a folder."""
