"""Launches of the losses' kernels: what starts without Triton's binding is what Triton would have started."""

from __future__ import annotations

import os
import time

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is on, nothing is compiled", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from simctg_fast.kernels import _launch, contraclm, contrastive_loss, cosine_similarity, simcse  # noqa: E402
from simctg_fast.kernels._launch import start_kernel  # noqa: E402


@triton.jit
def scale_kernel(x_ptr, out_ptr, count, stride, factor, DOUBLE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at * stride, mask=at < count, other=0.0) * factor
    if DOUBLE:
        x = x * 2
    tl.store(out_ptr + at, x, mask=at < count)


SECRET = tl.constexpr(3)


@triton.jit
def global_kernel(x_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x_ptr + at, tl.load(x_ptr + at) * SECRET)


class Driver:
    """Compiles for a GPU that is not there, and notes launches in place of making them."""

    def __init__(self):
        self.launches: list[tuple] = []
        self.device, self.architecture, self.stream = 0, 90, 7
        driver = self

        class Launcher:
            def __init__(self, source, metadata):
                self.signature, self.target = dict(source.signature), metadata.target
                self.attributes = sorted(str(item) for item in source.attrs.items())
                self.options = metadata.num_warps, metadata.num_stages

            def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
                compiled = self.signature, self.attributes, self.options, self.target, packed
                shown = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
                enter(metadata)
                driver.launches.append((compiled, function, (x, y, z), stream, shown))
                leave(metadata)

        self.launcher_cls = Launcher
        self.utils = self

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return self.stream

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name):
        return name

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

    def load_binary(self, name, kernel, shared, device):
        return object(), hash((kernel, device)), 32, 0, 1024

    def unload_module(self, module):
        pass


@pytest.fixture
def driver(monkeypatch):
    new = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", new)
    kernels = (scale_kernel, global_kernel, *SHIPPED)
    caches = [kernel.device_caches for kernel in kernels]
    for kernel in kernels:
        kernel.device_caches = type(kernel.device_caches)(kernel.create_binder)
    monkeypatch.setattr(_launch, "_kept", {})
    yield new
    for kernel, cache in zip(kernels, caches, strict=True):
        kernel.device_caches = cache


SHIPPED = [
    contrastive_loss.norms_kernel,
    contrastive_loss.hinge_kernel,
    contrastive_loss.sums_kernel,
    contrastive_loss.tile_sums_kernel,
    contrastive_loss.gradient_kernel,
    cosine_similarity.cosine_kernel,
    simcse.lse_kernel,
    simcse.weights_kernel,
    contraclm.token_lse_kernel,
    contraclm.token_weights_kernel,
]


@pytest.fixture
def bindings(monkeypatch):
    """Counts Triton's own launches."""
    count = {"number": 0}
    run = triton.JITFunction.run

    def counted(*args, **kwargs):
        count["number"] += 1
        return run(*args, **kwargs)

    monkeypatch.setattr(triton.JITFunction, "run", counted)
    return count


