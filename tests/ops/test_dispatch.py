"""The one chooser: what serves a call by default, and what it says of one that was asked for by name.

And all operators that take `impl`, in one table: one that is named runs, and no other does, or it is refused by name;
in compiled graphs too. An operator that is not in the table fails the test: it has to join.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import simctg_fast.ops
from simctg_fast.ops import _backends
from simctg_fast.ops.candidate_select import candidate_scan, candidate_select
from simctg_fast.ops.centered_scan import centered_scan
from simctg_fast.ops.contraclm import contraclm_loss
from simctg_fast.ops.contrastive_loss import contrastive_loss
from simctg_fast.ops.cosine_similarity import cosine_similarity_matrix
from simctg_fast.ops.crf_beam import crf_beam_select
from simctg_fast.ops.crf_dense import dense_filter, dense_kbest, dense_log_partition, dense_marginals, dense_viterbi
from simctg_fast.ops.crf_filter import crf_filter, crf_filter_backward
from simctg_fast.ops.crf_sample import crf_ffbs
from simctg_fast.ops.crf_stochastic import crf_stochastic_viterbi
from simctg_fast.ops.crf_viterbi import crf_kbest, crf_viterbi
from simctg_fast.ops.dispatch import choose
from simctg_fast.ops.earlier_text import follower_scan, ngram_penalty
from simctg_fast.ops.repeated_suffix import repeated_suffix
from simctg_fast.ops.shared_prefix_attention import shared_prefix_attention
from simctg_fast.ops.simcse import pair_loss, pair_lse, self_loss
from simctg_fast.ops.top_k import top_k_probs
from simctg_fast.ops.viterbi_backtrace import viterbi_backtrace
from simctg_fast.reference import attention, centered, crf, dry, fsd, viterbi
from simctg_fast.reference import candidate_select as reference_scan
from simctg_fast.reference.contrastive_loss import contrastive_loss as reference_contrastive_loss

from ..processes import run_child
from ..repository import WITH_TESTS

CPU, CUDA, META = (torch.device(name) for name in ("cpu", "cuda", "meta"))


def taken():
    return None


def refused():
    return "takes nothing"


def asked():
    raise AssertionError("nobody had to ask")


@pytest.fixture
def installed(monkeypatch):
    """Sets what is installed."""

    def install(extension: bool, triton: bool) -> None:
        errors = {_backends.EXTENSION: extension, "triton": triton}
        real = _backends._attempt

        def attempt(name):
            return real("math") if errors[name] else (None, ImportError(f"{name} is not there"))

        monkeypatch.setattr(_backends, "_attempt", attempt)
        monkeypatch.setattr(_backends, "_check_instruction_set", lambda module: None)
        monkeypatch.setattr(_backends, "triton_runs_on", lambda device: device.type == "cuda")

    install(True, True)
    return install


@pytest.mark.parametrize(
    ("device", "cpu", "triton", "expected"),
    [
        (CPU, taken, asked, "cpu"),
        (CPU, refused, asked, "torch"),
        (CPU, None, asked, "torch"),
        (CUDA, asked, taken, "triton"),
        (CUDA, asked, refused, "torch"),
        (CUDA, asked, None, "torch"),
        (META, asked, asked, "torch"),
    ],
)
def test_by_default(installed, device, cpu, triton, expected):
    assert choose("auto", device, cpu=cpu, triton=triton) == expected
    assert choose("torch", device, cpu=asked, triton=asked) == "torch"
    installed(False, False)
    assert choose("auto", device, cpu=cpu, triton=None if triton is None else asked) == "torch"


def test_by_name(installed):
    assert choose("cpu", CPU, cpu=taken) == "cpu"
    assert choose("cpu", CPU) == "torch", "PyTorch's is the CPU's where there is no other"
    assert choose("triton", CUDA, triton=taken) == "triton"
    for impl, device, options, message in (
        ("gpu", CPU, {}, "impl is 'gpu', must be one of 'auto', 'triton', 'cpu', 'torch'"),
        ("triton", CPU, {"impls": ("auto", "cpu")}, "impl is 'triton', must be one of 'auto', 'cpu'"),
        ("cpu", CUDA, {"cpu": asked}, "impl='cpu' needs tensors on the CPU, got cuda"),
        ("cpu", CPU, {"cpu": refused}, "impl='cpu' takes nothing"),
        ("triton", CUDA, {}, "impl='triton' has no kernel for this operation; impl='torch' runs on any device"),
        ("triton", CUDA, {"triton": refused}, "impl='triton' takes nothing"),
        ("triton", CPU, {"triton": taken}, "impl='triton' needs tensors on a CUDA device, got cpu"),
    ):
        with pytest.raises(ValueError) as caught:
            choose(impl, device, **options)
        assert str(caught.value) == message


def test_by_name_where_it_is_not_installed(installed):
    installed(False, False)
    with pytest.raises(RuntimeError, match=r"impl='cpu' needs the C\+\+ extension, which does not load \(.*not there"):
        choose("cpu", CPU, cpu=asked)
    with pytest.raises(RuntimeError, match=r"impl='triton' needs triton, which does not load .*not there"):
        choose("triton", CUDA, triton=asked)


# ---- all operators ---------------------------------------------------------------------------------------------------

BATCH, LENGTH, WIDTH, BEAM, VOCABULARY, RANK = 2, 5, 8, 3, 11, 4
LENGTHS = torch.tensor([LENGTH, 3])
TOKENS = torch.stack([torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(i))[:BEAM] for i in range(10)])
TOKENS = TOKENS.view(BATCH, LENGTH, BEAM)
TARGETS = torch.tensor([1, 0, 3, 2])


@dataclass(frozen=True)
class Case:
    """An operator, called with random numbers of these shapes and dtypes.

    `call(impl, *inputs)` returns one result or several. With `differentiable` the sum of the first is differentiated,
    and the gradients are results too. `truth` takes the inputs in float64; None: PyTorch's own, which other tests hold
    against the formula.
    """

    shapes: tuple[tuple[int, ...], ...]
    call: Callable[..., Any]
    truth: Callable[..., Any] | None = None
    functions: tuple[Callable[..., Any], ...] = ()  # of `simctg_fast.ops`
    operators: tuple[str, ...] = ()
    differentiable: bool = False
    compiled: bool = True  # there is C++ code; else PyTorch's is the CPU's
    kernel: bool = True
    floats: bool = True  # takes floating numbers, of which C++ code and kernels take no float64

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(7)
        values = [torch.randn(shape, generator=generator) for shape in self.shapes]
        return [x.to(dtype).requires_grad_(self.differentiable) for x in values]


def scan_inputs(states: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
    return states, torch.nn.functional.normalize(history, dim=-1)


def select(impl: str, states: Tensor, history: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
    states, history = scan_inputs(states, history)
    probs = logits.float().softmax(-1)
    results = candidate_select(states, probs, history, LENGTHS - 1, 0.5, with_penalty=True, impl=impl)
    return (*results, history)


def select_truth(states: Tensor, history: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
    states, history = scan_inputs(states, history)
    penalty, position = reference_scan.candidate_scan(states, history, LENGTH, None, LENGTHS - 1)
    chosen = (0.5 * logits.softmax(-1) - 0.5 * penalty).argmax(-1)
    rows = torch.arange(BATCH)
    winner = states[rows, chosen]
    history[rows, LENGTHS - 1] = torch.nn.functional.normalize(winner, dim=-1)
    return chosen, winner, penalty, position, history


def scan_centered(impl: str, states: Tensor, history: Tensor) -> tuple[Tensor, ...]:
    seen = (torch.arange(LENGTH) < LENGTHS[:, None])[..., None]
    shift = history[:, 0]
    kept = history - shift[:, None]
    sums = (kept * seen).float().sum(dim=1)
    return centered_scan(states, shift, kept, kept.float().square().sum(-1), sums, LENGTH, None, impl, LENGTHS)


def scan_centered_truth(states: Tensor, history: Tensor) -> tuple[Tensor, ...]:
    rows = [centered.centered_scan(x, past[:n]) for x, past, n in zip(states, history, LENGTHS.tolist(), strict=True)]
    return tuple(map(torch.stack, zip(*rows, strict=True)))


def followers(impl: str, history: Tensor) -> Tensor:
    return follower_scan(unit(history), TOKENS[:, :, 0] % 2, PICKS, LENGTHS, impl=impl)[0]


def text_truth(penalty: Callable[[int, list[int], int], float]) -> Tensor:
    """``penalty(row, its tokens, pick)`` of every row and pick."""
    texts = [row[:n] for row, n in zip((TOKENS[:, :, 0] % 2).tolist(), LENGTHS.tolist(), strict=True)]
    return torch.tensor(
        [[penalty(b, text, int(v)) for v in PICKS[b]] for b, text in enumerate(texts)], dtype=torch.float64
    )


def grams(impl: str) -> Tensor:
    orders, betas = torch.full_like(LENGTHS, 3), torch.full(LENGTHS.shape, 0.9, dtype=torch.float64)
    return ngram_penalty(TOKENS[:, :, 0] % 2, PICKS, LENGTHS, orders=orders, betas=betas, impl=impl, longest=3)[0]


def attend(function: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> Tensor:
    query, key, value, new_key, new_value = inputs
    return function(query, key, value, LENGTH, new_key, new_value, scaling=0.5, **options)


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def cross_entropies(queries: Tensor, keys: Tensor, targets: Tensor, alone: bool = False) -> Tensor:
    logits = 3 * unit(queries) @ unit(keys).T
    if alone:
        logits = logits.masked_fill(torch.eye(len(logits), dtype=torch.bool), -torch.inf)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def twins(first: Tensor, second: Tensor) -> Tensor:
    """The sums of the cross-entropies of each sequence's states, without its last token, to their twins."""
    states = torch.cat([first[:, :-1], second[:, :-1]], dim=1)
    places = torch.arange(2 * LENGTH - 2).roll(LENGTH - 1)
    return torch.stack([cross_entropies(each, each, places, alone=True).sum() for each in states])


