"""Contrastive search for Hugging Face models."""

from .contrastive_search import ContrastiveSearch, contrastive_search
from .patch import patch_transformers, unpatch_transformers
from .support import Check, SupportReport, support

__all__ = [
    "Check",
    "ContrastiveSearch",
    "SupportReport",
    "contrastive_search",
    "patch_transformers",
    "support",
    "unpatch_transformers",
]
