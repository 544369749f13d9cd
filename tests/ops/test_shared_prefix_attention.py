"""Attention of k candidates over one copy of their prefix, against the reference in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from simctg_fast.ops.shared_prefix_attention import Call, resolve, shared_prefix_attention
from simctg_fast.reference.attention import shared_prefix_attention as reference

IMPLS = ("auto", "cpu", "torch")  # "triton" is tested in test_decode_triton.py


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, and which features are on. ``mask`` and ``bias`` name the shape ``(rows, heads)`` they are given in."""

    batch: int = 2
    k: int = 4
    heads: int = 4
    kv_heads: int = 4
    length: int = 11
    dim: int = 16
    value_dim: int | None = None
    cross: bool = False
    mask: tuple[str, str] | None = None
    bias: tuple[str, str] | None = None
    softcap: float | None = None
    sinks: bool = False
    window_start: int = 0

    def __str__(self) -> str:
        fields = ((field.name, getattr(self, field.name), field.default) for field in dataclasses.fields(self))
        return ",".join(f"{name}={value}" for name, value, default in fields if value != default) or "plain"


CASES = [
    Case(),
    *(Case(batch=batch, k=k) for batch in (1, 2, 3) for k in (1, 2, 5, 8)),
    Case(length=1),
    Case(length=130, dim=64),
    Case(kv_heads=2),
    Case(kv_heads=1, k=3),
    Case(heads=6, kv_heads=2, k=8, dim=24),
    Case(value_dim=8),
    Case(kv_heads=2, value_dim=24, dim=8),
    Case(cross=True),
    Case(cross=True, kv_heads=2, k=1, mask=("batch", "1")),
    Case(cross=True, mask=("rows", "1"), bias=("1", "heads")),
    Case(mask=("1", "1")),
    Case(mask=("batch", "1")),
    Case(mask=("rows", "1")),
    Case(mask=("batch", "heads"), kv_heads=2),
    Case(mask=("rows", "heads"), kv_heads=2, k=3),
    Case(mask=("batch", "1"), k=1, batch=3),
    Case(mask=("rows", "1"), batch=1),
    Case(bias=("1", "heads")),
    Case(bias=("1", "1")),
    Case(bias=("batch", "heads"), kv_heads=2),
    Case(bias=("rows", "heads"), kv_heads=2),
    Case(bias=("rows", "1"), batch=3, k=2),
    Case(bias=("1", "heads"), mask=("batch", "1")),
    Case(softcap=0.7),
    Case(softcap=0.7, mask=("batch", "1"), bias=("1", "heads"), kv_heads=2),
    Case(sinks=True),
    Case(sinks=True, kv_heads=2, mask=("batch", "1"), window_start=3),
    Case(sinks=True, cross=True, softcap=1.5),
    Case(window_start=5),
    Case(window_start=10, kv_heads=2),
    Case(window_start=11),  # the candidate sees itself alone
    Case(window_start=4, mask=("batch", "1"), bias=("1", "heads")),
    Case(
        window_start=4, mask=("rows", "heads"), bias=("rows", "heads"), softcap=0.9, sinks=True, value_dim=8, kv_heads=2
    ),
]


