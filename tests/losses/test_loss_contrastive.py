"""The contrastive loss, every implementation a CPU can run, value and gradient against float64."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.utils.checkpoint

from simctg_fast import contrastive_loss
from simctg_fast.functional import contrastive_loss_items
from simctg_fast.ops import _backends
from simctg_fast.ops import contrastive_loss as operator
from simctg_fast.reference.contrastive_loss import REDUCTIONS
from simctg_fast.reference.contrastive_loss import contrastive_loss as reference

IMPLS = ("cpu", "torch")
# (batch, length, width) and what each is there for.
SHAPES = {
    (2, 2, 16): "one pair a sequence",
    (3, 37, 33): "one ragged tile, an odd width",
    (1, 128, 64): "exactly one tile",
    (2, 129, 20): "a tile of a single row, on the diagonal and beside it",
    (1, 300, 768): "three tiles, several passes over the width",
    (5, 70, 130): "a width that is no multiple of any vector",
    (1, 40, 8192): "the widest",
}


def make(shape, bias=1.0, dtype=torch.float32):
    """Hidden states around a common direction: for bias 1 about 60 % of the hinges are active at margin 0.5."""
    return (torch.randn(shape) + bias * torch.randn(shape[2])).to(dtype)


def make_mask(batch, length):
    mask = torch.ones(batch, length, dtype=torch.long)
    for b in range(batch):
        mask[b, : b * length // (2 * batch)] = 0  # left
        mask[b, length - (batch - 1 - b) * length // (3 * batch) :] = 0  # right
    return mask


def truth(states, mask, margin, reduction):
    wide = states.detach().double().requires_grad_()
    loss = reference(wide, mask, margin, reduction)
    loss.backward()
    # The derivative at a zero vector is a convention: ours is 0.
    return loss.detach(), wide.grad.masked_fill((wide == 0).all(-1, keepdim=True), 0.0)


def ours(states, *args, **kwargs):
    states = states.detach().requires_grad_()
    loss = contrastive_loss(states, *args, **kwargs)
    loss.backward()
    return loss.detach(), states.grad


def eager_gradient_error(states, mask, margin, reduction, gradient):
    narrow = states.detach().requires_grad_()
    reference(narrow, mask, margin, reduction).backward()
    zero = (states == 0).all(-1, keepdim=True)
    return (narrow.grad.masked_fill(zero, 0.0).double() - gradient).norm()


def away_from_ties(states, margin, gap):
    """Whether no cosine lies so near the margin that rounding may switch its hinge."""
    unit = torch.nn.functional.normalize(states.double(), dim=-1)
    return bool(((unit @ unit.mT - (1 - margin)).abs() > gap).all())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_value_and_gradient(shape, reduction, impl):
    states = make(shape)
    if shape[1] > 30:
        states[0, 17] = 0.0
    mask = None if reduction == "dense" else make_mask(*shape[:2])
    loss, gradient = truth(states, mask, 0.5, reduction)
    got, got_gradient = ours(states, 0.5, mask, reduction, impl=impl)
    assert (got.shape, got.dtype) == ((), torch.float32)
    torch.testing.assert_close(got.double(), loss, rtol=2e-6, atol=1e-7)
    assert (got_gradient.double() - gradient).norm() <= (
        3 * eager_gradient_error(states, mask, 0.5, reduction, gradient) + 1e-6 * gradient.norm()
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [0.0, 1.0, 1.5])
def test_narrow_types(dtype, impl, bias):
    """The arithmetic is float32: the loss is exact to that, the gradient to its one rounding at the end."""
    states = make((2, 150, 96), bias, dtype)
    loss, gradient = truth(states, None, 0.5, "pairs")
    got, got_gradient = ours(states, 0.5, impl=impl)
    assert got_gradient.dtype == dtype
    torch.testing.assert_close(got.double(), loss, rtol=5e-6, atol=1e-8)
    eps = torch.finfo(dtype).eps
    floor = torch.finfo(dtype).smallest_normal * eps  # what float16 cannot hold is lost in any implementation
    assert bool(
        ((got_gradient.double() - gradient).abs() <= eps * gradient.abs() + 1e-4 * gradient.abs().max() + floor).all()
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("margin", [-1.0, 0.0, 0.01, 0.5, 1.0])
def test_margins_and_tile_kinds(impl, margin):
    """Sequences of one kind each: no hinge active, all, and mixed; blocks of each kind in one sequence."""
    blocks = torch.cat([make((1, 128, 48), 0.0), make((1, 140, 48), 3.0), make((1, 128, 48), 0.0)], dim=1)
    for states in (make((1, 260, 48), 0.0), make((1, 260, 48), 4.0), blocks):
        loss, gradient = truth(states, None, margin, "pairs")
        got, got_gradient = ours(states, margin, impl=impl)
        torch.testing.assert_close(got.double(), loss, rtol=2e-6, atol=1e-7)
        # One switched hinge moves the gradient by 2 / pairs.
        # The tangential part of a sum of nearly parallel vectors is what is left of 2 / (260 * norm) a vector.
        atol = 1e-6 * 2 / 260 / 5 + (0.0 if away_from_ties(states, margin, 1e-6) else 4 / 260**2)
        torch.testing.assert_close(got_gradient.double(), gradient, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("bias", [0.0, 1.5, 8.0])
@pytest.mark.parametrize("reduction", ["pairs", "dense"])
def test_tiles_decided_before_their_product_is_complete(bias, reduction):
    """Wide vectors with no hinge active or every one: bounds of what the last slices can add decide whole tiles.

    At bias 8 all of them before the first slice, at the others after some.
    """
    states = make((2, 290, 640), bias)
    mask = None
    if reduction == "pairs":
        states[0, 40] = 0.0
        states[1, 130:135] = 0.0
        mask = torch.ones(2, 290)
        mask[0, :131] = 0  # a whole tile, and a little
        mask[1, 257:] = 0  # the last tile has one token
        states[mask == 0] = float("nan")
    clean = states if mask is None else states.masked_fill(mask[..., None] == 0, 0.0)
    loss, gradient = truth(clean, mask, 0.5, reduction)
    got, got_gradient = ours(states, 0.5, mask, reduction, impl="cpu")
    torch.testing.assert_close(got.double(), loss, rtol=2e-6, atol=1e-9)
    atol = 2e-7 / 290 / float(states.nan_to_num().norm(dim=-1).mean())
    torch.testing.assert_close(got_gradient.double(), gradient, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("impl", IMPLS)
def test_ties(impl):
    """Cosines that equal the threshold in exact arithmetic: those hinges may go either way, and nothing else."""
    states = torch.zeros(1, 64, 16)
    states[0, :, 0] = 1.0
    states[0, torch.arange(64), 1 + torch.arange(64) % 15] = 3.0**0.5  # norm 2; cosine 1, or a tie at 1/4
    loss, gradient = truth(states, None, 0.75, "pairs")
    got, got_gradient = ours(states, 0.75, impl=impl)
    torch.testing.assert_close(got.double(), loss, rtol=5e-6, atol=0)
    one_flip = 2 / (64 * 63) / 2
    assert float((got_gradient - gradient).norm(dim=-1).max()) <= 60 * one_flip


@pytest.mark.parametrize("impl", IMPLS)
def test_bits_differ_only_within_rounding(impl):
    states = make((1, 128, 64))
    bits = torch.ops.simctg_fast.contrastive_loss(states, None, None, 0.5, "pairs", True, impl)[4]
    active = ((bits[0].unsqueeze(-1) >> torch.arange(32)) & 1).flatten(1).bool()
    unit = torch.nn.functional.normalize(states[0].double(), dim=-1)
    excess = (unit @ unit.T - 0.5).fill_diagonal_(-1.0)
    assert 0.2 < active.double().mean() < 0.8
    assert bool((excess.abs()[active != (excess > 0)] < 1e-6).all())


@pytest.mark.parametrize("impl", IMPLS)
def test_fewer_than_two_tokens(impl):
    states = make((3, 9, 16))
    mask = torch.zeros(3, 9)
    mask[1, 4] = 1
    for reduction in ("pairs", "paper"):
        loss, gradient = ours(states, 0.5, mask, reduction, impl=impl)
        assert float(loss) == 0.0
        assert not gradient.any()
    for shape in ((2, 1, 8), (0, 5, 8), (2, 0, 8)):
        loss, gradient = ours(torch.randn(shape), 0.5, impl=impl)
        assert float(loss) == 0.0
        assert gradient.shape == shape
        assert not gradient.any()
    loss, gradient = ours(torch.randn(2, 1, 8), 0.5, None, "dense", impl=impl)
    assert float(loss) == 0.5
    assert not gradient.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_padding_may_hold_anything(impl):
    states = make((2, 140, 24))
    mask = make_mask(2, 140)
    clean = ours(states.masked_fill(mask[..., None] == 0, 0.0), 0.5, mask, impl=impl)
    for junk in (float("nan"), float("inf"), 1e30):
        got = ours(states.masked_fill(mask[..., None] == 0, junk), 0.5, mask, impl=impl)
        assert torch.equal(got[0], clean[0])
        assert torch.equal(got[1], clean[1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_real_token_that_is_not_finite_shows(impl, value):
    states = make((2, 20, 8))
    states[1, 3, 2] = value
    assert contrastive_loss(states, impl=impl).isnan()
    mask = torch.ones(2, 20)
    mask[:, :3] = 0
    assert contrastive_loss(states, 0.5, mask, impl=impl).isnan()
    mask[1, 3] = 0
    assert contrastive_loss(states, 0.5, mask, impl=impl).isfinite()
    alone = torch.stack([states[0], states[0]])
    assert not contrastive_loss(alone, impl=impl).isnan()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("factor", [1e-25, 1e25, 2.0**-110])
def test_scale_does_not_matter(impl, factor):
    states = make((1, 40, 32))
    loss, _ = ours(states, 0.5, impl=impl)
    scaled, gradient = ours(states * factor, 0.5, impl=impl)
    torch.testing.assert_close(scaled, loss, rtol=1e-5, atol=0)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_layouts(impl):
    base = make((3, 150, 40))
    loss, gradient = ours(base, 0.5, impl=impl)
    storage = torch.zeros(3, 150, 80)
    storage[..., ::2] = base
    for view in (base.transpose(0, 1).contiguous().transpose(0, 1), base.mT.contiguous().mT, storage[..., ::2]):
        assert not view.is_contiguous()
        got, got_gradient = ours(view, 0.5, impl=impl)
        torch.testing.assert_close(got, loss)
        torch.testing.assert_close(got_gradient, gradient)
    expanded = base[:1].expand(3, -1, -1)  # stride 0 over the batch
    torch.testing.assert_close(ours(expanded, 0.5, impl=impl)[0], ours(base[:1], 0.5, impl=impl)[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_upstream_gradients(impl):
    states = make((2, 40, 16)).requires_grad_()
    other = torch.randn(2, 40, 16)

    def losses():
        return torch.stack([contrastive_loss(states, 0.5, impl=impl), contrastive_loss(states * other, 0.3, impl=impl)])

    expected = [torch.autograd.grad(loss, states, retain_graph=True)[0] for loss in losses()]
    total = losses().sum()  # hands back a stride-0 gradient
    (first,) = torch.autograd.grad(total, states, retain_graph=True)
    (again,) = torch.autograd.grad(total, states)
    torch.testing.assert_close(first, sum(expected))
    assert torch.equal(first, again)
    (weighted,) = torch.autograd.grad(losses() @ torch.tensor([3.0, -2.0]), states)
    torch.testing.assert_close(weighted, 3 * expected[0] - 2 * expected[1])
    (saved,) = torch.autograd.grad(
        torch.utils.checkpoint.checkpoint(lambda s: contrastive_loss(s, 0.5, impl=impl), states, use_reentrant=False),
        states,
    )
    assert torch.equal(saved, expected[0])


def test_results_do_not_depend_on_threads_or_batch_mates():
    states = make((3, 300, 64))
    together = contrastive_loss(states, reduction="paper", impl="cpu"), ours(states, 0.5, impl="cpu")[1]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(contrastive_loss(states, reduction="paper", impl="cpu"), together[0])
            assert torch.equal(ours(states, 0.5, impl="cpu")[1], together[1])
    finally:
        torch.set_num_threads(threads)
    alone = ours(states[1:2], 0.5, impl="cpu")[1] / 3
    torch.testing.assert_close(together[1][1:2], alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_instruction_sets(isa, dtype):
    for bias in (1.0, 3.0):
        states = make((2, 141, 75), bias, dtype)
        states[0, 3] = 0.0
        states[1, 7, :5] = 1e-7  # subnormal in float16
        loss, gradient = truth(states, None, 0.5, "pairs")
        got, got_gradient = ours(states, 0.5, impl="cpu")
        torch.testing.assert_close(got.double(), loss, rtol=5e-6, atol=1e-7)
        eps = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(got_gradient.double(), gradient, rtol=eps, atol=1e-3 * eps * 0.5 + 1e-7)


def test_long_and_wide_sequences_are_packed_in_parts():
    """More than 16 MB of unit vectors in a sequence; with every hinge active in some pairs of tiles."""
    states = make((1, 600, 8000), 1.0)
    states[0, 100:500] += 2 * states[0, 0]
    (loss, gradient), (expected_loss, expected) = (ours(states, 0.5, impl=impl) for impl in IMPLS)
    torch.testing.assert_close(loss, expected_loss, rtol=2e-6, atol=0)
    assert (gradient - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.full
@pytest.mark.parametrize("impl", IMPLS)
def test_long(impl):
    states = make((1, 2200, 72), 1.0)
    loss, gradient = truth(states, None, 0.5, "pairs")
    got, got_gradient = ours(states, 0.5, impl=impl)
    torch.testing.assert_close(got.double(), loss, rtol=2e-6, atol=0)
    assert (got_gradient.double() - gradient).norm() <= 1e-4 * gradient.norm()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction):
    states = make((2, 6, 5), 0.7, torch.float64).requires_grad_()
    assert away_from_ties(states.detach(), 0.5, 1e-4)
    mask = None if reduction == "dense" else torch.tensor([[1] * 6, [0, 1, 1, 1, 0, 0]])
    assert torch.autograd.gradcheck(lambda s: contrastive_loss(s, 0.5, mask, reduction), (states,))


@pytest.mark.parametrize("reduction", ["pairs", "paper"])
def test_normalizer_makes_micro_batches_exact(reduction):
    states, mask = make((6, 50, 16)), make_mask(6, 50)
    whole = contrastive_loss(states, 0.5, mask, reduction)
    parts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    items = sum(contrastive_loss_items(mask[p], reduction) for p in parts)
    assert items == contrastive_loss_items(mask, reduction)
    total = sum(contrastive_loss(states[p], 0.5, mask[p], reduction, normalizer=items) for p in parts)
    torch.testing.assert_close(total, whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    states = make((2, 60, 32))
    for impl in IMPLS:
        expected = ours(states, 0.5, impl=impl)
        with torch.autocast("cpu", dtype=dtype):
            got = ours(states, 0.5, impl=impl)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def test_inference_keeps_nothing():
    states = make((2, 60, 32)).requires_grad_()
    with torch.no_grad():
        loss = contrastive_loss(states)
    assert loss.grad_fn is None
    torch.testing.assert_close(loss, contrastive_loss(states).detach())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["compact", "permuted"])
def test_opcheck(impl, layout):
    states = make((2, 30, 8))
    if layout == "permuted":
        states = states.transpose(0, 1).contiguous().transpose(0, 1)
    states.requires_grad_()
    arguments = (states, make_mask(2, 30), torch.tensor(100.0), 0.5, "pairs", True, impl)
    torch.library.opcheck(torch.ops.simctg_fast.contrastive_loss.default, arguments)
    outputs = torch.ops.simctg_fast.contrastive_loss(*arguments)
    backward = (torch.ones(()), states.detach(), *(t.detach() for t in outputs[1:]), impl)
    torch.library.opcheck(torch.ops.simctg_fast.contrastive_loss_backward.default, backward)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    """Two lengths through one compiled function, without a graph break."""

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def step(states, mask):
        return contrastive_loss(states * 1.5, 0.5, mask, "pairs")

    for length in (20, 150):
        states, mask = make((2, length, 16)), make_mask(2, length)
        expected, gradient = ours(states * 1.5, 0.5, mask)
        leaf = states.detach().requires_grad_()
        loss = step(leaf, mask)
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected)
        torch.testing.assert_close(leaf.grad, gradient * 1.5)


class TinyModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 24)
        self.mixer = torch.nn.GRU(24, 24, batch_first=True)
        self.head = torch.nn.Linear(24, 50)

    def forward(self, tokens):
        states, _ = self.mixer(self.embedding(tokens))
        return states, self.head(states)


@pytest.mark.parametrize("impl", IMPLS)
def test_ten_steps_of_training_follow_the_same_curve(impl):
    tokens = torch.randint(0, 50, (4, 40))
    mask = make_mask(4, 40)
    model = TinyModel()

    def curve(loss_function):
        net = copy.deepcopy(model)
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        losses = []
        for _ in range(10):
            states, logits = net(tokens)
            likelihood = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            loss = likelihood + loss_function(states)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    got = curve(lambda states: contrastive_loss(states, 0.9, mask, impl=impl))
    expected = curve(lambda states: reference(states, mask, 0.9))
    assert got == pytest.approx(expected, rel=1e-3)
    assert got[-1] < got[0] - 0.3


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"margin": 1.5}, r"margin is 1\.5, must lie in \[-1, 1\]"),
        ({"reduction": "mean"}, "reduction is 'mean', must be one of 'pairs', 'paper', 'dense'"),
        ({"impl": "gpu"}, "impl is 'gpu', must be one of"),
        ({"impl": "triton"}, "needs tensors on a CUDA device, got cpu"),
        ({"reduction": "dense", "attention_mask": torch.ones(2, 5)}, "attention_mask must be None"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask has shape \(2, 4\), must be \(2, 5\)"),
        ({"hidden_states": torch.ones(2, 5)}, r"hidden_states has shape \(2, 5\), must be \(batch, length, width\)"),
        ({"hidden_states": torch.ones(2, 5, 3, dtype=torch.int64)}, "hidden_states has dtype torch.int64"),
        ({"hidden_states": torch.ones(2, 5, 3, dtype=torch.float64), "impl": "cpu"}, "impl='torch' takes every"),
        ({"normalizer": torch.ones(2)}, r"normalizer has shape \(2,\)"),
    ],
)
def test_errors_name_the_argument(changes, match):
    if changes.get("impl") == "triton" and not _backends.has_triton():
        pytest.skip("triton is absent")
    with pytest.raises(ValueError, match=match):
        contrastive_loss(**{"hidden_states": torch.ones(2, 5, 3), **changes})


def test_cpu_without_the_extension(monkeypatch):
    monkeypatch.setattr(_backends, "_attempt", lambda name: (None, ImportError("it is not there")))
    with pytest.raises(RuntimeError, match="it is not there"):
        contrastive_loss(torch.ones(1, 2, 3), impl="cpu")
    assert contrastive_loss(torch.ones(1, 2, 3)) == pytest.approx(0.5)  # auto falls back


def test_memory_stays_far_below_the_matrix():
    """Bytes that the operator keeps between the passes: T^2 / 8 and a few vectors."""
    kept = []
    states = make((1, 1024, 16)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        contrastive_loss(states, impl="cpu")
    extra = sum(t.numel() * t.element_size() for t in kept if t.data_ptr() != states.data_ptr())
    assert 1024 * 1024 / 8 <= extra < 1024 * 1024 / 8 + 20_000


@pytest.mark.parametrize(
    ("version", "capability", "serves"), [("3.6.0", 10, False), ("3.6.0", 9, True), ("3.8.0", 10, True)]
)
def test_a_gpu_that_triton_cannot_compile_for(version, capability, serves, monkeypatch):
    """Blackwell before triton 3.8 is served by PyTorch, and refused by name."""
    triton = pytest.importorskip("triton")
    from simctg_fast.kernels import _launch

    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    states = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    _launch._architecture_of.cache_clear()
    try:
        assert operator.resolve("auto", states) == ("triton" if serves else "torch")
        if not serves:
            with pytest.raises(RuntimeError, match=r"impl='triton' needs triton 3\.8 or newer on this GPU"):
                operator.resolve("triton", states)
    finally:
        _launch._architecture_of.cache_clear()