def arguments(**changes):
    """Arguments of `scale_kernel`, its grid and options, some of them changed."""
    memory = torch.zeros(4096, dtype=changes.get("dtype", torch.float32))
    memory = memory[(-memory.data_ptr() % 16) // memory.element_size() :]
    x = memory[changes.get("offset", 0) :]
    numbers = [changes.get("count", 64), changes.get("stride", 3), changes.get("factor", 0.5)]
    options = {"DOUBLE": changes.get("double", False), "BLOCK": changes.get("block", 64)}
    return [x, memory, *numbers], options | {"num_warps": changes.get("warps", 4)}


CHANGES = {
    "nothing": {},
    "dtype": {"dtype": torch.float16},
    "alignment": {"offset": 1},
    "a count that 16 does not divide": {"count": 63},
    "another that it does not divide": {"count": 65},
    "a count that it divides": {"count": 128},
    "one": {"count": 1},
    "a count of 64 bits": {"count": 1 << 40},
    "stride of one": {"stride": 1},
    "stride of 16": {"stride": 16},
    "another factor": {"factor": 0.25},
    "a whole number for a factor": {"factor": 2},
    "a number for a flag": {"double": 1},
    "constant": {"double": True},
    "block": {"block": 128},
    "warps": {"warps": 2},
}


def test_it_starts_what_triton_would_start(driver, bindings):
    """All kinds twice, in one process: each is bound once, and every launch is Triton's own, to the last argument."""
    expected = {}
    for name, changes in CHANGES.items():
        args, options = arguments(**changes)
        scale_kernel[(5,)](*args, **options)
        expected[name] = args, options, driver.launches.pop()
    assert len({str(launch[0]) for _, _, launch in expected.values()}) >= 10  # they do differ
    bindings["number"] = 0
    for round_ in range(2):
        for name, (args, options, launch) in expected.items():
            start_kernel(scale_kernel, (5,), *args, **options)
            assert driver.launches.pop() == launch, (name, round_)
    assert bindings["number"] == len(CHANGES) - 2  # the other factor, and 1 for True, are no kind of their own
    for count in range(1, 40):
        args, options = arguments(count=count)
        scale_kernel[(5,)](*args, **options)
        for _ in range(2):
            start_kernel(scale_kernel, (5,), *args, **options)
        plain, bound, kept = driver.launches[-3:]
        assert plain == bound == kept


def test_device_architecture_stream_and_grid(driver, bindings):
    args, options = arguments()
    start_kernel(scale_kernel, (5,), *args, **options)
    driver.device, driver.architecture = 1, 100
    start_kernel(scale_kernel, (5,), *args, **options)
    first, second = driver.launches
    assert (first[0][3].arch, second[0][3].arch) == (90, 100)
    assert first[1] != second[1]  # loaded on each device
    driver.stream = 11
    start_kernel(scale_kernel, (2, 3, 4), *args, **options)
    assert driver.launches[-1][1:4] == (second[1], (2, 3, 4), 11)
    driver.device = 0
    start_kernel(scale_kernel, (5, 6), *args, **options)
    assert driver.launches[-1][1:4] == (first[1], (5, 6, 1), 11)
    assert bindings["number"] == 2


def test_hooks_around_launches_are_called_with_the_kernels_data(driver):
    args, options = arguments()
    knobs, seen = triton.knobs.runtime, []
    start_kernel(scale_kernel, (5,), *args, **options)

    def before(metadata):
        seen.append(("before", len(driver.launches), metadata.get()))

    def after(metadata):
        seen.append(("after", len(driver.launches), metadata.get()))

    knobs.launch_enter_hook.add(before)
    knobs.launch_exit_hook.add(after)
    try:
        start_kernel(scale_kernel, (5,), *args, **options)
    finally:
        knobs.launch_enter_hook.remove(before)
        knobs.launch_exit_hook.remove(after)
    assert [entry[:2] for entry in seen] == [("before", 1), ("after", 2)]
    assert seen[0][2] == {"name": "scale_kernel", "function": driver.launches[0][1], "stream": driver.stream}


def test_settings_that_change_what_is_compiled(driver, bindings, monkeypatch):
    args, options = arguments()
    for debug in (False, True, False, True):
        monkeypatch.setattr(triton.knobs.runtime, "debug", debug)
        start_kernel(scale_kernel, (5,), *args, **options)
    assert bindings["number"] == 2
    assert driver.launches[0] == driver.launches[2]
    assert driver.launches[1] == driver.launches[3]


def test_what_is_not_simple_is_triton_s_own_launch(driver, bindings, monkeypatch):
    (x, out, *numbers), options = arguments()
    for _ in range(2):
        start_kernel(scale_kernel, (5,), x, out, *numbers[:2], True, **options)  # a bool is a type of its own
    for _ in range(2):
        start_kernel(global_kernel, (1,), x, BLOCK=64, num_warps=4)  # reads a global
    assert bindings["number"] == 4
    seen = []
    start_kernel(scale_kernel, (5,), x, out, *numbers, **options)
    monkeypatch.setattr(scale_kernel, "pre_run_hooks", [lambda *args, **kwargs: seen.append(1)])
    start_kernel(scale_kernel, (5,), x, out, *numbers, **options)
    assert seen == [1]


def test_it_forgets_rather_than_grow(driver, monkeypatch):
    monkeypatch.setattr(_launch, "_KEPT_LIMIT", 8)
    for count in range(2, 40):
        args, options = arguments(count=count)
        start_kernel(scale_kernel, (5,), *args, **options)
        assert 0 < len(_launch._kept) <= 8


@pytest.mark.parametrize("kernel", SHIPPED, ids=lambda kernel: kernel.__name__)
def test_shipped_kernels_can_be_kept(kernel):
    """Constants last, no globals."""
    count = len(kernel.arg_names)
    assert kernel.constexprs == list(range(count - len(kernel.constexprs), count))
    assert kernel.cache_key
    assert not kernel.used_global_vals


@pytest.mark.parametrize(
    ("dtype", "backward"), [(torch.bfloat16, 1), pytest.param(torch.float32, 2, marks=pytest.mark.full)]
)
def test_launches_of_a_training_step(driver, bindings, monkeypatch, dtype, backward):
    """32 x 256, the size at which the host is the limit: three launches forward, bound once and never again."""
    monkeypatch.setattr(contrastive_loss, "precise", lambda: False)  # float32 as two planes
    states = torch.randn(32, 256, 64).to(dtype)
    mask = torch.ones(32, 256, dtype=torch.bool)
    for round_ in range(2):
        driver.launches.clear()
        bindings["number"] = 0
        saved = contrastive_loss.forward(states, mask, None, 0.5, "pairs", True)
        assert len(driver.launches) == 3
        contrastive_loss.backward(torch.ones(()), states, *saved[1:])
        assert len(driver.launches) == 3 + backward
        assert bindings["number"] == (0 if round_ else len(driver.launches))


def main() -> None:
    """Microseconds that Python takes for the launches of 32 x 256 x 64 bfloat16, of which the driver makes none."""
    driver = Driver()
    driver.launcher_cls.__call__ = lambda self, *args: None
    triton.runtime.driver.set_active(driver)
    torch.set_num_threads(1)
    states, mask, grad = torch.randn(32, 256, 64).bfloat16(), torch.ones(32, 256, dtype=torch.bool), torch.ones(())
    saved = contrastive_loss.forward(states, mask, None, 0.5, "pairs", True)[1:]
    cases = {
        "forward": lambda: contrastive_loss.forward(states, mask, None, 0.5, "pairs", True),
        "backward": lambda: contrastive_loss.backward(grad, states, *saved),
    }

    def bound(kernel, grid, *args, **options):
        kernel[grid](*args, **options)

    for name, run in cases.items():
        found = []
        for start in (bound, start_kernel):
            contrastive_loss.start_kernel = start
            times = []
            for _ in range(6000):
                begin = time.perf_counter_ns()
                run()
                times.append(time.perf_counter_ns() - begin)
            found.append(sorted(times)[len(times) // 50] / 1000)  # what others do to the machine comes on top
        print(f"{name}: {found[0]:.1f} bound by Triton, {found[1]:.1f} started directly")


if __name__ == "__main__":
    main()
