"""Offline generation on a Ray cluster: a class for ``map_batches``, and ``simctg-fast run --ray``.

    import ray
    from simctg_fast.integrations.ray import BatchGenerator

    (
        ray.data.read_json("s3://bucket/prompts/")
        .map_batches(
            BatchGenerator,
            fn_constructor_kwargs={"model": "s3-mounted/model", "slots": 64},
            batch_size=512,                        # large: the engine keeps its slots full from within a batch
            compute=ray.data.ActorPoolStrategy(size=8),
            num_gpus=1,
        )
        .write_json("s3://bucket/completions/")
    )

Ray's own ``CheckpointConfig(id_column="id", …)`` resumes such a pipeline after a crash. It filters Arrow's blocks only:
``read_json(…, lines=True)`` makes pandas', and then resuming fails. (Without ``lines`` it reads JSON lines as well.)

The job (``run_on_ray``) leaves reading, the journal and resuming to the process that starts it, so its output is that
of a run without Ray; workers only generate. A worker that dies is started again and its block repeated.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np

from ..engine import Engine
from ..engine.job.job import Answers, Job, JobOptions, engine_options
from ..engine.job.summary import Summary
from ..engine.parameters import NAMES
from ..engine.requests import Request
from ..engine.results import Record
from ..engine.sequence import IDLE

__all__ = ["BatchGenerator", "run_on_ray"]

logger = logging.getLogger("simctg_fast")

_BLOCK_ROWS = 256  # requests a block: what a worker that dies has to repeat, and what keeps its slots full
_BLOCKS_PER_WORKER = 4  # at least, so that none waits long for another


class BatchGenerator:
    """Continues the rows of a batch. Errors are recorded in their row and never raised.

    Columns that are requests' keys (``id``, ``prompt``, ``messages``, ``source``, ``max_new_tokens`` …) are read; all
    columns are handed on, with ``text``, ``token_ids``, ``finish_reason``, ``prompt_tokens``, ``completion_tokens`` and
    ``error`` (a JSON text, empty where there is none) beside them.

    Args:
        model: folder or hub name, reachable from every worker.
        threads: of torch in this worker; default: Ray's own setting.
        options: those of :class:`simctg_fast.engine.Engine`, and ``device``, ``dtype`` and ``trust_remote_code`` of
            `load_model`; Ray decides which GPU is the first.
    """

    def __init__(self, model: str, *, threads: int | None = None, **options: Any):
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        self.engine = Engine.from_pretrained(model, **options)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [name for name in ("prompt", "messages", "source", *NAMES) if name in batch]
        count = len(next(iter(batch.values()))) if batch else 0
        # Ids must be unique within a batch; the rows' own need not be, and may be missing.
        requests = [{"id": row} | _fields(batch, names, row) for row in range(count)]
        answers = list(self.engine.generate(requests, ordered=True))
        return dict(batch) | {
            "text": _objects([answer.text for answer in answers]),
            "token_ids": _objects([np.asarray(answer.token_ids, dtype=np.int64) for answer in answers]),
            "finish_reason": _objects([answer.finish_reason for answer in answers]),
            "prompt_tokens": np.array([answer.usage["prompt_tokens"] for answer in answers], dtype=np.int64),
            "completion_tokens": np.array([answer.usage["completion_tokens"] for answer in answers], dtype=np.int64),
            "error": _objects(["" if answer.error is None else json.dumps(answer.error) for answer in answers]),
        }


def _fields(batch: dict[str, np.ndarray], names: list[str], row: int) -> dict[str, Any]:
    values = {name: _plain(batch[name][row]) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _plain(value: Any) -> Any:
    """A cell as JSON types: Ray hands out numpy's, and NaN for a number that is missing."""
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return int(value) if value.is_integer() else value
    return value


def _objects(values: list[Any]) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


class _LineGenerator(BatchGenerator):
    """Lines of input in, the fields of `Record` out: the rows of ``run_on_ray``."""

    def __init__(self, *, model_name: str, created: int, **options: Any):
        super().__init__(**options)
        self.model_name, self.created = model_name, created

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        requests = [
            self.engine.parse(json.loads(line), line=int(number), digest=str(digest))
            for line, number, digest in zip(batch["line"], batch["number"], batch["digest"], strict=True)
        ]
        records = [result.as_record(self.model_name, self.created) for result in self.engine.generate(requests)]
        return {field.name: _objects([getattr(r, field.name) for r in records]) for field in fields(Record)}


