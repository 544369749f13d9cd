"""The SimCSE losses against the whole matrix in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from simctg_fast import SimCSELoss, simcse_sup_loss, simcse_unsup_loss
from simctg_fast.functional import info_nce, simcse_loss_from_embeddings
from simctg_fast.ops import simcse as ops
from simctg_fast.reference import simcse as reference

from ..two_processes import run_two


def gradient_of(loss_function, embeddings):
    leaf = embeddings.detach().requires_grad_()
    loss = loss_function(leaf)
    loss.backward()
    return loss.detach(), leaf.grad


def usual_code(y_pred, temp=0.05):
    """The circulating recipe, broadcast and 1e12 and all."""
    rows = torch.arange(len(y_pred))
    targets = rows + 1 - rows % 2 * 2
    similarity = F.cosine_similarity(y_pred.unsqueeze(1), y_pred.unsqueeze(0), dim=-1)
    return F.cross_entropy((similarity - torch.eye(len(y_pred)) * 1e12) / temp, targets)


@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize("rows", [2, 6, 510, 1026])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 0.003])
def test_unsupervised(rows, temperature, impl):
    """One block, a block and a part, three blocks; 0.003 makes exp(1 / temperature) overflow a float."""
    embeddings = torch.randn(rows, 24) + 0.5
    expected, gradient = gradient_of(lambda e: reference.simcse_unsup_loss(e, temperature), embeddings.double())
    loss, got = gradient_of(lambda e: simcse_unsup_loss(e, temperature=temperature, impl=impl), embeddings)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    atol = 1e-4 * float(gradient.abs().max()) + 2e-6 / temperature / rows
    torch.testing.assert_close(got.double(), gradient, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("rows", [3, 9, 1539])
def test_supervised(rows, symmetric):
    embeddings = torch.randn(rows, 24) + 0.3
    expected, gradient = gradient_of(lambda e: reference.simcse_sup_loss(e, 0.05, symmetric), embeddings.double())
    loss, got = gradient_of(lambda e: simcse_sup_loss(e, symmetric=symmetric), embeddings)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.double(), gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-7)


def test_the_usual_code_under_its_own_names():
    embeddings = torch.randn(10, 16)
    expected = usual_code(embeddings)
    for arguments in ({}, {"device": "cuda", "temp": 0.05}, {"device": "cpu", "temp": 9.0, "temperature": 0.05}):
        torch.testing.assert_close(simcse_unsup_loss(embeddings, **arguments), expected)
    torch.testing.assert_close(simcse_unsup_loss(embeddings, "cpu", 0.5), usual_code(embeddings, 0.5))
    triples = torch.randn(9, 16)
    torch.testing.assert_close(simcse_sup_loss(triples, "cpu", 0.1), reference.simcse_sup_loss(triples, 0.1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(dtype):
    embeddings = torch.randn(600, 64)
    expected, gradient = gradient_of(reference.simcse_unsup_loss, embeddings.to(dtype).double())
    plain, plain_gradient = gradient_of(reference.simcse_unsup_loss, embeddings.to(dtype))
    loss, got = gradient_of(simcse_unsup_loss, embeddings.to(dtype))
    assert (loss.dtype, got.dtype) == (torch.float32, dtype)
    assert (loss - expected).abs() <= (plain - expected).abs() + 1e-3
    assert (got.double() - gradient).norm() <= 2 * (plain_gradient.double() - gradient).norm()


def test_from_embeddings():
    anchors, positives, negatives = torch.randn(3, 40, 12)
    triples = torch.stack([anchors, positives, negatives], dim=1).flatten(0, 1)
    for symmetric in (False, True):
        torch.testing.assert_close(
            simcse_loss_from_embeddings(anchors, positives, negatives, symmetric=symmetric),
            simcse_sup_loss(triples, symmetric=symmetric),
        )
    views = torch.stack([anchors, positives], dim=1).flatten(0, 1)
    torch.testing.assert_close(
        simcse_loss_from_embeddings(anchors, positives, in_view_negatives=True), simcse_unsup_loss(views)
    )


def test_gradcache_two_passes_give_the_gradient_of_one():
    """Representations without a graph first, their gradients then pushed through the encoder in chunks."""
    encoder = torch.nn.Linear(10, 8)
    inputs = torch.randn(2, 12, 10)
    simcse_loss_from_embeddings(encoder(inputs[0]), encoder(inputs[1])).backward()
    expected = encoder.weight.grad.clone()
    encoder.zero_grad()
    with torch.no_grad():
        cached = [encoder(x) for x in inputs]
    cached = [c.requires_grad_() for c in cached]
    simcse_loss_from_embeddings(*cached).backward()
    for view, cache in zip(inputs, cached, strict=True):
        for rows in (slice(0, 5), slice(5, 12)):
            encoder(view[rows]).backward(cache.grad[rows])
    torch.testing.assert_close(encoder.weight.grad, expected)


def test_info_nce_targets():
    queries, keys = torch.randn(5, 8), torch.randn(9, 8)
    logits = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).T / 0.1
    for targets, indices in ((3, torch.arange(3, 8)), (torch.tensor([8, 0, 0, 2, 4]),) * 2):
        for reduction in ("mean", "sum", "none"):
            torch.testing.assert_close(
                info_nce(queries, keys, 0.1, targets=targets, reduction=reduction),
                F.cross_entropy(logits, indices, reduction=reduction),
            )


def test_edges():
    assert float(simcse_unsup_loss(torch.randn(2, 8))) == pytest.approx(0.0, abs=5e-6)  # one choice only
    empty = torch.randn(0, 8, requires_grad=True)
    loss = simcse_unsup_loss(empty)
    loss.backward()
    assert float(loss.detach()) == 0.0
    loss, gradient = gradient_of(simcse_unsup_loss, torch.zeros(6, 8))
    torch.testing.assert_close(loss, torch.tensor(5.0).log())
    assert gradient.isfinite().all()


def test_gradcheck_and_strided_upstream():
    embeddings = torch.randn(12, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(simcse_unsup_loss, (embeddings,))
    assert torch.autograd.gradcheck(lambda e: simcse_sup_loss(e, symmetric=True), (embeddings,))
    queries, keys, targets = embeddings[:5], embeddings[5:], torch.tensor([6, 0, 0, 3, 1])
    for itself, temperature in ((-1, 1 / 3), (1, 1 / 3), (2, 0.01)):  # 0.01: logits that are not summed as they are
        assert torch.autograd.gradcheck(
            lambda q, k, i=itself, t=temperature: ops.pair_loss(q, k, targets, 1 / t, "torch", i), (queries, keys)
        )
    assert torch.autograd.gradcheck(lambda e: ops.self_loss(e, 100.0, "torch"), (embeddings,))
    losses = ops.self_loss(embeddings, 2.0, "torch")
    expected = torch.autograd.grad((losses * torch.ones(12, dtype=torch.float64)).sum(), embeddings, retain_graph=True)
    assert torch.equal(torch.autograd.grad(losses.sum(), embeddings)[0], expected[0])


@pytest.mark.parametrize("temperature", [0.05, 0.01])
def test_a_query_that_is_a_key_itself_is_left_out_there(temperature):
    """Rows that reach over several blocks, anywhere among the keys."""
    vectors = torch.randn(1100, 12)
    targets = torch.arange(1100) ^ 1
    whole, gradient = gradient_of(lambda v: ops.self_loss(v, 1 / temperature, "torch").sum(), vectors)

    def in_parts(v):
        parts = [slice(0, 2), slice(2, 700), slice(700, 1100)]
        return sum(
            ops.pair_loss(v[part], v, targets[part], 1 / temperature, "torch", part.start).sum() for part in parts
        )

    total, got = gradient_of(in_parts, vectors)
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_scale_does_not_matter(factor):
    embeddings = torch.randn(10, 8)
    loss, _ = gradient_of(simcse_unsup_loss, embeddings)
    scaled, gradient = gradient_of(simcse_unsup_loss, embeddings * factor)
    torch.testing.assert_close(scaled, loss)
    assert gradient.isfinite().all()


def test_an_embedding_that_is_not_finite_shows():
    embeddings = torch.randn(10, 8)
    embeddings[3, 2] = float("inf")
    assert simcse_unsup_loss(embeddings).isnan()


@pytest.mark.parametrize("layout", ["compact", "permuted"])
def test_opcheck(layout):
    vectors = torch.randn(8, 12) if layout == "compact" else torch.randn(12, 8).T
    vectors.requires_grad_()
    library = torch.ops.simctg_fast
    keys, targets = vectors.detach()[:5], torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    torch.library.opcheck(library.self_loss.default, (vectors, 20.0, "auto"))
    torch.library.opcheck(library.pair_loss.default, (vectors, keys, targets, -1, 20.0, "auto"))
    vectors = vectors.detach()
    saved = library.self_loss(vectors, 20.0, "auto")[1:]
    torch.library.opcheck(library.self_loss_backward.default, (torch.ones(8), vectors, *saved, 20.0, "auto"))
    saved = library.pair_loss(vectors, keys, targets, -1, 20.0, "auto")[1:]
    torch.library.opcheck(
        library.pair_loss_backward.default, (torch.ones(8), vectors, keys, targets, *saved, -1, 20.0, "auto")
    )


def test_compile():
    compiled = torch.compile(lambda e: simcse_unsup_loss(e), fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (8, 30):
        embeddings = torch.randn(rows, 16)
        expected, gradient = gradient_of(simcse_unsup_loss, embeddings)
        loss, got = gradient_of(compiled, embeddings)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(got, gradient)


def test_the_module_is_the_function():
    pairs, triples = torch.randn(8, 16), torch.randn(9, 16)
    torch.testing.assert_close(SimCSELoss(0.1)(pairs), simcse_unsup_loss(pairs, temp=0.1))
    module = SimCSELoss(0.1, supervised=True, symmetric=True)
    torch.testing.assert_close(module(triples), simcse_sup_loss(triples, lamda=0.1, symmetric=True))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: simcse_unsup_loss(torch.ones(3, 4)), "y_pred has 3 rows, must have a multiple of 2"),
        (lambda: simcse_sup_loss(torch.ones(4, 4)), "y_pred has 4 rows, must have a multiple of 3"),
        (lambda: simcse_unsup_loss(torch.ones(4, 4), temp=0.0), r"temp is 0\.0, must be positive"),
        (lambda: simcse_unsup_loss(torch.ones(4, 4), temperature=-1), "temperature is -1, must be positive"),
        (lambda: simcse_unsup_loss(torch.ones(4)), r"y_pred has shape \(4,\), must be \(rows, width\)"),
        (lambda: simcse_unsup_loss(torch.ones(4, 4), impl="fast"), "impl is 'fast', must be one of"),
        (lambda: info_nce(torch.ones(3, 4), torch.ones(2, 4)), r"targets is 0, must be in 0\.\.-1: 3 queries, 2 keys"),
        (lambda: SimCSELoss(symmetric=True), "symmetric as it is"),
    ],
)
def test_errors_name_the_argument(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_memory_is_linear():
    """No tensor is larger than a block of 512 x 512."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, tuple) else (result,):
                if isinstance(value, torch.Tensor):
                    largest = max(largest, value.numel())
            return result

    vectors, ones, targets = torch.randn(2048, 16), torch.ones(2048), torch.arange(2048) % 1000
    with Watch():
        saved = ops._self_forward(vectors, 20.0, "torch")[1:]
        ops._self_backward(ones, vectors, *saved, 20.0, "torch")
        saved = ops._pair_forward(vectors, vectors[:1000], targets, -1, 20.0, "torch")[1:]
        ops._pair_backward(ones, vectors, vectors[:1000], targets, *saved, -1, 20.0, "torch")
    assert 0 < largest <= 512 * 512


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("rows", [1, 511, 1300])
def test_blocks_cover_each_pair_once(rows, device, symmetric, monkeypatch):
    monkeypatch.setattr(ops._tiled, "STRIP_ELEMENTS", 100_000)
    columns = rows if symmetric else 700
    seen = torch.zeros(rows, columns, dtype=torch.int8)
    blocks = ops._tiled._blocks(rows, columns, torch.device(device), symmetric)
    for own, others in blocks:
        seen[own, others] += 1
        if symmetric and own != others:
            seen[others, own] += 1
        if device == "cuda":
            assert 0 < (own.stop - own.start) * (others.stop - others.start) <= 100_000
    assert (seen == 1).all()
    assert len(blocks) <= {"cpu": 9, "cuda": 36}[device]


