"""The makers of constraints against grammars: a sequence of tags is allowed if and only if it is one of whole spans."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from simctg_fast import LinearChainCRF
from simctg_fast.crf.constraints import bilou, bio, bioes, bmes

TYPES = ("x", "y")
# One span, of type %s or of none, with every tag in angle brackets.
SPANS = {
    bio: ("BI", "<B%s>(<I%s>)*"),
    bioes: ("BIES", "<S%s>|<B%s>(<I%s>)*<E%s>"),
    bilou: ("BILU", "<U%s>|<B%s>(<I%s>)*<L%s>"),
    bmes: ("BMES", "<S%s>|<B%s>(<M%s>)*<E%s>"),
}


def grammar(span: str, suffixes, outside) -> re.Pattern:
    spans = [span.replace("%s", suffix) for suffix in suffixes] + [f"<{re.escape(tag)}>" for tag in outside]
    return re.compile("|".join(f"(?:{one})" for one in spans)), re.compile(f"(?:{'|'.join(spans)})*")


@pytest.mark.parametrize("maker", list(SPANS))
@pytest.mark.parametrize("typed", [True, False])
def test_every_sequence(maker, typed):
    letters, span = SPANS[maker]
    suffixes = [f"-{kind}" for kind in TYPES] if typed else [""]
    outside = ["O", "[PAD]"]
    tags = [outside[0], *[letter + suffix for suffix in suffixes for letter in letters], outside[1]]
    allowed = maker(tags, outside=outside)
    _, whole = grammar(span, suffixes, outside)
    for length in (1, 2, 3, 4):
        for path in itertools.product(range(len(tags)), repeat=length):
            ours = bool(
                allowed["allowed_start"][path[0]]
                and allowed["allowed_end"][path[-1]]
                and all(allowed["allowed_transitions"][a, b] for a, b in itertools.pairwise(path))
            )
            assert ours == bool(whole.fullmatch("".join(f"<{tags[i]}>" for i in path))), [tags[i] for i in path]


def test_decoded_tags_are_whole_spans():
    tags = ["O", *[f"{letter}-{kind}" for kind in TYPES for letter in "BI"]]
    crf = LinearChainCRF(len(tags), **bio(tags))
    _, whole = grammar(SPANS[bio][1], ["-x", "-y"], ["O"])
    emissions, lengths = 5 * torch.randn(64, 12, 5), torch.randint(1, 13, (64,))

    def spelled(path):
        return "".join(f"<{tags[i]}>" for i in path if i >= 0)

    paths = crf.viterbi(emissions, lengths).tags.tolist()
    drawn = crf.sample(emissions, lengths, num_samples=5).tags.transpose(1, 2).flatten(0, 1).tolist()
    assert all(whole.fullmatch(spelled(path)) for path in paths + drawn)
    free = crf.constrain().viterbi(emissions, lengths).tags.tolist()
    assert not all(whole.fullmatch(spelled(path)) for path in free)


def test_what_is_allowed_moves_with_the_crf_and_stays_out_of_its_checkpoints():
    crf = LinearChainCRF(3, **bio({0: "O", 1: "B", 2: "I"}))
    plain = LinearChainCRF(3)
    plain.load_state_dict(crf.state_dict())
    crf.load_state_dict(plain.state_dict())
    emissions = torch.zeros(1, 3, 3)
    emissions[0, :, 2] = 5  # only I
    assert plain.viterbi(emissions).tags.tolist() == [[2, 2, 2]]
    assert crf.viterbi(emissions).tags.tolist() == [[1, 2, 2]]
    assert crf.double().viterbi(emissions).tags.tolist() == [[1, 2, 2]]
    assert plain.constrain(**bio(["O", "B", "I"])).viterbi(emissions).tags.tolist() == [[1, 2, 2]]
    assert "allowed_transitions" in repr(crf)
    assert crf._forbidden_start.to("meta").device.type == crf.to("meta")._forbidden_start.device.type


@pytest.mark.parametrize(
    ("maker", "tags", "pattern"),
    [
        (bio, [], "tags is empty"),
        (bio, "O", "tags is 'O', must be a sequence"),
        (bio, ["O", 3], r"tags\[1\] is 3, must be a string"),
        (bio, ["O", "B-x", "O"], r"tags\[2\] is 'O', as tags\[0\] is"),
        (bio, {1: "O"}, r"tags has the keys \[1\], must be the indices 0..0"),
        (bio, ["O", "E-x"], "tags holds 'E-x'; a tag of BIO is one of B, I"),
        (bio, ["O", "B-"], "tags holds 'B-'"),
        (bio, ["O", "BB-x"], "tags holds 'BB-x'"),
        (bio, ["O", "[PAD]"], r"tags holds '\[PAD\]'"),
        (bio, ["O", "I-x"], "tags holds 'I-x' but no 'B-x'"),
        (bioes, ["O", "B-x", "I-x"], "tags holds 'B-x' but no 'E-x'"),
        (bioes, ["O", "S-x", "E-x"], "tags holds 'E-x' but no 'B-x'"),
        (bilou, ["O", "B-x", "L-y"], "tags holds 'B-x' but no 'L-x'"),
        (bmes, ["B", "M"], "tags holds 'B' but no 'E'"),
    ],
)
def test_what_is_refused(maker, tags, pattern):
    with pytest.raises((TypeError, ValueError), match=pattern):
        maker(tags)
