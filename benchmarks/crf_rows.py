"""What `crf.py` times: for every row our code, the codes it is compared with, and a check that they agree.

A row is a function of the sizes and returns providers by name, ours first; it raises an AssertionError where results
differ. Beam selection is included for everybody unless the row says otherwise.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))
from simctg_fast import LinearChainCRF, LowRankCRF, StochasticViterbiSamples
from simctg_fast.crf.constraints import bio
from simctg_fast.ops.crf_beam import crf_beam_select
from simctg_fast.reference import crf as reference

B, T, V, K, D = 8, 97, 30000, 256, 32
OURS = "simctg_fast"

Providers = dict[str, Callable[[], object]]


class Sizes:
    def __init__(self, batch=B, length=T, vocabulary=V, beam=K, rank=D, device="cpu") -> None:
        torch.manual_seed(0)
        self.crf = LowRankCRF(vocabulary, rank, beam).to(device)
        self.beam, self.device = beam, torch.device(device)
        self.emissions = torch.randn(batch, length, vocabulary, device=device)
        self.targets = torch.randint(vocabulary, (batch, length), device=device)
        self.left, self.right = self.crf.E1.weight, self.crf.E2.weight
        self.published = StochasticViterbiSamples(vocabulary, rank, beam).to(device)
        self.published.load_state_dict(self.crf.state_dict())


def optional(name: str):
    """A peer, or None where it is not installed or does not work with this torch."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # an extension of another torch fails with all kinds of errors
        print(f"{name} is left out: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def torbi_operator() -> Callable[..., torch.Tensor] | None:
    """torbi's compiled operator, without the audio packages that `import torbi` wants."""
    found = importlib.util.find_spec("torbi")
    if found is None or not found.submodule_search_locations:
        print("torbi is left out: it is not installed", file=sys.stderr)
        return None
    libraries = sorted(Path(found.submodule_search_locations[0]).glob("_C*.so"))
    # Wheels hold a library for every torch they were built for, a build from source has one.
    version = "".join(torch.__version__.split("+")[0].split(".")[:2])
    build = "cpu" if torch.version.cuda is None else "cu" + torch.version.cuda.replace(".", "")
    fitting = [x for x in libraries if f"pt{version}{build}" in x.name] or libraries[:1]
    try:
        torch.ops.load_library(fitting[0])
    except (IndexError, OSError) as error:
        print(f"torbi is left out, nothing in it fits this torch: {error}", file=sys.stderr)
        return None
    return torch.ops.torbi.viterbi_decode


def no_grad(function: Callable[[], object]) -> Callable[[], object]:
    def run():
        with torch.no_grad():
            return function()

    return run


def backward(s: Sizes, loss: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], torch.Tensor]:
    def run():
        emissions = s.emissions.detach().requires_grad_()
        s.crf.zero_grad()
        value = loss(emissions)
        value.sum().backward()
        return value.detach()

    return run


# ---- the beam CRF ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _check_samples(s: Sizes) -> None:
    """The probability of each path is its score less log Z in fairseq's formulation; slots are drawn as often as the
    marginals say: Pearson's statistic over all positions, in units of its mean."""
    drawn = s.crf.sample(s.emissions, num_samples=512, generator=torch.Generator().manual_seed(0))
    tokens = drawn.tokens
    score = s.emissions.gather(2, tokens).sum(1)
    score += (s.left[tokens[:, :-1]] * s.right[tokens[:, 1:]]).sum((1, 3))
    log_z = reference.fairseq_log_partition(s.emissions, s.left, s.right, s.beam)
    torch.testing.assert_close(drawn.log_prob, score - log_z[:, None], rtol=1e-5, atol=2e-2)
    expected = 512 * s.crf.marginals(s.emissions).probs
    counts = torch.zeros_like(expected).scatter_add_(2, drawn.slots, torch.ones_like(drawn.slots, dtype=torch.float32))
    often = expected > 5
    statistic = ((counts - expected) ** 2 / expected)[often].sum() / often.sum()
    assert statistic < 1.3, f"slots are not drawn as often as the marginals say: {statistic}"


def _published(s: Sizes, count: int) -> Callable[[], object]:
    return no_grad(lambda: reference.published_samples(s.emissions, s.left, s.right, s.beam, samples=count)[2])


def samples(s: Sizes, count: int) -> Providers:
    _check_samples(s)
    return {OURS: no_grad(lambda: s.crf.sample(s.emissions, num_samples=count)), "published": _published(s, count)}


def samples_on_beam(s: Sizes, count: int) -> Providers:
    """The beams are given."""
    _check_samples(s)
    values, tokens = s.emissions.topk(s.beam, 2)

    def published():
        return reference.published_on_beam(values, tokens, s.left, s.right, samples=count)[2]

    ours = no_grad(lambda: s.crf.sample(s.emissions, num_samples=count, beam_tokens=tokens))
    return {OURS: ours, "published": no_grad(published)}


