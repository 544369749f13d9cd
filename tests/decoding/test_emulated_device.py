"""A dress rehearsal for a GPU: whole calls with tensors of an emulated CUDA device and our Triton kernels in their
interpreter give what they give on the CPU, and what mixes devices raises."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from ..emulated_cuda import CudaTensor, emulated_device
from ..processes import run_child
from ..repository import WITH_TESTS

pytest.importorskip("triton")

FAST = ("captured-llama generated-t5 engine-gpt2 losses",)
FULL = (
    "generated-bloom texts crf",
    "captured-gpt2 captured-mistral captured-gemma2 generated-bart generated-uncached",
    "engine-t5 engine-static engine-greedy engine-sample engine-stochastic",
)


@pytest.mark.parametrize("cases", [*FAST, *(pytest.param(cases, marks=pytest.mark.full) for cases in FULL)])
def test_calls_on_a_device_give_the_results_of_the_cpu(cases):
    command = [sys.executable, "-W", "ignore", "-m", "tests.device_cases", *cases.split()]
    done = run_child(command, env=os.environ | {"PYTHONPATH": WITH_TESTS}, cwd="/")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines() == [f"{case} as on the CPU" for case in cases.split()]


def test_devices_do_not_mix(monkeypatch):
    with emulated_device(monkeypatch):
        x = CudaTensor(torch.arange(3.0))
        assert x.is_cuda
        assert torch.zeros(2, device="cuda:0").device == x.new_ones(2).device == x[[0, 1]].device == x.device
        assert (x.sum().item(), x.tolist(), x.add_(1).cpu().tolist()) == (3, [0, 1, 2], [1, 2, 3])
        assert torch.equal((x * torch.tensor(2.0)).cpu(), torch.tensor([2.0, 4.0, 6.0]))  # one number may be anywhere
        assert x.to("cpu").device.type == torch.zeros(2).device.type == "cpu"
        for mixed in (
            lambda: x + torch.ones(3),
            lambda: torch.cat([torch.ones(1), x]),
            lambda: x.gather(0, torch.arange(2)),
        ):
            with pytest.raises(RuntimeError, match="to be on the same device"):
                mixed()
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            x.numpy()
