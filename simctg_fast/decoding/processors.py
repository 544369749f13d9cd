"""What ``generate`` puts into the list of logits processors that contrastive search must not apply."""

from __future__ import annotations

import logging

from transformers.generation import logits_process
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList

logger = logging.getLogger("simctg_fast")

# warper class -> (its attribute, the field of the configuration that it was made from)
_SAMPLING_WARPERS = {
    "TemperatureLogitsWarper": ("temperature", "temperature"),
    "TopKLogitsWarper": ("top_k", "top_k"),
    "TopPLogitsWarper": ("top_p", "top_p"),
    "TopHLogitsWarper": ("top_h", "top_h"),
    "MinPLogitsWarper": ("min_p", "min_p"),
    "TypicalLogitsWarper": ("mass", "typical_p"),
    "EpsilonLogitsWarper": ("epsilon", "epsilon_cutoff"),
    "EtaLogitsWarper": ("epsilon", "eta_cutoff"),
}


def without_sampling_warpers(processors: LogitsProcessorList, config: GenerationConfig) -> LogitsProcessorList:
    """``processors`` less the warpers that ``generate`` adds for ``do_sample=True``, with one warning if any.

    A warper that the caller passed in stays, unless it equals the one the configuration asks for.
    """
    if not config.do_sample:
        return processors
    kept, dropped = LogitsProcessorList(), []
    for processor in processors:
        attribute, field = _SAMPLING_WARPERS.get(type(processor).__name__, ("", ""))
        ours = bool(attribute) and type(processor).__module__ == logits_process.__name__
        if ours and _same(getattr(processor, attribute, None), getattr(config, field, None)):
            dropped.append(f"{field}={getattr(config, field)}")
        else:
            kept.append(processor)
    if dropped:
        logger.warning(
            "contrastive search ranks the model's own probabilities: the sampling settings of do_sample=True (%s) are "
            "not applied. For random choices pass ContrastiveSearch(temperature=..., generator=...).",
            ", ".join(dropped),
        )
    return kept


def _same(value, configured) -> bool:
    if value is None or configured is None:
        return value is configured
    return abs(float(value) - float(configured)) < 1e-6