def arguments_of(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    rows, width = case.batch * case.k, case.length + (not case.cross)
    value_dim = case.value_dim or case.dim
    sizes = {"1": 1, "batch": case.batch, "rows": rows, "heads": case.heads}
    # The model's layouts: heads split off by a transposed view, the cache longer than what is in use.
    arguments = {
        "query": draw(rows, 1, case.heads, case.dim).transpose(1, 2),
        "key": draw(case.batch, case.kv_heads, case.length + 4, case.dim),
        "value": draw(case.batch, case.kv_heads, case.length + 4, value_dim),
        "length": case.length,
        "scaling": 1.3 * case.dim**-0.5,
        "softcap": case.softcap,
        "window_start": case.window_start,
    }
    for name in ("key", "value"):  # neither what is not in use nor what lies before the window may be read
        arguments[name][:, :, case.length :] = float("nan")
        arguments[name][:, :, : case.window_start] = float("nan")
    if not case.cross:
        arguments["new_key"] = draw(rows, 1, case.kv_heads, case.dim).transpose(1, 2)
        arguments["new_value"] = draw(rows, 1, case.kv_heads, value_dim).transpose(1, 2)
    if case.mask:
        shape = (sizes[case.mask[0]], sizes[case.mask[1]], 1, width)
        arguments["mask"] = torch.rand(shape, generator=generator) > 0.4
        arguments["mask"][..., -1] = True
    if case.bias:
        arguments["bias"] = 2 * draw(sizes[case.bias[0]], sizes[case.bias[1]], 1, width)
    if case.sinks:
        arguments["sinks"] = draw(case.heads)
    return arguments


def skip_unless_supported(impl: str, arguments: dict) -> None:
    if impl == "cpu" and resolve("auto", Call(**arguments)) != "cpu":
        pytest.skip("the C++ kernel does not take these arguments here")


def test_the_reference_is_torch_s_attention_over_the_whole_text():
    """Each candidate's text of its own: prefix, key and all, repeated for grouped-query heads."""
    arguments = arguments_of(Case(batch=2, k=3, heads=6, kv_heads=2, bias=("rows", "heads"), mask=("batch", "1")))
    length, groups = arguments["length"], 3
    key, value = (
        torch.cat([arguments[name][:, :, :length].repeat_interleave(3, 0), arguments[f"new_{name}"]], dim=2)
        for name in ("key", "value")
    )
    whole = [x.double().repeat_interleave(groups, dim=1) for x in (key, value)]
    mask = arguments["bias"].double().masked_fill(~arguments["mask"].repeat_interleave(3, 0), -torch.inf)
    expected = torch.nn.functional.scaled_dot_product_attention(
        arguments["query"].double(), *whole, attn_mask=mask, scale=arguments["scaling"]
    )
    torch.testing.assert_close(reference(**arguments), expected.transpose(1, 2), atol=1e-12, rtol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_definition(impl, case):
    arguments = arguments_of(case)
    skip_unless_supported(impl, arguments)
    out = shared_prefix_attention(**arguments, impl=impl)
    truth = reference(**arguments)
    assert out.shape == (case.batch * case.k, 1, case.heads, case.value_dim or case.dim)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), truth, atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "case", [Case(kv_heads=2), Case(bias=("1", "heads"), mask=("batch", "1"), softcap=0.9, sinks=True)], ids=str
)
def test_half_precision_is_as_good_as_plain_torch(case, dtype):
    arguments = arguments_of(case, dtype)
    out = shared_prefix_attention(**arguments)
    truth = reference(**arguments)
    plain = reference(**arguments, dtype=dtype)
    assert out.dtype == dtype
    allowed = 4 * (plain.double() - truth).abs().max()
    assert (out.double() - truth).abs().max() <= allowed


def test_float64_stays_float64():
    arguments = arguments_of(Case(kv_heads=2, sinks=True, mask=("batch", "1")), torch.float64)
    out = shared_prefix_attention(**arguments)
    torch.testing.assert_close(out, reference(**arguments), atol=1e-13, rtol=0)


def test_candidates_do_not_see_each_other():
    arguments = arguments_of(Case(batch=2, k=3))
    before = shared_prefix_attention(**arguments)
    arguments["new_key"] = arguments["new_key"].clone()
    arguments["new_value"] = arguments["new_value"].clone()
    arguments["new_key"][4] += 1
    arguments["new_value"][4] -= 1
    after = shared_prefix_attention(**arguments)
    others = torch.arange(6) != 4
    assert torch.equal(after[others], before[others])
    assert not torch.equal(after[4], before[4])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_view_of_a_longer_cache(impl):
    """The cache grows in blocks: keys and values are strided views of one buffer."""
    arguments = arguments_of(Case(kv_heads=2))
    skip_unless_supported(impl, arguments)
    expected = shared_prefix_attention(**arguments, impl="torch")
    for name in ("key", "value"):
        shape = list(arguments[name].shape)
        shape[2] += 100
        wide = torch.full(shape, float("nan"))
        wide[:, :, : arguments[name].shape[2]] = arguments[name]
        arguments[name] = wide[:, :, : arguments["length"] + 1]
    out = shared_prefix_attention(**arguments, impl=impl)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


