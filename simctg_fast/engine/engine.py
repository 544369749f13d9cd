"""Requests in, results out: one model, many sequences at a time."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from ..checks import is_number, require
from ..cpu.modules import WeightCopies, check_weights
from ..loading import fitting_threads, load_model
from .embeddings import Embeddings
from .parameters import NAMES, Parameters, run_defaults
from .prepare import Factory, Preparer, load_factory
from .requests import Request, RequestError, parse_request
from .results import Result, error_result, from_choices, from_request_error
from .sequence import IDLE, Sequence
from .strategies import limits, make_strategy

logger = logging.getLogger("simctg_fast")

OnText = Callable[[Request, int, str], None]

BATCHING = ("auto", "slots", "static")
_END = object()


class Engine:
    """Continues requests with one model, many at a time.

    Args:
        model, tokenizer: as `simctg_fast.loading.load_model` returns them.
        strategy: ``"contrastive"``, ``"adaptive"``, ``"fsd"``, ``"fsd-vec"``, ``"guard"``, ``"greedy"``, ``"sample"``
            or ``"stochastic-contrastive"`` (``docs/strategies.md``). Several, separated by commas, where each runs one
            row a token (fsd, fsd-vec, guard, greedy, sample): requests may then name theirs, others have the first.
        slots: sequences that are written at a time; default 16. With ``memory`` it is computed instead.
        memory: share of the free memory, above 0 and at most 1, that the caches may take.
        processor: ``factory(request: dict, tokenizer)``, or its ``module:factory`` spelling, that returns the logits
            processors and stopping criteria of a request (one, a list, or None).
        seed: of the random strategies, where a request has none of its own.
        trace: record the candidates of every token, and why one won.
        batching: ``"slots"`` (rows of different lengths, replaced one by one), ``"static"`` (batches of similar
            length), or ``"auto"``: slots where a trial agrees with the model's own step.
        share_prefixes: copy what a slot holds already of a prompt, 64 tokens or more, instead of running it again. A
            prompt is then run in other pieces than alone, which rounds differently. With ``center`` none is copied:
            the mean of a prompt is taken out of states as they come from the model.
        weights: ``"int8"`` or ``"lossless"``, as of `ContrastiveSearch`, for models on the CPU.
        parameters: defaults of what requests may set (`Parameters`): ``max_new_tokens``, ``penalty_alpha``, ``top_k``,
            ``logprobs`` …

    Raises:
        ValueError: a value outside its range; ``batching="slots"`` for a model that cannot; ``weights`` for one that is
            not on the CPU.
        RuntimeError: ``weights`` without the C++ extension.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        strategy: str = "contrastive",
        slots: int | None = None,
        memory: float | None = None,
        processor: str | Factory | None = None,
        seed: int = 0,
        trace: bool = False,
        batching: str = "auto",
        share_prefixes: bool = True,
        weights: str | None = None,
        **parameters: Any,
    ):
        self.defaults = check_options(strategy, slots, memory, seed, batching, weights, parameters)
        self.strategy_name, self.parameters = next(iter(self.defaults.items()))
        require(isinstance(trace, bool), "trace", trace, "True or False")
        require(isinstance(share_prefixes, bool), "share_prefixes", share_prefixes, "True or False")
        self.model, self.tokenizer = model, tokenizer
        if weights is not None:
            WeightCopies(weights).check(model)
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        most = {name: limits(name, own) for name, own in self.defaults.items()}
        for name, value in ((n, v) for each in most.values() for n, v in each.items() if n != "fsd_n"):
            if value > vocabulary:
                raise ValueError(f"{name} must be at most the vocabulary size {vocabulary}, got {value}")
        self.strategy = make_strategy(self.defaults)
        factory = load_factory(processor) if isinstance(processor, str) else processor
        usable = factory is None or callable(factory)
        require(usable, "processor", processor, "a callable or 'module:factory'")
        self.prepare = Preparer(
            model,
            tokenizer,
            seed=seed,
            factory=factory,
            limits=most,
            center=self.parameters.center,
            trace=trace,
        )
        self.backend = self._backend(batching, slots, memory, share_prefixes, weights)
        self.prompt_tokens = 0
        self._is_generating = False

    @property
    def on_step(self) -> Callable[[], None] | None:
        """Called after each step, for a display."""
        return self.backend.on_step

    @on_step.setter
    def on_step(self, step: Callable[[], None] | None) -> None:
        self.backend.on_step = step

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: str | None = None,
        dtype: Any = "auto",
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Engine:
        """An engine for ``name``: a folder, a hub name or ``"bundled"``.

        Args:
            device, dtype, trust_remote_code: see `load_model`, which also says what is raised.
        """
        model, tokenizer = load_model(name, device, dtype, trust_remote_code=trust_remote_code)
        return cls(model, tokenizer, **options)

    def _backend(
        self, batching: str, slots: int | None, memory: float | None, share_prefixes: bool, weights: str | None
    ) -> Any:
        from .scheduler import DEFAULT_SLOTS, SlotScheduler
        from .static import StaticBatches

        self.reason = "asked for"
        if batching != "static":
            with fitting_threads(self.model):
                scheduler = SlotScheduler.open(self.model, self.strategy, slots, memory, self.parameters.max_new_tokens)
            if isinstance(scheduler, SlotScheduler):
                scheduler.shares_prefixes = share_prefixes and not self.strategy.centers
                scheduler.weights = None if weights is None else WeightCopies(weights)
                self.reason = "a trial agrees with the model's own steps"
                return scheduler
            self.reason = scheduler
            if batching == "slots":
                raise ValueError(f"batching='slots' cannot serve {type(self.model).__name__}: {scheduler}")
        with fitting_threads(self.model):
            static = StaticBatches(self.model, self.tokenizer, self.strategy, slots or DEFAULT_SLOTS, weights)
        if static.one_length is not None:
            self.reason += f"; only prompts of one length go together: {static.one_length}"
            logger.warning("%s: %s", type(self.model).__name__, self.reason)
        return static

    # ---- generation -----------------------------------------------------------------------------------------------

    def generate(
        self,
        requests: str | Mapping[str, Any] | Request | Iterable[str | Mapping[str, Any] | Request],
        *,
        ordered: bool = False,
        on_text: OnText | None = None,
    ) -> Iterator[Result]:
        """Results of many requests for one model, errors included: nothing about one request is raised.

        Within transformers' ``generate`` it is `ContrastiveSearch`, over any other model `simctg_fast.generate`.

        Args:
            requests: dicts with the keys of the JSONL format, plain strings (prompts), or `Request` objects, or a
                single one of these; read as needed, some thousand ahead.
            ordered: results in the order of the requests; those that are finished before an earlier one wait in memory.
                By default they come as they are finished: `Result.id` says which is which, `Result.index` its place.
            on_text: called with a request, the number of the continuation and what is new of its text, as it comes.

        Raises:
            TypeError: ``requests`` is none of these.
            RuntimeError: results of another call are still being written.
        """
        if isinstance(requests, str | Mapping | Request):
            requests = [requests]
        if isinstance(requests, bytes) or not isinstance(requests, Iterable):
            raise TypeError(
                f"requests must be a string, a dict, a Request or an iterable of them, got {requests!r:.80}"
            )
        self.backend.stopping = False
        results = self._results(iter(requests), on_text)
        return _in_order(results) if ordered else results

    def _results(self, requests: Iterator[Any], on_text: OnText | None) -> Iterator[Result]:
        if self._is_generating:
            raise RuntimeError("this engine is still writing results of another call; end that first, or make another")
        self._is_generating = True
        try:
            yield from self._run(requests, on_text)
        finally:
            self._is_generating = False

    def _run(self, requests: Iterator[Any], on_text: OnText | None) -> Iterator[Result]:
        ready: deque[Result] = deque()
        # Of each request its place and what has ended, by id(request), which the sequences keep alive.
        waiting: dict[int, tuple[int, list[Sequence]]] = {}
        embeddings = Embeddings(self.model, self.tokenizer, self.prepare)
        numbers = itertools.count()

        def sequences() -> Iterator[Sequence]:
            while not embeddings.is_due:
                item: Any = next(requests, _END)
                if item is _END:
                    return
                if item is IDLE:
                    yield IDLE
                    continue
                place = next(numbers)
                try:
                    # A copy: the same request may come twice.
                    request = replace(item) if isinstance(item, Request) else self.parse(item, number=place + 1)
                    if request.inputs is not None:
                        embeddings.add(request, place)
                        continue
                    prepared = self.prepare(request, None if on_text is None else partial(on_text, request))
                except RequestError as error:
                    known = item if isinstance(item, Request) else None
                    ready.append(from_request_error(error, known, index=place))
                    continue
                self.prompt_tokens += sum(len(s.source_ids or s.prompt_ids) for s in prepared[:: request.parameters.n])
                waiting[id(prepared[0].request)] = (place, [])
                yield from prepared

        with fitting_threads(self.model):
            while True:
                for sequence in self.backend.run(sequences()):
                    while ready:
                        yield ready.popleft()
                    if sequence is IDLE:
                        embeddings.is_wanted = not self.backend.active
                        continue
                    place, siblings = waiting[id(sequence.request)]
                    siblings.append(sequence)
                    if len(siblings) == sequence.request.count:
                        del waiting[id(sequence.request)]
                        yield _finish(siblings, place)
                yield from ready
                ready.clear()
                # No forward of the model itself while slots are in place: texts to embed are kept until then.
                if self.backend.stopping or not embeddings.waiting:
                    return
                yield from embeddings.run()

    def parse(
        self,
        record: str | Mapping[str, Any],
        *,
        line: int | None = None,
        number: int | None = None,
        digest: str = "",
    ) -> Request:
        """Check one request. Raises `RequestError`."""
        if isinstance(record, str):
            record = {"prompt": record}
        if not isinstance(record, Mapping):
            raise RequestError("not_an_object", f"a request must be a dict or a string, got {type(record).__name__}")
        return parse_request(record, self.defaults, self.strategy_name, line=line, number=number, digest=digest)

    def stop(self) -> None:
        """Begin no further sequence; those in work are finished. What was not begun gets no result."""
        self.backend.stopping = True

    @property
    def stats(self) -> dict[str, Any]:
        """What was done so far: forwards, how full they were, how often memory ran out; and why steps are not
        replayed as a CUDA graph (None: nothing is in the way)."""
        backend = self.backend
        busy = backend.busy_row_steps / backend.row_steps if backend.row_steps else 0.0
        return {
            "batching": backend.kind,
            "slots": backend.slots,
            "active": backend.active,
            "steps": backend.steps,
            "slots_busy": round(busy, 4),
            "near_ties": self.strategy.near_ties,
            "out_of_memory": backend.halvings,
            "not_captured": backend.not_captured,
            "prompt_tokens": self.prompt_tokens,
            "shared_tokens": backend.shared_tokens,
            "generated_tokens": backend.generated,
        }


