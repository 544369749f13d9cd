"""What is generated: prompts, padding, and the arguments of `generate`, the same for every architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .architectures import ARCHITECTURES, BOS, PAD, VOCABULARY, Architecture
from .weights import draw, draw_integers

# A large set of final tokens, so that rows of random models finish, and at different steps.
_ENDS = tuple(range(5, VOCABULARY, 17))
# The last tokens of the vocabulary mean images to models that see any, so prompts leave them out.
_SPECIAL = tuple(range(VOCABULARY - 4, VOCABULARY))
_IMAGE = _SPECIAL[-1]


@dataclass(frozen=True)
class Case:
    """One set of arguments.

    Attributes:
        lengths: prompt length of each row (of the encoder's input for an encoder-decoder); shorter rows are padded.
        options: arguments of `generate` besides α, k and the number of tokens, as JSON could hold them.
        decoder_prompt: length of the decoder's prompt, for encoder-decoders; 1 is the start token alone.
        only: architectures it is for, all when empty.
    """

    name: str
    lengths: tuple[int, ...]
    penalty_alpha: float = 0.6
    top_k: int = 4
    max_new_tokens: int = 32
    options: tuple[tuple[str, Any], ...] = ()
    decoder_prompt: int = 1
    only: tuple[str, ...] = ()

    def suits(self, entry: Architecture) -> bool:
        if self.only:
            return entry.name in self.only
        return self.decoder_prompt == 1 or entry.is_encoder_decoder

    def generate_arguments(self) -> dict[str, Any]:
        """Everything but the prompt and the decoding method: processors, ends and length, for any `generate`."""
        return {"max_new_tokens": self.max_new_tokens, "pad_token_id": PAD, **dict(self.options)}


_PROCESSORS = (
    ("repetition_penalty", 1.4),
    ("no_repeat_ngram_size", 2),
    # Padding among them: transformers 4 applied a repetition penalty to it, transformers 5 does not.
    (
        "bad_words_ids",
        [[PAD]] + [[token] for token in range(3, 120, 5)] + [[token, token + 1] for token in range(4, 120)],
    ),
)

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("single", (24,), max_new_tokens=40),
        Case("batch", (20, 20, 20)),
        Case("padded", (22, 13, 6)),
        Case("eos", (19, 12, 6), options=(("eos_token_id", _ENDS),)),
        Case("one_eos", (17, 9), options=(("eos_token_id", 27),), max_new_tokens=40),
        Case("min_length", (18, 11, 6), options=(("eos_token_id", _ENDS), ("min_new_tokens", 12))),
        Case("processors", (21, 10), options=_PROCESSORS),
        Case("processors_eos", (15, 15, 8), options=(*_PROCESSORS, ("eos_token_id", _ENDS), ("min_new_tokens", 9))),
        Case("alpha_0.1", (17, 13, 8, 6), penalty_alpha=0.1, max_new_tokens=40),
        Case("alpha_0.9", (16, 9), penalty_alpha=0.9),
        Case("alpha_1", (14, 9), penalty_alpha=1.0),
        Case("k=1", (15, 13, 11, 9, 8, 6), top_k=1),
        *(Case(f"k={k}", (15, 11), top_k=k, max_new_tokens=24) for k in (2, 3, 5, 6, 7, 8)),
        Case("decoder_prompt", (14, 9), decoder_prompt=6),
        # Past every block a history buffer could grow by.
        Case(
            "long",
            (30,),
            max_new_tokens=300,
            only=("gpt2", "mistral_window", "bloom", "t5", "gemma2", "llama_static"),
        ),
    )
}


def prompt_for(entry: Architecture | str, case: Case, seed: int) -> dict[str, torch.Tensor]:
    """The inputs of `generate` for one case, float32 and int64, by their names.

    Rows of a causal model are padded on the left, an encoder's on the right; there is no mask where nothing is padded.
    """
    entry = ARCHITECTURES[entry] if isinstance(entry, str) else entry
    rows, longest = len(case.lengths), max(case.lengths)
    name = f"{case.name}:{entry.kind}"
    inputs: dict[str, torch.Tensor] = {}
    if entry.kind == "speech":
        # The frames of two seconds at most; a shorter row is silence at its end, as a feature extractor pads it.
        frames = 2 * dict(entry.config[1])["max_source_positions"]
        features = draw(name, (rows, dict(entry.config[1])["num_mel_bins"], frames), seed)
        for row, length in enumerate(case.lengths):
            features[row, :, length * frames // longest :] = -1.0
        inputs["input_features"] = features
    else:
        ids = _tokens(name, (rows, longest), seed)
        mask = torch.zeros_like(ids)
        for row, length in enumerate(case.lengths):
            real = slice(0, length) if entry.is_encoder_decoder else slice(longest - length, longest)
            mask[row, real] = 1
        inputs["input_ids"] = torch.where(mask == 1, ids, PAD)
        if not bool(mask.all()):
            inputs["attention_mask"] = mask
        if entry.kind == "image-text":
            _add_images(entry, inputs, f"{name}:image", seed)
    if case.decoder_prompt > 1:
        ids = _tokens(f"{name}:decoder", (rows, case.decoder_prompt), seed)
        ids[:, 0] = BOS
        inputs["decoder_input_ids"] = ids
    return inputs


def _tokens(name: str, shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Ordinary tokens: no padding, no start, nothing that means an image."""
    return draw_integers(name, shape, seed, BOS + 1, _SPECIAL[0])


def _add_images(entry: Architecture, inputs: dict[str, torch.Tensor], name: str, seed: int) -> None:
    """Puts an image of four tokens before each row's last word. Rows have at least six tokens."""
    ids = inputs["input_ids"]
    ids[:, -5:-1] = _IMAGE
    if entry.name == "qwen2_vl":
        # Rows of an image are wider than they are high, or the other way round: positions in two directions differ.
        inputs["image_grid_thw"] = torch.tensor([[1, 2, 8] if row % 2 else [1, 4, 4] for row in range(len(ids))])
        inputs["pixel_values"] = draw(name, (16 * len(ids), 3 * 2 * 4 * 4), seed)
        inputs["mm_token_type_ids"] = (ids == _IMAGE).int()
        ids[:, -6] = entry.config[1]["vision_start_token_id"]  # by which older releases count a row's images
    else:
        inputs["pixel_values"] = draw(name, (len(ids), 3, 16, 16), seed)


def options_for(entry: Architecture, case: Case) -> dict[str, Any]:
    """Arguments of `generate` for one architecture and case."""
    options = case.generate_arguments()
    if entry.kind == "speech":
        # Whisper's own `generate` cuts as many tokens off the end as there are pad tokens anywhere in a row.
        options["suppress_tokens"] = [PAD]
    if entry.kind == "image-text":
        options["suppress_tokens"] = list(_SPECIAL)
    if entry.cache_implementation is not None:
        options["cache_implementation"] = entry.cache_implementation
    return options


def processors_for(entry: Architecture, case: Case, prompt_length: int) -> Any:
    """The processors that `generate` makes of a case's options, in its order, for a caller that is not `generate`."""
    from transformers import generation

    options = options_for(entry, case)
    ends = options.get("eos_token_id")
    ends = None if ends is None else torch.tensor(ends).reshape(-1)
    processors = generation.LogitsProcessorList()
    if "repetition_penalty" in options:
        processors.append(generation.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if "no_repeat_ngram_size" in options:
        processors.append(generation.NoRepeatNGramLogitsProcessor(options["no_repeat_ngram_size"]))
    if "bad_words_ids" in options:
        processors.append(generation.NoBadWordsLogitsProcessor(options["bad_words_ids"], eos_token_id=ends))
    if "min_new_tokens" in options:
        processors.append(
            generation.MinNewTokensLengthLogitsProcessor(prompt_length, options["min_new_tokens"], eos_token_id=ends)
        )
    if "suppress_tokens" in options:
        processors.append(generation.SuppressTokensLogitsProcessor(options["suppress_tokens"]))
    return processors
