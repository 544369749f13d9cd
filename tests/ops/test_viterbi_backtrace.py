"""`viterbi_backtrace`: C++ and PyTorch against the loop of the reference."""

from __future__ import annotations

import pytest
import torch

from simctg_fast import viterbi_backtrace
from simctg_fast.ops import _backends
from simctg_fast.reference.viterbi import viterbi_backtrace as reference

DTYPES = (torch.uint8, torch.uint16, torch.int32, torch.int64)
SIGNED = (torch.int32, torch.int64)
needs_extension = pytest.mark.skipif(_backends.extension() is None, reason="the C++ extension is not built")
IMPLS = ("auto", "torch", pytest.param("cpu", marks=needs_extension))


def draw(batch, length, slots, dtype=torch.int64, *, lengths=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    backpointers = torch.randint(0, slots, (batch, length, slots), generator=generator).to(dtype)
    last = torch.randint(0, slots, (batch,), generator=generator)
    if lengths == "random":
        lengths = torch.randint(0, length + 1, (batch,), generator=generator)
    return backpointers, last, lengths


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [None, "random"], ids=["full", "ragged"])
@pytest.mark.parametrize(
    ("batch", "length", "slots"),
    [
        (1, 1, 1),  # nothing to follow
        (3, 1, 5),  # row 0 only, which must not be read
        (2, 7, 1),  # one slot
        (5, 33, 64),
        (33, 9, 3),  # more items than threads
        (0, 4, 3),  # no items
        (2, 0, 3),  # no steps
    ],
)
def test_matches_reference(impl, dtype, lengths, batch, length, slots):
    arguments = draw(batch, length, slots, dtype, lengths=lengths)
    path = viterbi_backtrace(*arguments, impl=impl)
    assert path.dtype == torch.int64
    assert path.shape == (batch, length)
    assert torch.equal(path, reference(*arguments))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("dtype", "slots"), [(torch.uint8, 256), (torch.uint16, 65536)], ids=["uint8", "uint16"])
def test_the_largest_slot_is_not_negative(impl, dtype, slots):
    backpointers = torch.full((2, 3, slots), slots - 1, dtype=torch.int64).to(dtype)
    path = viterbi_backtrace(backpointers, torch.tensor([0, slots - 1]).to(dtype), impl=impl)
    assert path.tolist() == [[slots - 1, slots - 1, 0], [slots - 1] * 3]


