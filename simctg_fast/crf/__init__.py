"""Conditional random fields that decode, sample, score and differentiate: the low-rank beam CRF, the tagger's linear
chain, and the classes that circulate under older names."""

from .drop_in import CRF as CRF
from .linear_chain import LinearChainCRF as LinearChainCRF
from .low_rank import LowRankCRF as LowRankCRF
from .published import StochasticViterbiSample as StochasticViterbiSample
from .published import StochasticViterbiSamples as StochasticViterbiSamples
from .results import Beam as Beam
from .results import KBest as KBest
from .results import LogProb as LogProb
from .results import Marginals as Marginals
from .results import Sample as Sample
from .results import TagPath as TagPath
from .results import TagPaths as TagPaths
from .results import TagSample as TagSample
from .results import ViterbiPath as ViterbiPath
