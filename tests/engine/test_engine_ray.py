"""Ray: the adapter without its framework, and one job on a real cluster, one of its workers killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from simctg_fast.engine import Engine
from simctg_fast.integrations.ray import BatchGenerator

from ..decoding_models import shared, tokenizer
from ..engine_jobs import read_records, save_model, sorted_lines, wait_for_records, write_lines
from ..processes import LIMIT, run_child, started
from ..repository import INSTALLED
from .test_engine_job import requests


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def test_a_batch_of_rows(model):
    """As Ray hands them out: numpy's types, NaN and None for what a row lacks."""
    generator = BatchGenerator(str(model), slots=3, max_new_tokens=6, threads=1)
    batch = {
        "id": np.array([5, 5, 7]),
        "prompt": np.array(["hello", "", "world"], dtype=object),
        "max_new_tokens": np.array([np.nan, 4.0, 3.0]),
        "note": np.array(["a", "b", "c"], dtype=object),
    }
    out = generator(batch)
    assert out["id"].tolist() == [5, 5, 7]
    assert out["note"].tolist() == ["a", "b", "c"]
    assert out["completion_tokens"].tolist() == [6, 0, 3]
    assert json.loads(out["error"][1])["type"] == "empty_prompt"
    assert out["error"][0] == out["error"][2] == ""
    engine = Engine(shared("gpt2"), tokenizer(), slots=1, max_new_tokens=6)
    alone = {r.id: r for r in engine.generate([{"id": 0, "prompt": "hello"}])}
    assert out["text"][0] == alone[0].text
    assert out["token_ids"][0].tolist() == alone[0].token_ids
    assert set(generator({name: column[:0] for name, column in batch.items()})) == set(out)


def workers() -> list[int]:
    """Ray's processes that hold an engine."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if command.startswith((b"ray::MapWorker", b"ray::_MapWorker")):
            found.append(int(folder.name))
    return found


@pytest.mark.xdist_group("ray")
@pytest.mark.timeout(3 * LIMIT)
@pytest.mark.full
def test_a_job_on_ray_with_a_worker_killed(model, tmp_path, children):
    """Begun without Ray, continued with it, a worker killed meanwhile: the output is that of one uninterrupted run."""
    pytest.importorskip("ray")
    if sys.platform != "linux":
        pytest.skip("looks for processes in /proc")
    source = write_lines(tmp_path / "in.jsonl", [*requests(120), {"id": "bad", "prompt": "x", "top_k": 9}, "no json"])
    settings = ["-m", model, "--slots", 8, "--max-new-tokens", 24, "--quiet"]
    environment = os.environ | {"PYTHONPATH": str(INSTALLED), "OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0"}
    before = set(workers())

    def start(out: Path, *more: object) -> subprocess.Popen:
        command = [sys.executable, "-m", "simctg_fast.cli", "run", source, "-o", out, *settings, *more]
        return children.enter_context(started(command, env=environment, stdout=subprocess.PIPE, text=True))

    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    single = start(whole)
    single.communicate()
    assert single.returncode == 1, "two error records"
    out.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:30]))
    shutil.copy(f"{whole}.manifest.json", f"{out}.manifest.json")
    first = out.read_bytes()
    job = start(out, "--ray", "--workers", 2)
    # In the middle of the work: one block's answers are there, others are being written.
    wait_for_records(out, 33, seconds=LIMIT)
    victims = set(workers()) - before
    assert job.poll() is None
    assert victims, "no worker was seen"
    os.kill(min(victims), signal.SIGKILL)
    printed, _ = job.communicate(timeout=LIMIT)
    assert job.returncode == 1
    summary = json.loads(printed.splitlines()[-1])
    assert summary["resumed"] == 30
    assert summary["requests"] == 92
    assert out.read_bytes().startswith(first)
    assert sorted_lines(out) == sorted_lines(whole)


@pytest.mark.full
@pytest.mark.xdist_group("ray")
@pytest.mark.timeout(3 * LIMIT)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_job_on_ray_that_is_interrupted(model, tmp_path, number, children):
    """It ends with what its workers have handed over, and says how to go on; here without Ray."""
    pytest.importorskip("ray")
    source = write_lines(tmp_path / "in.jsonl", requests(120))
    environment = os.environ | {"PYTHONPATH": str(INSTALLED), "OMP_NUM_THREADS": "1"}
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "simctg_fast.cli", "run", source, "-m", model, "--slots", 8, "-n", 24]

    def start(*more: object) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return children.enter_context(started([*command, *more], env=environment, text=True, **pipes))

    job = start("-o", out, "--ray", "--log-json")
    wait_for_records(out, 1, seconds=LIMIT)
    os.kill(job.pid, number)
    printed, errors = job.communicate(timeout=LIMIT)
    assert job.returncode == 128 + number, errors
    written = out.read_bytes()
    count = len(read_records(out))
    assert 0 < count < 120
    assert json.loads(printed.splitlines()[-1])["requests"] == count
    assert "the same command goes on from here" in errors
    events = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    assert (events[-1]["event"], events[-1]["done"], events[-1]["total"]) == ("end", count, 120)
    rest, whole = start("-o", out), start("-o", tmp_path / "whole.jsonl")
    assert [job.communicate() and job.returncode for job in (rest, whole)] == [0, 0]
    assert out.read_bytes().startswith(written)
    assert sorted_lines(out) == sorted_lines(tmp_path / "whole.jsonl")


PIPELINE = """
import sys, ray, ray.data
from ray.data.checkpoint import CheckpointConfig
from simctg_fast.integrations.ray import BatchGenerator

model, source, out, checkpoint = sys.argv[1:]
ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
ray.data.DataContext.get_current().checkpoint_config = CheckpointConfig(id_column="id", checkpoint_path=checkpoint)
(
    ray.data.read_json(source, override_num_blocks=12)
    .map_batches(
        BatchGenerator,
        fn_constructor_kwargs={"model": model, "slots": 8, "max_new_tokens": 200, "threads": 1},
        batch_size=10,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=0.5,
    )
    .write_json(out)
)
"""


@pytest.mark.full
@pytest.mark.xdist_group("ray")
@pytest.mark.timeout(3 * LIMIT)
def test_a_pipeline_of_ones_own_killed_and_resumed_by_rays_checkpoint(model, tmp_path, children):
    """``map_batches`` under Ray's `CheckpointConfig`: the driver is killed, the same script goes on, every id is there
    once."""
    pytest.importorskip("ray")
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for number in range(12):
        rows = [{"id": f"r{10 * number + i}", "prompt": "abc " * (1 + i)} for i in range(10)]
        write_lines(source / f"{number:02}.jsonl", rows)
    environment = os.environ | {"PYTHONPATH": str(INSTALLED), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PIPELINE, *map(str, (model, source, out, tmp_path / "checkpoint"))]

    def answered() -> list[str]:
        return [record["id"] for file in out.glob("*.json") for record in read_records(file)]

    run = children.enter_context(started(command, env=environment, stderr=subprocess.DEVNULL))
    limit = time.monotonic() + LIMIT
    while run.poll() is None and len(list(out.glob("*.json"))) < 3 and time.monotonic() < limit:
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, "it was done before it could be killed"
    time.sleep(3)  # its cluster notices
    before = answered()
    assert 0 < len(before) < 120
    run_child(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    after = answered()
    assert sorted(after) == sorted(f"r{i}" for i in range(120))
    assert set(before) <= set(after)
