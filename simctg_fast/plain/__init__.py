"""Generation for plain PyTorch models: ``simctg_fast.generate`` and its three protocols of a step."""

from .loop import generate

__all__ = ["generate"]
