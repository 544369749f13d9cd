"""The strategies' names, by what goes for them; nothing is imported here, so that the command line may ask at once."""

from __future__ import annotations

CONTRASTIVE = ("contrastive", "stochastic-contrastive")
FSD = ("fsd", "fsd-vec")  # by n-grams, by states
STRATEGIES = ("contrastive", "greedy", "sample", "stochastic-contrastive", *FSD, "adaptive", "guard")
RANDOM = ("sample", "stochastic-contrastive", "guard")
TOGETHER = ("greedy", "sample", *FSD, "guard")  # one row a token each: lines of one run may differ among them
