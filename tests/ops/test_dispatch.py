"""The one chooser: what serves a call by default, and what it says of one that was asked for by name."""

import pytest
import torch

from simctg_fast.ops import _backends
from simctg_fast.ops.dispatch import choose

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