@pytest.mark.parametrize("temperature", [0.05, 0.01])
def test_in_strips_as_off_the_cpu(temperature, monkeypatch):
    """The blocks of other devices, on this one."""
    vectors, targets = torch.randn(1100, 12), torch.randint(0, 700, (1100,))

    def both(v):
        pairs = ops.pair_loss(v, v[:700], targets, 1 / temperature, "torch")
        return ops.self_loss(v, 1 / temperature, "torch").sum() + pairs.sum()

    expected, gradient = gradient_of(both, vectors.double())
    blocks = ops._tiled._blocks
    monkeypatch.setattr(ops._tiled, "STRIP_ELEMENTS", 200_000)
    monkeypatch.setattr(ops._tiled, "_blocks", lambda r, c, device, s=False: blocks(r, c, torch.device("cuda"), s))
    loss, got = gradient_of(both, vectors)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(got.double(), gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_inverse_norms_without_a_look(dtype):
    """Large, small, zero and broken rows, as on a device whose values the host does not read."""
    rows = torch.randn(8, 24, dtype=dtype)
    largest, smallest = (1e25, 1e-25) if dtype != torch.float16 else (1e4, 1e-3)
    for row, factor in enumerate((largest, smallest, 0.0)):
        rows[row] *= factor
    rows[3, 5], rows[4, 5], rows[5, 1:] = torch.inf, torch.nan, 0
    wide = ops.accumulator_dtype(dtype)
    got = ops._tiled.reciprocal_norms(rows)
    truth = rows.double().norm(dim=1).reciprocal()
    assert got.dtype == wide
    assert float(got[2]) == 0.0
    assert got[3:5].isnan().all()
    for row in (0, 1, 5, 6, 7):
        assert float(got[row]) == pytest.approx(float(truth[row]), rel=1e-6)
    assert ops._tiled.reciprocal_norms(rows[:, :0]).tolist() == [0.0] * 8


GATHERED = """
from simctg_fast import SimCSELoss
from simctg_fast.functional import simcse_loss_from_embeddings
result = {}
for name, (settings, rows, cut) in argument.items():
    own = (rows[:cut] if rank == 0 else rows[cut:]).clone().requires_grad_()
    if name == "from embeddings":
        loss = simcse_loss_from_embeddings(own[0::2], own[1::2], gather_across_devices=True, **settings)
    else:
        loss = SimCSELoss(gather_across_devices=True, **settings)(own)
    loss.backward()
    result[name] = loss.item(), own.grad
"""


def test_gather_across_devices(tmp_path):
    """The average over two processes, of values and of gradients, is the loss of all rows in one process."""
    cases = {
        "pairs": ({}, 12, 6),
        "uneven pairs": ({"temperature": 0.01}, 14, 4),
        "a process without rows": ({}, 6, 0),
        "triples": ({"supervised": True}, 15, 6),
        "symmetric triples": ({"supervised": True, "symmetric": True}, 12, 3),
        "from embeddings": ({"in_view_negatives": False, "symmetric": True}, 10, 4),
    }
    argument = {
        name: (settings, torch.randn(rows, 8, dtype=torch.float64), cut)
        for name, (settings, rows, cut) in cases.items()
    }
    results = run_two(tmp_path, GATHERED, argument)
    for name, (settings, rows, _) in argument.items():
        whole = rows.clone().requires_grad_()
        if name == "from embeddings":
            loss = simcse_loss_from_embeddings(whole[0::2], whole[1::2], **settings)
        else:
            loss = SimCSELoss(**settings)(whole)
        loss.backward()
        assert sum(result[name][0] for result in results) / 2 == pytest.approx(loss.item(), rel=1e-12), name
        got = torch.cat([result[name][1] for result in results]) / 2
        torch.testing.assert_close(got, whole.grad, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: name + text)


def test_gather_across_devices_in_one_process():
    embeddings = torch.randn(12, 8)
    for supervised in (False, True):
        plain, gathered = (
            gradient_of(SimCSELoss(supervised=supervised, gather_across_devices=gather), embeddings)
            for gather in (False, True)
        )
        assert torch.equal(gathered[0], plain[0])
        assert torch.equal(gathered[1], plain[1])