def published_law(s: Sizes, count: int) -> Providers:
    few = s.emissions[:, :9]
    uniforms = torch.rand(len(few), few.shape[1] - 1, s.beam, count, device=s.device)
    s.published.num_samples = count
    with torch.no_grad():
        ours = s.published(few, uniforms=uniforms)
        theirs = reference.published_samples(few, s.left, s.right, s.beam, samples=count, uniforms=uniforms)
    same = (ours[2] == theirs[2]).all(1).float().mean()  # rounding may move an edge between two slots
    assert same > 0.9, f"given the uniforms, {same:.0%} of the paths agree"
    return {OURS: no_grad(lambda: s.published(s.emissions)), "published": _published(s, count)}


def select(s: Sizes) -> Providers:
    ours, theirs = crf_beam_select(s.emissions, s.beam), s.emissions.topk(s.beam, 2)
    assert torch.equal(ours[1], theirs.values), "beams differ"
    return {
        OURS: no_grad(lambda: crf_beam_select(s.emissions, s.beam)),
        "torch.topk": no_grad(lambda: s.emissions.topk(s.beam, 2)),
    }


def viterbi(s: Sizes) -> Providers:
    ours = no_grad(lambda: s.crf.viterbi(s.emissions))
    fairseq = no_grad(lambda: reference.fairseq_viterbi(s.emissions, s.left, s.right, s.beam))
    torch.testing.assert_close(ours().score, fairseq()[1], rtol=1e-5, atol=1e-3)
    return {OURS: ours, "fairseq": fairseq}


def nll(s: Sizes, unbind: bool) -> Providers:
    def fairseq(emissions):
        return reference.fairseq_nll(emissions, s.left, s.right, s.targets, s.beam, unbind)

    ours = backward(s, lambda emissions: s.crf.nll(emissions, s.targets, reduction="none"))
    torch.testing.assert_close(ours(), no_grad(lambda: fairseq(s.emissions))(), rtol=1e-5, atol=1e-2)
    return {OURS: ours, "fairseq, .unbind(1)" if unbind else "fairseq": backward(s, fairseq)}


# ---- one dense matrix of transitions for all steps -------------------------------------------------------------------


def dense(s: Sizes, decode: bool, tags: int | None = None, *, struct: bool = False) -> Providers:
    tags = s.beam if tags is None else tags
    batch, length = s.emissions.shape[:2]
    crf = LinearChainCRF(tags).to(s.device)
    emissions = s.emissions[:, :, :tags].contiguous()
    rows: Providers = {OURS: no_grad(lambda: crf.viterbi(emissions) if decode else crf.log_partition(emissions))}
    transitions = crf.transitions.detach()
    start, end = crf.start_transitions.detach(), crf.end_transitions.detach()
    mask = torch.ones(batch, length, dtype=torch.bool, device=s.device)

    def plain():
        score = start + emissions[:, 0]
        for t in range(1, length):
            step = score[:, :, None] + transitions
            score = (step.max(1)[0] if decode else torch.logsumexp(step, 1)) + emissions[:, t]
        return (score + end).amax(1) if decode else torch.logsumexp(score + end, 1)

    rows["plain torch loop"] = no_grad(plain)
    torchcrf = optional("torchcrf")
    if torchcrf is not None:
        peer = torchcrf.CRF(tags, batch_first=True).to(s.device)
        peer.load_state_dict(crf.state_dict())
        if decode:
            rows["pytorch-crf"] = no_grad(lambda: peer.decode(emissions, mask))
        else:
            rows["pytorch-crf"] = no_grad(lambda: peer._compute_normalizer(emissions.transpose(0, 1), mask.T))
    torbi = torbi_operator() if decode and not struct else None
    if torbi is not None:
        shared = transitions.T.contiguous()
        lengths = torch.full((batch,), length, dtype=torch.int32, device=s.device)
        closed = torch.cat([emissions[:, :-1], emissions[:, -1:] + end], 1)
        rows["torbi"] = no_grad(lambda: torbi(closed, lengths, shared, start))
    torch_struct = optional("torch_struct") if struct else None
    if torch_struct is not None:
        edges = (transitions.T + emissions[:, 1:, :, None]).clone()  # [b, t, to, from]
        edges[:, 0] += (start + emissions[:, 0])[:, None]
        edges[:, -1] += end[:, None]
        rows["torch-struct"] = no_grad(lambda: torch_struct.LinearChainCRF(edges).partition)
    _check_dense(rows, decode)
    return rows