def messages(scores: Tensor, left: Tensor, right: Tensor) -> Tensor:
    alpha, result = torch.zeros_like(scores[:, 0]), []
    for t in range(LENGTH):
        edges = left[TOKENS[:, t - 1]] @ right[TOKENS[:, t]].mT
        message = (alpha[:, :, None] + edges).logsumexp(1) if t else alpha
        message = message.masked_fill((t >= LENGTHS)[:, None], 0)
        result.append(message)
        alpha = message + scores[:, t]
        alpha = alpha - alpha.detach().amax(1, keepdim=True)
    return torch.stack(result, 1)


def best(scores: Tensor, left: Tensor, right: Tensor, paths: int) -> Tensor:
    result = torch.full((BATCH, LENGTH, paths), -1)
    for b, length in enumerate(LENGTHS.tolist()):
        every = crf.enumerate_paths(scores[b], TOKENS[b], left, right, length)
        result[b, :length] = every.slots[every.scores.topk(paths).indices].T
    return result


def dense_best(emissions: Tensor, transitions: Tensor, paths: int) -> Tensor:
    result = torch.full((BATCH, LENGTH, paths), -1)
    for b, length in enumerate(LENGTHS.tolist()):
        every = torch.tensor(list(itertools.product(range(BEAM), repeat=length)))
        total = emissions[b, torch.arange(length), every].sum(1) + transitions[every[:, :-1], every[:, 1:]].sum(1)
        result[b, :length] = every[total.topk(paths).indices].T
    return result