def run_on_ray(
    options: JobOptions,
    *,
    workers: int = 1,
    address: str | None = None,
    threads: int | None = None,
    **settings: Any,
) -> Summary:
    """The job ``options`` on ``workers`` engines of a Ray cluster: same files, same lines, same resume as without Ray.

    A signal ends it at once: blocks that are in work are repeated by the next run.

    Args:
        options: of the job. The model has to be reachable by its name from every worker.
        workers: engines; each takes a GPU where the cluster has any.
        address: of a running cluster; by default one is started on this machine and ended with the job.
        threads: of torch in each worker without a GPU; default: the processors here, shared out.
        settings: ``log_json``, ``quiet``, ``changed`` and ``retry_errors`` of a `Job`.

    Raises:
        ImportError: Ray, pandas or pyarrow does not load; the message names which. Otherwise as
            :class:`simctg_fast.engine.job.Job`.
    """
    return _RayJob(options, workers, address, threads, **settings).run()


def _import_ray() -> Any:
    """Ray, with ``ray.data`` and what that imports only when it runs. Raises ImportError that names what fails."""
    name = ""
    try:
        for name in ("ray", "pandas", "pyarrow", "ray.data"):
            importlib.import_module(name)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == name
        what = "Ray" if name == "ray" else name
        why = "is not installed" if absent else f"does not load ({error})"
        raise ImportError(f"--ray needs {what}, which {why}: pip install 'simctg_fast[ray]'") from error
    return importlib.import_module("ray")


class _RayJob(Job):
    """A job whose requests are answered by the workers of a cluster."""

    def __init__(self, options: JobOptions, workers: int, address: str | None, threads: int | None, **settings: Any):
        self.ray = _import_ray()
        super().__init__(options, **settings)
        self.workers, self.address, self.threads = workers, address, threads

    @contextmanager
    def _open(self, slots: int | None) -> Iterator[Answers]:
        with _cluster(self.ray, self.address, self.workers):
            yield self._answers

    def _answers(self, requests: Iterator[Request]) -> Iterator[Record]:
        waiting = [
            {"line": json.dumps(dict(request.raw)), "number": request.line, "digest": request.digest}
            for request in requests
            if request is not IDLE
        ]
        options = self.options
        self.ray.data.DataContext.get_current().enable_progress_bars = False
        gpus = self.ray.cluster_resources().get("GPU", 0) > 0 and options.device != "cpu"
        blocks = max(-(-len(waiting) // _BLOCK_ROWS), min(len(waiting), _BLOCKS_PER_WORKER * self.workers))
        threads = self.threads
        if threads is None and not gpus:
            threads = max(1, (os.cpu_count() or 1) // self.workers)
        constructor = {
            "model": os.path.abspath(options.model) if os.path.isdir(options.model) else os.fspath(options.model),
            "model_name": os.fspath(options.model),
            "created": self.created,
            "threads": threads,
            **engine_options(options),
        }
        data = self.ray.data.from_items(waiting, override_num_blocks=blocks).map_batches(
            _LineGenerator,
            fn_constructor_kwargs=constructor,
            batch_size=None,  # a block at a time
            compute=self.ray.data.ActorPoolStrategy(size=self.workers),
            num_cpus=None if gpus else 0.5,
            num_gpus=1 if gpus else None,
        )
        for row in data.iter_rows():
            yield Record(**row)

    def _stop(self) -> None:
        self._interrupt()

    def _stats(self) -> dict[str, Any]:
        return {"batching": f"ray, {self.workers} workers", "slots": self.options.slots}


@contextmanager
def _cluster(ray: Any, address: str | None, workers: int) -> Iterator[None]:
    """Joins the cluster at ``address``, or starts one for the length of a ``with`` block."""
    if ray.is_initialized():
        yield
        return
    paths = os.pathsep.join(dict.fromkeys([path for path in sys.path if path] + [os.getcwd()]))
    settings: dict[str, Any] = {"address": address}
    if address is None:
        settings = {"runtime_env": {"env_vars": {"PYTHONPATH": paths}}, "include_dashboard": False}
        # Logical processors: a cluster of two would have none left for reading beside two workers.
        settings["num_cpus"] = max(4, 2 * workers, os.cpu_count() or 1)
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **settings)
    try:
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # its plans and timings are not the user's
        yield
    finally:
        ray.shutdown()
