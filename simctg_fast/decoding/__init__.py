"""Contrastive search for Hugging Face models."""

from .contrastive_search import ContrastiveSearch, contrastive_search
from .dry import DRYLogitsProcessor
from .patch import patch_transformers, unpatch_transformers
from .report import Check, SupportReport
from .support import support

__all__ = [
    "Check",
    "ContrastiveSearch",
    "DRYLogitsProcessor",
    "SupportReport",
    "contrastive_search",
    "patch_transformers",
    "support",
    "unpatch_transformers",
]
