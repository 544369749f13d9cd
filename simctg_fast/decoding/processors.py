"""What ``generate`` puts into the list of logits processors that contrastive search must not apply."""

from __future__ import annotations

import logging
import sys
from typing import Any

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


_DEFAULTS = {"top_k": 50, "temperature": 1.0, "top_p": 1.0}  # of transformers


def without_sampling_warpers(
    processors: LogitsProcessorList,
    config: GenerationConfig,
    checkpoint: GenerationConfig,
    search: Any,
    candidates: int,
) -> LogitsProcessorList:
    """``processors`` less the warpers that ``generate`` adds for ``do_sample=True``. One warning if that ignores what
    somebody typed: not what the ``checkpoint`` says of itself, nor what transformers' pipelines set, nor ``do_sample``
    where the ``search`` is random as it was asked for, nor a ``top_k`` that is the number of ``candidates``.

    A warper that the caller passed in stays, unless it equals the one the configuration asks for.
    """
    if not config.do_sample:
        return processors
    kept, dropped = LogitsProcessorList(), []
    for processor in processors:
        attribute, field = _SAMPLING_WARPERS.get(type(processor).__name__, ("", ""))
        ours = bool(attribute) and type(processor).__module__ == logits_process.__name__
        if ours and _same(getattr(processor, attribute, None), getattr(config, field, None)):
            if field != "top_k" or config.top_k != candidates:
                dropped.append(field)
        else:
            kept.append(processor)
    typed = [field for field in dropped if _was_typed(field, config, checkpoint)]
    if typed or (not search.is_random and _was_typed("do_sample", config, checkpoint)):
        said = ", ".join(f"{field}={getattr(config, field)}" for field in (dropped if not search.is_random else typed))
        advice = "" if search.is_random or not search.random_by else f" For random choices pass {search.random_by}."
        logger.warning(
            "%s ranks the model's own probabilities: the sampling settings of do_sample=True%s are not applied.%s",
            search.name,
            f" ({said})" if said else "",
            advice,
        )
    return kept


def _was_typed(field: str, config: GenerationConfig, checkpoint: GenerationConfig) -> bool:
    """Whether a setting is neither the checkpoint's, nor a default of transformers or of its pipelines."""
    pipelines = sys.modules.get("transformers.pipelines.text_generation")
    defaults = getattr(getattr(pipelines, "TextGenerationPipeline", None), "_default_generation_config", None)
    if defaults is not None and not _same(config.temperature, defaults.temperature):
        defaults = None  # no pipeline's call, or one that chose another
    value = getattr(config, field, None)
    known = [getattr(checkpoint, field, None), getattr(defaults, field, None), _DEFAULTS.get(field)]
    return not any(_same(value, other) for other in known if other is not None)


def _same(value, configured) -> bool:
    if value is None or configured is None:
        return value is configured
    return abs(float(value) - float(configured)) < 1e-6
