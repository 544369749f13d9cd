"""Fast contrastive search, contrastive training and a low-rank CRF for PyTorch and Hugging Face models.

The public names live here and are loaded on first use: ``import simctg_fast`` imports neither transformers nor triton
and does not touch CUDA.
"""

from __future__ import annotations

import importlib
import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .assets import bundled_model_path as bundled_model_path
    from .compat import T5SimCTGGenerate as T5SimCTGGenerate
    from .compat import compute_contrastive_loss as compute_contrastive_loss
    from .compat import t5_cosine_similarity as t5_cosine_similarity
    from .compat import t5_cosine_simirality as t5_cosine_simirality
    from .crf import LinearChainCRF as LinearChainCRF
    from .crf import LowRankCRF as LowRankCRF
    from .crf import StochasticViterbiSample as StochasticViterbiSample
    from .crf import StochasticViterbiSamples as StochasticViterbiSamples
    from .decoding.adaptive import AdaptiveContrastiveSearch as AdaptiveContrastiveSearch
    from .decoding.contrastive_search import ContrastiveSearch as ContrastiveSearch
    from .decoding.contrastive_search import contrastive_search as contrastive_search
    from .decoding.dry import DRYLogitsProcessor as DRYLogitsProcessor
    from .decoding.fsd import FSD as FSD
    from .decoding.guard import GUARD as GUARD
    from .decoding.patch import patch_transformers as patch_transformers
    from .decoding.patch import unpatch_transformers as unpatch_transformers
    from .decoding.report import SupportReport as SupportReport
    from .decoding.support import support as support
    from .engine.engine import Engine as Engine
    from .functional import contraclm_token_loss as contraclm_token_loss
    from .functional import contrastive_loss as contrastive_loss
    from .functional import cosine_regularization as cosine_regularization
    from .functional import cosine_similarity_matrix as cosine_similarity_matrix
    from .functional import simcse_sup_loss as simcse_sup_loss
    from .functional import simcse_unsup_loss as simcse_unsup_loss
    from .functional import viterbi_backtrace as viterbi_backtrace
    from .losses import ContraCLMTokenLoss as ContraCLMTokenLoss
    from .losses import CosReg as CosReg
    from .losses import SimCSELoss as SimCSELoss
    from .losses import SimCTGLoss as SimCTGLoss
    from .ops import backend_info as backend_info
    from .plain import generate as generate
    from .text.contrastive_generator import ContrastiveGenerator as ContrastiveGenerator
    from .text.features import extract_features as extract_features

__version__ = "0.1.0"

# Module -> the public names that it defines.
_MODULES = {
    "assets": ("bundled_model_path",),
    "compat": ("T5SimCTGGenerate", "compute_contrastive_loss", "t5_cosine_simirality", "t5_cosine_similarity"),
    "crf": ("LinearChainCRF", "LowRankCRF", "StochasticViterbiSample", "StochasticViterbiSamples"),
    "decoding": (
        *("ContrastiveSearch", "AdaptiveContrastiveSearch", "FSD", "GUARD", "DRYLogitsProcessor"),
        *("SupportReport", "contrastive_search", "support"),
        *("patch_transformers", "unpatch_transformers"),
    ),
    "engine": ("Engine",),
    "functional": (
        *("contraclm_token_loss", "contrastive_loss", "cosine_regularization", "cosine_similarity_matrix"),
        *("simcse_sup_loss", "simcse_unsup_loss", "viterbi_backtrace"),
    ),
    "losses": ("ContraCLMTokenLoss", "CosReg", "SimCSELoss", "SimCTGLoss"),
    "ops": ("backend_info",),
    "plain": ("generate",),
    "text.contrastive_generator": ("ContrastiveGenerator",),
    "text.features": ("extract_features",),
}
_EXPORTS = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}
_SUBMODULES = ("assets", "crf", "decoding", "engine", "functional", "losses", "ops", "plain")

__all__ = ["__version__", *sorted(_EXPORTS)]


def _find_kernels() -> None:
    """In a plain checkout the kernels are beside this folder, not in it: look for `simctg_fast.kernels` there too."""
    here = pathlib.Path(__file__).resolve().parent
    if not (here / "kernels").exists() and (here.parent / "kernels" / "__init__.py").is_file():
        __path__.append(str(here.parent))


_find_kernels()


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return _load(f"{__name__}.{name}")
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _load(_EXPORTS[name])
    if not hasattr(module, name):
        raise ImportError(f"{module.__name__} does not define {name!r}", name=module.__name__)
    value = globals()[name] = getattr(module, name)
    return value


def _load(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except AttributeError as error:
        # `from simctg_fast import name` and hasattr() would turn it into "no such name" and hide the cause.
        raise ImportError(f"importing {module} failed: {error}", name=module) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS, *_SUBMODULES})
