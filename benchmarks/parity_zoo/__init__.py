"""Tiny random models of many architectures, and the generation cases they are compared on.

Shared by `benchmarks/parity.py` and the tests. Nothing is downloaded: configurations are written here and weights are
drawn from a seeded generator, parameter by parameter, so that any process can build the very same model.
"""

from .architectures import ARCHITECTURES, Architecture, build
from .cases import CASES, Case, options_for, processors_for, prompt_for
from .run import ours, prompt_length, reference

__all__ = [
    "ARCHITECTURES",
    "CASES",
    "Architecture",
    "Case",
    "build",
    "options_for",
    "ours",
    "processors_for",
    "prompt_for",
    "prompt_length",
    "reference",
]
