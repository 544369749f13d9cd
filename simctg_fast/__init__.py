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
    from .decoding.contrastive_search import ContrastiveSearch as ContrastiveSearch
    from .decoding.contrastive_search import contrastive_search as contrastive_search
    from .decoding.patch import patch_transformers as patch_transformers
    from .decoding.patch import unpatch_transformers as unpatch_transformers
    from .decoding.report import SupportReport as SupportReport
    from .decoding.support import support as support
    from .engine.engine import Engine as Engine
    from .functional import contrastive_loss as contrastive_loss
    from .functional import cosine_similarity_matrix as cosine_similarity_matrix
    from .functional import simcse_sup_loss as simcse_sup_loss
    from .functional import simcse_unsup_loss as simcse_unsup_loss
    from .functional import viterbi_backtrace as viterbi_backtrace
    from .losses import SimCSELoss as SimCSELoss
    from .losses import SimCTGLoss as SimCTGLoss
    from .ops import backend_info as backend_info
    from .plain import generate as generate
    from .text.contrastive_generator import ContrastiveGenerator as ContrastiveGenerator
    from .text.features import extract_features as extract_features

__version__ = "0.1.0"

# Public name -> the module that defines it.
_EXPORTS = {
    "ContrastiveGenerator": "simctg_fast.text.contrastive_generator",
    "ContrastiveSearch": "simctg_fast.decoding",
    "Engine": "simctg_fast.engine",
    "LinearChainCRF": "simctg_fast.crf",
    "LowRankCRF": "simctg_fast.crf",
    "SimCSELoss": "simctg_fast.losses",
    "SimCTGLoss": "simctg_fast.losses",
    "StochasticViterbiSample": "simctg_fast.crf",
    "StochasticViterbiSamples": "simctg_fast.crf",
    "SupportReport": "simctg_fast.decoding",
    "T5SimCTGGenerate": "simctg_fast.compat",
    "backend_info": "simctg_fast.ops",
    "bundled_model_path": "simctg_fast.assets",
    "compute_contrastive_loss": "simctg_fast.compat",
    "contrastive_loss": "simctg_fast.functional",
    "contrastive_search": "simctg_fast.decoding",
    "cosine_similarity_matrix": "simctg_fast.functional",
    "extract_features": "simctg_fast.text.features",
    "generate": "simctg_fast.plain",
    "patch_transformers": "simctg_fast.decoding",
    "simcse_sup_loss": "simctg_fast.functional",
    "simcse_unsup_loss": "simctg_fast.functional",
    "support": "simctg_fast.decoding",
    "t5_cosine_simirality": "simctg_fast.compat",
    "t5_cosine_similarity": "simctg_fast.compat",
    "unpatch_transformers": "simctg_fast.decoding",
    "viterbi_backtrace": "simctg_fast.functional",
}
_SUBMODULES = ("assets", "crf", "decoding", "engine", "functional", "losses", "ops", "plain")

__all__ = ["__version__", *_EXPORTS]


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