def tagger(s: Sizes) -> Providers:
    """A training step of a tagger, forward and backward: 33 BIO tags, items of different lengths."""
    names = ["O", *[f"{letter}-{kind}" for kind in range(16) for letter in "BI"]]
    crf = LinearChainCRF(len(names)).to(s.device)
    batch, length = s.emissions.shape[:2]
    emissions = s.emissions[:, :, : len(names)].contiguous()
    lengths = torch.arange(length, length - batch, -1, device=s.device)
    mask = torch.arange(length, device=s.device) < lengths[:, None]
    tags = crf.constrain(**bio(names)).viterbi(emissions, lengths).tags.clamp(min=0)
    crf.constrain()

    def ours():
        values = emissions.clone().requires_grad_()
        loss = crf.nll(values, tags, lengths, reduction="sum")
        return loss.detach(), *torch.autograd.grad(loss, [values, *crf.parameters()])

    rows: Providers = {OURS: ours}
    torchcrf = optional("torchcrf")
    if torchcrf is not None:
        peer = torchcrf.CRF(len(names), batch_first=True).to(s.device)
        peer.load_state_dict(crf.state_dict())

        def theirs():
            values = emissions.clone().requires_grad_()
            loss = -peer(values, tags, mask)
            return loss.detach(), *torch.autograd.grad(loss, [values, *peer.parameters()])

        rows["pytorch-crf"] = theirs
        for a, b in zip(ours(), theirs(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-3)
    return rows


def constrained(s: Sizes) -> Providers:
    """log Z of 255 BIO tags whose forbidden transitions are -inf; pytorch-crf gives NaN for them, so it has -10,000."""
    names = ["O", *[f"{letter}-{kind}" for kind in range((s.beam - 1) // 2) for letter in "BI"]]
    rules = bio(names)
    crf = LinearChainCRF(len(names), **rules).to(s.device)
    emissions = s.emissions[:, :, : len(names)].contiguous()
    mask = torch.ones(emissions.shape[:2], dtype=torch.bool, device=s.device)
    rows: Providers = {OURS: no_grad(lambda: crf.log_partition(emissions))}
    torchcrf = optional("torchcrf")
    if torchcrf is not None:
        peer = torchcrf.CRF(len(names), batch_first=True).to(s.device)
        peer.load_state_dict(crf.state_dict())
        with torch.no_grad():
            peer.transitions[~rules["allowed_transitions"].to(s.device)] = -1e4
            peer.start_transitions[~rules["allowed_start"].to(s.device)] = -1e4
        rows["pytorch-crf"] = no_grad(lambda: peer._compute_normalizer(emissions.transpose(0, 1), mask.T))
        torch.testing.assert_close(rows["pytorch-crf"](), rows[OURS](), rtol=1e-5, atol=2e-3)
    return rows


def _check_dense(rows: Providers, decode: bool) -> None:
    ours = rows[OURS]()
    for name, run in rows.items():
        if name == OURS:
            continue
        if decode and name != "plain torch loop":
            assert torch.equal(torch.as_tensor(run(), dtype=torch.int64), ours.tags), f"the paths of {name} differ"
        else:
            expected = ours.score if decode else ours
            torch.testing.assert_close(run(), expected, rtol=1e-5, atol=2e-3)


# ---- all of them: title, goal by provider, function ------------------------------------------------------------------

Row = tuple[str, dict[str, float], Callable[[Sizes], Providers]]
ROWS: dict[str, Row] = {
    "samples_8": ("exact sampling, N = 8", {"published": 90}, lambda s: samples(s, 8)),
    "samples_64": ("exact sampling, N = 64", {"published": 600}, lambda s: samples(s, 64)),
    "select": ("beam selection", {"torch.topk": 5}, select),
    "published_8": ("published law, N = 8", {"published": 55}, lambda s: published_law(s, 8)),
    "viterbi": ("Viterbi", {"fairseq": 5}, viterbi),
    "nll": ("nll, forward and backward", {"fairseq": 35}, lambda s: nll(s, False)),
    "nll_unbind": ("nll, forward and backward", {"fairseq, .unbind(1)": 3}, lambda s: nll(s, True)),
    "dense_log_partition": ("shared transitions, log Z", {"pytorch-crf": 30}, lambda s: dense(s, False)),
    "dense_viterbi": ("shared transitions, Viterbi", {"pytorch-crf": 20, "torbi": 20}, lambda s: dense(s, True)),
    "dense_32": ("the same of 32 tags, log Z", {}, lambda s: dense(s, False, 32, struct=True)),
    "constrained": ("shared transitions of 255 BIO tags, log Z", {"pytorch-crf": 25}, constrained),
    "tagger": ("a training step with 33 BIO tags", {}, tagger),
}
ON_CUDA: dict[str, Row] = {
    "samples_8": ("exact sampling, N = 8, beams given", {"published": 40}, lambda s: samples_on_beam(s, 8)),
    "samples_64": ("exact sampling, N = 64, beams given", {"published": 150}, lambda s: samples_on_beam(s, 64)),
    "select": ROWS["select"],
    "published_8": ROWS["published_8"],
    "viterbi": ROWS["viterbi"],
    "nll": ROWS["nll"],
    "nll_unbind": ROWS["nll_unbind"],
}