def sampled(impl: str, scores: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
    potentials = (scores, TOKENS, left, right, LENGTHS)
    forward = crf_filter(*potentials, 1.0, impl="torch")
    return crf_ffbs(*forward, *potentials, 1.0, 6, 17, impl=impl)


def backward(impl: str, scores: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
    potentials = (scores, TOKENS, left, right, LENGTHS)
    grad = torch.ones_like(scores)
    forward = crf_filter(*potentials, 1.0, impl="torch")
    return crf_filter_backward(grad, *forward, *potentials, 1.0, True, impl=impl)


def marginals(impl: str, emissions: Tensor, transitions: Tensor) -> Tensor:
    _, messages, norms = dense_filter(emissions, transitions, LENGTHS, impl="torch")
    return dense_marginals(messages, norms, emissions, transitions, LENGTHS, impl=impl)


def marginals_truth(emissions: Tensor, transitions: Tensor) -> Tensor:
    emissions = emissions.detach().requires_grad_()
    return torch.autograd.grad(crf.dense_log_partition(emissions, transitions, LENGTHS).sum(), emissions)[0]


PICKS = torch.tensor([[0, 1, 2]] * BATCH)
STATES, CHAIN, DENSE = (BATCH, LENGTH, WIDTH), (BATCH, LENGTH, BEAM), ((BATCH, LENGTH, BEAM), (BEAM, BEAM))
LOW_RANK = (CHAIN, (VOCABULARY, RANK), (VOCABULARY, RANK))
CASES = {
    "candidate_scan": Case(
        ((BATCH, 3, WIDTH), STATES),
        lambda impl, *x: candidate_scan(*scan_inputs(*x), LENGTH, None, impl, LENGTHS),
        lambda *x: reference_scan.candidate_scan(*scan_inputs(*x), LENGTH, None, LENGTHS),
        functions=(candidate_scan,), operators=("candidate_scan",),
    ),
    "candidate_select": Case(
        ((BATCH, 3, WIDTH), STATES, (BATCH, 3)), select, select_truth,
        functions=(candidate_select,), operators=("candidate_select",),
    ),
    "centered_scan": Case(
        ((BATCH, 3, WIDTH), STATES), scan_centered, scan_centered_truth,
        functions=(centered_scan,), operators=("centered_scan",),
    ),
    "follower_scan": Case(
        (STATES,), followers,
        lambda history: text_truth(lambda b, text, v: fsd.vector_penalty(history[b, : len(text)], text, v, 2)),
        functions=(follower_scan,), operators=("follower_scan",),
    ),
    "ngram_penalty": Case(
        (), grams, lambda: text_truth(lambda b, text, v: fsd.ngram_penalty(text, v, 3, 0.9)),
        functions=(ngram_penalty,), operators=("ngram_penalty",), kernel=False, floats=False,
    ),
    "top_k_probs": Case(
        ((BATCH, VOCABULARY),),
        lambda impl, logits: top_k_probs(logits, 4, impl),
        lambda logits: tuple(logits.softmax(-1).topk(4)),
        functions=(top_k_probs,), operators=("top_k_probs",),
    ),
    "shared_prefix_attention": Case(
        ((4, 2, 1, WIDTH), *[(BATCH, 2, LENGTH, WIDTH)] * 2, *[(4, 2, 1, WIDTH)] * 2),
        lambda impl, *x: attend(shared_prefix_attention, *x, lengths=LENGTHS, impl=impl),
        lambda *x: attend(attention.shared_prefix_attention, *x, lengths=LENGTHS),
        functions=(shared_prefix_attention,), operators=("shared_prefix_attention",),
    ),
    "contrastive_loss": Case(
        (STATES,),
        lambda impl, states: contrastive_loss(states, None, None, 0.9, "pairs", impl),
        lambda states: reference_contrastive_loss(states, None, 0.9),
        functions=(contrastive_loss,), operators=("contrastive_loss", "contrastive_loss_backward"), differentiable=True,
    ),
    "cosine_similarity_matrix": Case(
        (STATES,),
        lambda impl, states: cosine_similarity_matrix(states, impl),
        lambda states: unit(states) @ unit(states).mT,
        functions=(cosine_similarity_matrix,), operators=("cosine_similarity_matrix",), differentiable=True,
        compiled=False,
    ),
    "pair_loss": Case(
        ((4, WIDTH), (4, WIDTH)),
        lambda impl, queries, keys: pair_loss(queries, keys, TARGETS, 3.0, impl),
        lambda queries, keys: cross_entropies(queries, keys, TARGETS),
        functions=(pair_loss,), operators=("pair_loss", "pair_loss_backward"), differentiable=True, compiled=False,
    ),
    "pair_lse": Case(
        ((4, WIDTH), (4, WIDTH)),
        lambda impl, queries, keys: pair_lse(queries, keys, 3.0, impl),
        lambda queries, keys: (3 * unit(queries) @ unit(keys).T).logsumexp(1),
        functions=(pair_lse,), operators=("pair_loss", "pair_loss_backward"), differentiable=True, compiled=False,
    ),
    "self_loss": Case(
        ((4, WIDTH),),
        lambda impl, vectors: self_loss(vectors, 3.0, impl),
        lambda vectors: cross_entropies(vectors, vectors, TARGETS, alone=True),
        functions=(self_loss,), operators=("self_loss", "self_loss_backward"), differentiable=True, compiled=False,
    ),
    "contraclm_loss": Case(
        (STATES, STATES),
        lambda impl, *x: contraclm_loss(*x, (torch.arange(LENGTH) < LENGTH - 1).expand(BATCH, -1), 3.0, impl),
        twins,
        functions=(contraclm_loss,), operators=("contraclm_loss", "contraclm_loss_backward"), differentiable=True,
        compiled=False,
    ),
    "crf_beam_select": Case(
        ((BATCH, LENGTH, VOCABULARY),),
        lambda impl, emissions: crf_beam_select(emissions, BEAM, impl=impl),
        lambda emissions: emissions.topk(BEAM)[::-1],
        functions=(crf_beam_select,), operators=("crf_beam_select",),
    ),
    "crf_filter": Case(
        LOW_RANK,
        lambda impl, scores, left, right: crf_filter(scores, TOKENS, left, right, LENGTHS, impl=impl)[0],
        messages,
        functions=(crf_filter,), operators=("crf_filter", "crf_filter_backward"), differentiable=True,
    ),
    "crf_filter_backward": Case(
        LOW_RANK, backward, functions=(crf_filter_backward,), operators=("crf_filter_backward",)
    ),
    "crf_viterbi": Case(
        LOW_RANK,
        lambda impl, scores, left, right: crf_viterbi(scores, TOKENS, left, right, LENGTHS, impl=impl),
        lambda *x: best(*x, 1)[..., 0],
        functions=(crf_viterbi,), operators=("crf_viterbi",),
    ),
    "crf_kbest": Case(
        LOW_RANK,
        lambda impl, scores, left, right: crf_kbest(scores, TOKENS, left, right, LENGTHS, 4, impl=impl),
        lambda *x: best(*x, 4),
        functions=(crf_kbest,), operators=("crf_kbest",), kernel=False,
    ),
    "crf_ffbs": Case(LOW_RANK, sampled, functions=(crf_ffbs,), operators=("crf_ffbs",)),
    "crf_stochastic_viterbi": Case(
        LOW_RANK,
        lambda impl, scores, left, right: crf_stochastic_viterbi(
            scores, TOKENS, left, right, LENGTHS, 0.7, 6, 17, impl=impl
        )[0],
        functions=(crf_stochastic_viterbi,), operators=("crf_stochastic_viterbi",),
    ),
    "dense_filter": Case(
        DENSE,
        lambda impl, *x: dense_filter(*x, LENGTHS, impl=impl)[0],
        lambda *x: crf.dense_log_partition(*x, LENGTHS),
        functions=(dense_filter,), operators=("dense_filter", "dense_filter_backward"), differentiable=True,
        kernel=False,
    ),
    "dense_log_partition": Case(
        DENSE,
        lambda impl, *x: dense_log_partition(*x, LENGTHS, impl=impl),
        lambda *x: crf.dense_log_partition(*x, LENGTHS),
        functions=(dense_log_partition,), operators=("dense_filter", "dense_filter_backward"), differentiable=True,
        kernel=False,
    ),
    "dense_marginals": Case(
        DENSE, marginals, marginals_truth,
        functions=(dense_marginals,), operators=("dense_filter_backward",), kernel=False,
    ),
    "dense_viterbi": Case(
        DENSE,
        lambda impl, *x: dense_viterbi(*x, LENGTHS, impl=impl),
        lambda *x: crf.dense_viterbi(*x, LENGTHS),
        functions=(dense_viterbi,), operators=("dense_viterbi",), kernel=False,
    ),
    "dense_kbest": Case(
        DENSE,
        lambda impl, *x: dense_kbest(*x, LENGTHS, 4, impl=impl),
        lambda *x: dense_best(*x, 4),
        functions=(dense_kbest,), operators=("dense_kbest",), kernel=False,
    ),
    "repeated_suffix": Case(
        (),
        lambda impl: repeated_suffix(TOKENS[:, :, 0] % 2, impl=impl),
        lambda: torch.tensor([dry.repeated_suffix(row) for row in (TOKENS[:, :, 0] % 2).tolist()]),
        functions=(repeated_suffix,), operators=("repeated_suffix",), kernel=False, floats=False,
    ),
    "viterbi_backtrace": Case(
        (),
        lambda impl: viterbi_backtrace(TOKENS % BEAM, TOKENS[:, 0, 0] % BEAM, LENGTHS, impl=impl),
        lambda: viterbi.viterbi_backtrace(TOKENS % BEAM, TOKENS[:, 0, 0] % BEAM, LENGTHS),
        functions=(viterbi_backtrace,), operators=("viterbi_backtrace",), kernel=False, floats=False,
    ),
}  # fmt: skip


def taking_impl() -> tuple[set[str], set[str]]:
    """Operators with an argument `impl`, and functions of `simctg_fast.ops` that take it behind their data (what
    chooses takes it first)."""
    functions = set()
    for info in pkgutil.iter_modules(simctg_fast.ops.__path__):
        module = importlib.import_module(f"simctg_fast.ops.{info.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("_"):
                parameters = list(inspect.signature(function).parameters)
                if "impl" in parameters[1:]:
                    functions.add(f"{info.name}.{name}")
    names = [name.partition("::") for name in torch._C._dispatch_get_all_op_names()]
    ours = {name.partition(".")[0] for library, _, name in names if library == "simctg_fast"}
    schemas = {name: getattr(torch.ops.simctg_fast, name).default._schema for name in ours}
    return {name for name, schema in schemas.items() if any(a.name == "impl" for a in schema.arguments)}, functions


def test_every_operator_is_in_the_table():
    operators, functions = taking_impl()
    named = {f"{f.__module__.rpartition('.')[2]}.{f.__name__}" for case in CASES.values() for f in case.functions}
    assert functions == named, "an operator that takes `impl` joins CASES"
    assert operators == {name for case in CASES.values() for name in case.operators}


@contextlib.contextmanager
def watched(monkeypatch) -> Iterator[set[str]]:
    """What runs meanwhile: C++ code, "cpu", or Triton's interpreter, "triton"."""
    ran: set[str] = set()

    class Watched:
        def __getattr__(self, name: str) -> Any:
            ran.add("cpu")
            return getattr(real(), name)

    real = _backends.require_extension
    with monkeypatch.context() as patch:
        patch.setattr(_backends, "require_extension", lambda: real() and Watched())
        if os.environ.get("TRITON_INTERPRET") == "1":
            from triton.runtime import interpreter

            start = interpreter.GridExecutor.__call__

            def call(self, *args, **options):
                ran.add("triton")
                return start(self, *args, **options)

            patch.setattr(interpreter.GridExecutor, "__call__", call)
        yield ran


def run_case(case: Case, impl: str, dtype: torch.dtype, backend: str | None) -> list[Tensor]:
    def call(*inputs: Tensor) -> Any:
        return case.call(impl, *inputs)

    if backend is not None:
        torch._dynamo.reset()
        call = torch.compile(call, fullgraph=True, backend=backend)
    inputs = case.inputs(dtype)
    return with_gradients(case, call(*inputs), inputs)


def with_gradients(case: Case, results: Any, inputs: list[Tensor]) -> list[Tensor]:
    results = list(results) if isinstance(results, (tuple, list)) else [results]
    if not case.differentiable:
        return results
    return [results[0].detach(), *torch.autograd.grad(results[0].sum(), inputs)]


def check_runs(case: Case, impl: str, dtype: torch.dtype, backend: str | None, expected: set[str], monkeypatch) -> None:
    with watched(monkeypatch) as ran:
        results = run_case(case, impl, dtype, backend)
    assert ran == expected, f"{impl} was asked for, {ran or 'PyTorch'} ran"
    if case.truth is None:
        truth = run_case(case, "torch", torch.float64, None)
    else:
        inputs = case.inputs(torch.float64)
        truth = with_gradients(case, case.truth(*inputs), inputs)
    assert len(results) == len(truth)
    for ours, exact in zip(results, truth, strict=True):
        torch.testing.assert_close(ours.to(exact.dtype), exact, rtol=2e-5, atol=1e-5)


def check_refused(case: Case, impl: str, dtype: torch.dtype, backend: str | None, monkeypatch) -> None:
    with watched(monkeypatch) as ran, pytest.raises((ValueError, RuntimeError), match=f"impl(=| is ){impl!r}"):
        run_case(case, impl, dtype, backend)
    assert not ran


# What "aot_eager" compiles it has traced before, as "eager" does.
BACKENDS = pytest.mark.parametrize(
    "backend",
    [None, pytest.param("eager", marks=pytest.mark.full), "aot_eager"],
    ids=["called", "traced", "compiled"],
)


@BACKENDS
@pytest.mark.parametrize("name", CASES)
def test_one_that_is_named_runs_or_is_refused(name, backend, monkeypatch):
    case = CASES[name]
    built = _backends.extension() is not None
    native = {"cpu"} if case.compiled and built else set()
    for dtype in (torch.float32, torch.float64) if case.floats else (torch.float32,):
        wide = dtype == torch.float64
        check_runs(case, "auto", dtype, backend, set() if wide else native, monkeypatch)
        check_runs(case, "torch", dtype, backend, set(), monkeypatch)
        if case.compiled and (wide or not built):
            check_refused(case, "cpu", dtype, backend, monkeypatch)
        else:
            check_runs(case, "cpu", dtype, backend, native, monkeypatch)
        for impl in ("triton", "gpu"):
            check_refused(case, impl, dtype, backend, monkeypatch)


def check_kernels(monkeypatch) -> None:
    """In Triton's interpreter, which serves tensors on the CPU."""
    for case, backend in itertools.product(CASES.values(), (None, "aot_eager")):
        if case.kernel:
            check_runs(case, "triton", torch.float32, backend, {"triton"}, monkeypatch)
            if case.floats:
                check_refused(case, "triton", torch.float64, backend, monkeypatch)
        else:
            check_refused(case, "triton", torch.float32, backend, monkeypatch)


@pytest.mark.full
def test_kernels_that_are_named_run_interpreted():
    pytest.importorskip("triton")
    source = "from tests.ops import test_dispatch as t; t.check_kernels(t.pytest.MonkeyPatch())"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": WITH_TESTS}
    done = run_child([sys.executable, "-W", "ignore", "-c", source], env=environment, cwd="/")
    assert done.returncode == 0, done.stderr[-3000:]
