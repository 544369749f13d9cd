"""The page of an evaluation: one HTML file that asks for nothing."""

from .page import render

__all__ = ["render"]