def check_options(
    strategy: str,
    slots: int | None,
    memory: float | None,
    seed: int,
    batching: str,
    weights: str | None,
    parameters: Mapping[str, Any],
) -> dict[str, Parameters]:
    """The defaults of a run's requests, by strategy; ValueError for an option outside its range."""
    # Python's own numbers: a job's manifest keeps them.
    require(slots is None or (type(slots) is int and slots >= 1), "slots", slots, "an integer of at least 1")
    is_share = memory is None or (isinstance(memory, int | float) and is_number(memory, 0, 1, above=True))
    require(is_share, "memory", memory, "a share above 0 and at most 1")
    if slots is not None and memory is not None:
        raise ValueError(f"slots={slots} and memory={memory} both say how many slots there are: give one of them")
    require(type(seed) is int and 0 <= seed < 2**63, "seed", seed, "an integer from 0 to 2**63 - 1")
    require(batching in BATCHING, "batching", batching, f"one of {', '.join(BATCHING)}")
    if weights is not None:
        check_weights(weights)
    unknown = [name for name in parameters if name not in NAMES]
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}; parameters of requests: {', '.join(NAMES)}")
    named = {name: value for name, value in parameters.items() if value is not None}
    return run_defaults(strategy, named)


def _finish(siblings: list[Sequence], index: int) -> Result:
    siblings.sort(key=lambda s: s.index)
    request = siblings[0].request
    for sequence in siblings:
        if sequence.failure is not None:
            return error_result(*sequence.failure, request=request, index=index)
    prompt = sum(len(s.source_ids or s.prompt_ids) for s in siblings[:: request.parameters.n])
    seconds = time.monotonic() - min(s.started for s in siblings)
    return from_choices(request, prompt, [s.choice() for s in siblings], seconds, index=index)


def _in_order(results: Iterator[Result]) -> Iterator[Result]:
    waiting: dict[int, Result] = {}
    following = 0
    for result in results:
        waiting[result.index] = result
        while following in waiting:
            yield waiting.pop(following)
            following += 1
    yield from (waiting[index] for index in sorted(waiting))  # after `stop` some were never begun
