"""Contrastive search for Hugging Face models."""

from .adaptive import AdaptiveContrastiveSearch
from .contrastive_search import ContrastiveSearch, contrastive_search
from .dry import DRYLogitsProcessor
from .fsd import FSD
from .guard import GUARD
from .patch import patch_transformers, unpatch_transformers
from .report import Check, SupportReport
from .support import support

__all__ = [
    "FSD",
    "GUARD",
    "AdaptiveContrastiveSearch",
    "Check",
    "ContrastiveSearch",
    "DRYLogitsProcessor",
    "SupportReport",
    "contrastive_search",
    "patch_transformers",
    "support",
    "unpatch_transformers",
]