@pytest.mark.parametrize("impl", IMPLS)
def test_lengths(impl):
    backpointers, last, _ = draw(4, 6, 5)
    last = torch.tensor([99, 1, 2, 3])  # the first item has length 0, so its slot is not read
    path = viterbi_backtrace(backpointers, last, torch.tensor([0, 1, 4, 6], dtype=torch.int32), impl=impl)
    assert path[0].tolist() == [-1] * 6
    assert path[1].tolist() == [1, -1, -1, -1, -1, -1]
    assert (path[2, 4:] == -1).all()
    assert path[2, 3] == 2
    assert (path[3] >= 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_reads_only_what_the_path_runs_through(impl):
    backpointers, last, _ = draw(3, 8, 4)
    lengths = torch.tensor([8, 5, 0])
    expected = reference(backpointers, last, lengths)
    backpointers[:, 0] = -7
    for b in range(3):
        for t in range(1, 8):
            on_path = int(expected[b, t])
            for slot in range(4):
                if slot != on_path:
                    backpointers[b, t, slot] = 10**9
    assert torch.equal(viterbi_backtrace(backpointers, last, lengths, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_views(impl, dtype):
    backpointers, last, lengths = draw(6, 10, 8, dtype, lengths="random")
    expected = reference(backpointers, last, lengths)
    permuted = backpointers.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not permuted.is_contiguous()
    assert torch.equal(viterbi_backtrace(permuted, last, lengths, impl=impl), expected)
    every_other = torch.stack([last, last + 1], dim=1)[:, 0]
    assert torch.equal(viterbi_backtrace(permuted, every_other, lengths, impl=impl), expected)
    sliced = backpointers.repeat_interleave(2, dim=2)[..., ::2]
    assert torch.equal(viterbi_backtrace(sliced, last, lengths, impl=impl), expected)
    one = backpointers[:1].expand(6, -1, -1)  # stride 0 in the batch
    assert torch.equal(viterbi_backtrace(one, last, lengths, impl=impl), reference(one, last, lengths))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_slot_out_of_range_is_named(impl, dtype):
    backpointers, last, _ = draw(4, 6, 5)
    path = reference(backpointers, last)
    for b, t in ((3, 2), (2, 4), (2, 1)):  # the first item is reported, at the step the walk meets first
        backpointers[b, t, path[b, t]] = 5
    with pytest.raises(ValueError, match=rf"backpointers\[2, 4, {path[2, 4]}\] is 5, must be in 0\.\.4"):
        viterbi_backtrace(backpointers.to(dtype), last, impl=impl)
    if dtype in SIGNED:
        backpointers[0, 5, path[0, 5]] = -1
        with pytest.raises(ValueError, match=rf"backpointers\[0, 5, {path[0, 5]}\] is -1, must be in 0\.\.4"):
            viterbi_backtrace(backpointers.to(dtype), last, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_last_and_lengths_out_of_range_are_named(impl):
    backpointers, last, _ = draw(3, 6, 5)
    for value in (-1, 5):
        with pytest.raises(ValueError, match=rf"last\[1\] is {value}, must be in 0\.\.4"):
            viterbi_backtrace(backpointers, torch.tensor([0, value, 0]), torch.tensor([6, 3, 6]), impl=impl)
    for value in (-1, 7):
        with pytest.raises(ValueError, match=rf"lengths\[2\] is {value}, must be in 0\.\.6"):
            viterbi_backtrace(backpointers, last, torch.tensor([6, 6, value]), impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backpointers": torch.zeros(2, 3)}, r"backpointers has shape \(2, 3\), must be \(batch, length, slots\)"),
        ({"backpointers": torch.zeros(2, 3, 0, dtype=torch.uint8)}, r"shape \(2, 3, 0\).*slots >= 1"),
        ({"backpointers": torch.zeros(2, 3, 4)}, r"backpointers has dtype torch.float32, must be one of torch.uint8"),
        ({"backpointers": torch.zeros(2, 3, 4, dtype=torch.int8)}, r"backpointers has dtype torch.int8"),
        ({"last": torch.zeros(2)}, r"last has dtype torch.float32"),
        ({"last": torch.zeros(3, dtype=torch.int64)}, r"last has shape \(3,\), must be \(2,\)"),
        ({"last": torch.zeros(2, 1, dtype=torch.int64)}, r"last has shape \(2, 1\), must be \(2,\)"),
        ({"last": torch.zeros(2, dtype=torch.int64, device="meta")}, r"last is on meta, backpointers on cpu"),
        ({"lengths": torch.tensor([True, False])}, r"lengths has dtype torch.bool"),
        ({"lengths": torch.tensor([1])}, r"lengths has shape \(1,\), must be \(2,\)"),
    ],
)
def test_wrong_arguments_are_named(impl, change, message):
    arguments = {"backpointers": torch.zeros(2, 3, 4, dtype=torch.int64), "last": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        viterbi_backtrace(**{**arguments, **change}, impl=impl)


def test_arguments_that_are_no_tensors():
    backpointers, last, _ = draw(2, 3, 4)
    with pytest.raises(TypeError, match=r"last is \[0, 1\], must be a tensor"):
        viterbi_backtrace(backpointers, [0, 1])
    with pytest.raises(TypeError, match=r"lengths is \[3, 2\], must be a tensor or None"):
        viterbi_backtrace(backpointers, last, [3, 2])


def test_impl():
    backpointers, last, _ = draw(2, 3, 4)
    with pytest.raises(ValueError, match="impl is 'triton', must be one of 'auto', 'cpu', 'torch'"):
        viterbi_backtrace(backpointers, last, impl="triton")


@needs_extension
def test_impl_picks_the_backend(monkeypatch):
    """`auto` and `cpu` run the C++ function, `torch` does not."""
    calls = []
    real = _backends.extension()

    class Spy:
        def viterbi_backtrace(self, *arguments):
            calls.append(arguments[0])
            return real.viterbi_backtrace(*arguments)

    monkeypatch.setattr(_backends, "extension", Spy)
    monkeypatch.setattr(_backends, "require_extension", Spy)
    arguments = draw(2, 3, 4)
    for impl, expected in (("auto", 1), ("cpu", 1), ("torch", 0)):
        calls.clear()
        viterbi_backtrace(*arguments, impl=impl)
        assert len(calls) == expected, impl


def test_without_the_extension(monkeypatch):
    """`auto` falls back, `cpu` says why it cannot run."""
    error = ImportError("libmissing.so: cannot open shared object file")
    monkeypatch.setattr(_backends, "_attempt", lambda name: (None, error))
    arguments = draw(2, 3, 4)
    assert torch.equal(viterbi_backtrace(*arguments), reference(*arguments))
    with pytest.raises(RuntimeError, match=r"impl='cpu' needs the C\+\+ extension.*libmissing\.so"):
        viterbi_backtrace(*arguments, impl="cpu")


@needs_extension
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_the_path(threads):
    arguments = draw(300, 97, 16, torch.uint8, lengths="random")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(viterbi_backtrace(*arguments, impl="cpu"), viterbi_backtrace(*arguments, impl="torch"))
        arguments[1][[111, 250]] = 16
        arguments[2][[111, 250]] = 97
        with pytest.raises(ValueError, match=r"last\[111\] is 16"):
            viterbi_backtrace(*arguments, impl="cpu")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("permuted", [False, True], ids=["compact", "permuted"])
def test_opcheck(impl, dtype, permuted):
    backpointers, last, lengths = draw(3, 5, 4, dtype, lengths="random")
    if permuted:
        backpointers = backpointers.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    operator = torch.ops.simctg_fast.viterbi_backtrace.default
    torch.library.opcheck(operator, (backpointers, last, lengths), {"impl": impl})
    torch.library.opcheck(operator, (backpointers, last), {"impl": impl})


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_without_a_graph_break(impl, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda b, last, lengths: viterbi_backtrace(b, last, lengths, impl=impl) + 1,
        fullgraph=True,
        dynamic=dynamic,
        backend="aot_eager",
    )
    for batch, length, slots in ((3, 5, 4), (4, 9, 7), (5, 6, 2)):
        arguments = draw(batch, length, slots, torch.int32, lengths="random")
        assert torch.equal(compiled(*arguments), reference(*arguments) + 1)


def test_one_dynamic_graph_serves_all_sizes():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda b, last: viterbi_backtrace(b, last), fullgraph=True, dynamic=True, backend=counter)
    for batch, length, slots in ((3, 5, 4), (4, 9, 7), (6, 8, 3)):
        compiled(*draw(batch, length, slots)[:2])
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(dtype):
    backpointers, last, lengths = draw(9, 33, 17, dtype, lengths="random")
    expected = reference(backpointers, last, lengths)
    path = viterbi_backtrace(backpointers.cuda(), last.cuda(), lengths.cuda())
    assert path.is_cuda
    assert torch.equal(path.cpu(), expected)
    with pytest.raises(ValueError, match="impl='cpu' needs tensors on the CPU"):
        viterbi_backtrace(backpointers.cuda(), last.cuda(), impl="cpu")
    with pytest.raises(ValueError, match=r"last\[0\] is 17, must be in 0..16"):
        viterbi_backtrace(backpointers.cuda(), torch.full((9,), 17, device="cuda"))
