"""The low-rank beam CRF: decode, sample, score, differentiate; and the classes that circulate under older names."""

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
from .results import ViterbiPath as ViterbiPath