def test_arguments_are_not_written_to():
    case = Case(kv_heads=2, mask=("rows", "1"), bias=("1", "heads"), sinks=True, softcap=1.0)
    arguments = arguments_of(case)
    copies = {name: x.clone() for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    shared_prefix_attention(**arguments)
    for name, before in copies.items():
        torch.testing.assert_close(arguments[name], before, rtol=0, atol=0, equal_nan=True)


def test_unknown_impl():
    with pytest.raises(ValueError, match="impl is 'flash', must be one of"):
        shared_prefix_attention(**arguments_of(Case()), impl="flash")


def test_named_impl_that_cannot_run_raises():
    arguments = arguments_of(Case(), torch.float64)
    assert resolve("auto", Call(**arguments)) == "torch"
    with pytest.raises((RuntimeError, ValueError), match="cpu"):
        shared_prefix_attention(**arguments, impl="cpu")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ragged", [False, True])
def test_window(impl, ragged):
    arguments = arguments_of(Case(kv_heads=2, length=11, batch=2, sinks=True))
    skip_unless_supported(impl, arguments)
    for name in ("key", "value"):
        arguments[name] = arguments[name].nan_to_num(nan=3.0)
    lengths = torch.tensor([11, 2]) if ragged else None
    out = shared_prefix_attention(**arguments, lengths=lengths, window=4, impl=impl)
    truth = reference(**arguments, lengths=lengths, window=4)
    torch.testing.assert_close(out.double(), truth, atol=2e-6, rtol=0)
    assert torch.equal(truth[:4], reference(**arguments | {"window_start": 8})[:4])


def test_window_is_checked():
    with pytest.raises(ValueError, match="window must be at least 1 and come with a new_key, got 0"):
        shared_prefix_attention(**arguments_of(Case()), window=0)
    with pytest.raises(ValueError, match="window"):
        shared_prefix_attention(**arguments_of(Case(cross=True)), window=3)


@pytest.mark.parametrize("case", [Case(kv_heads=2), Case(cross=True, mask=("batch", "1"), softcap=0.8)], ids=str)
def test_operator(case):
    arguments = arguments_of(case)
    for name in ("key", "value"):
        arguments[name] = arguments[name].nan_to_num(nan=0.5)
    names = ("query", "key", "value", "length", "new_key", "new_value", "scaling", "mask", "bias", "softcap", "sinks")
    call = (*(arguments.get(name) for name in names), 0, None, None, None)
    torch.library.opcheck(torch.ops.simctg_fast.shared_prefix_attention, call)
    lengths, starts = torch.tensor([9, 11]), torch.tensor([0, 3])
    torch.library.opcheck(torch.ops.simctg_fast.shared_prefix_attention, (*call[:12], lengths, starts, None))
    offsets = torch.tensor([0, 2, len(arguments["query"])])
    torch.library.opcheck(torch.ops.simctg_fast.shared_prefix_attention, (*call, offsets))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    arguments = arguments_of(Case(kv_heads=2, sinks=True))
    compiled = torch.compile(shared_prefix_attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.testing.assert_close(compiled(**arguments), shared_prefix_attention(**arguments), atol=1e-6, rtol=0)


def test_triton_on_a_cpu_says_so():
    with pytest.raises((RuntimeError, ValueError), match="triton"):
        shared_prefix_attention(**arguments_of(Case()), impl="triton")
