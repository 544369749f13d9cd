"""The linear kernel on every instruction set, and `fast_linears`, which routes a model's layers through it."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch.nn.functional import linear as torch_linear
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from simctg_fast.cpu import modules
from simctg_fast.cpu.forwards import _held
from simctg_fast.cpu.modules import fast_linears
from simctg_fast.ops import _backends
from simctg_fast.ops.linear import MAX_ROWS, most_rows, pack, run_kernel

extension = _backends.extension()
needs_extension = pytest.mark.skipif(extension is None, reason="the C++ extension is not built")


def draw(rows, in_features, out_features, *, transposed, bias=True):
    x, weight = torch.randn(rows, in_features), torch.randn(out_features, in_features)
    if transposed:
        weight = weight.t().contiguous()
    return x, weight, torch.randn(out_features) if bias else None


def truth(x, weight, bias, transposed):
    y = x.double() @ (weight.double() if transposed else weight.double().t())
    return y if bias is None else y + bias.double()


def bound(x, weight, bias, transposed):
    """Twice PyTorch's own largest error in float32, and a few roundings of the largest sum for where it has none."""
    weight_t = weight if transposed else weight.t()
    plain = torch.addmm(bias, x, weight_t) if bias is not None else x @ weight_t
    error = (plain.double() - truth(x, weight, bias, transposed)).abs().max().item()
    largest = (x.abs().double() @ weight_t.abs().double()).max().item()
    return 2 * error + 2e-7 * largest


# One more and one less than a vector (4, 8, 16), a register tile (8, 48, 64 columns), a cut between threads (192) and a
# chunk of summation (384); 1100 is past the block in which row tiles share a tile of the weight; 1024 floats
# are a page.
IN_FEATURES = (1, 3, 16, 17, 100, 383, 384, 385, 770, 1100)
OUT_FEATURES = (1, 5, 15, 16, 17, 31, 33, 47, 65, 130, 193, 300, 1024)
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 24, 25, 31, 32, 33, 64)


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_accuracy_on_odd_shapes(isa, transposed, threads):
    threads(2)
    for index, in_features in enumerate(IN_FEATURES):
        for jndex, out_features in enumerate(OUT_FEATURES):
            rows = ROWS[(7 * index + jndex) % len(ROWS)]
            x, weight, bias = draw(rows, in_features, out_features, transposed=transposed, bias=(index + jndex) % 3 > 0)
            y = run_kernel(x, weight, bias, transposed)
            error = (y.double() - truth(x, weight, bias, transposed)).abs().max().item()
            assert error <= bound(x, weight, bias, transposed), (rows, in_features, out_features)


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("packed", [False, True], ids=["in_place", "packed"])
def test_a_row_depends_on_nothing_but_itself(isa, transposed, packed, threads):
    """The same bits alone, among 2 to 64 rows, and on 1 to 7 threads of either kind."""
    for in_features, out_features in [(770, 300), (385, 65), (1100, 33), (100, 1024)]:
        x, weight, bias = draw(MAX_ROWS, in_features, out_features, transposed=transposed)
        data = pack(weight, transposed) if packed else None
        threads(1)
        alone = torch.cat([run_kernel(row, weight, bias, transposed, data) for row in x.split(1)])
        for index, rows in enumerate(ROWS):
            threads((1, 2, 3, 7)[index % 4])
            extension.set_parallel_backend(("openmp", "std::thread")[index % 2])
            try:
                start = index % (MAX_ROWS - rows + 1)
                y = run_kernel(x[start : start + rows], weight, bias, transposed, data)
            finally:
                extension.set_parallel_backend("auto")
            assert torch.equal(y, alone[start : start + rows]), (in_features, out_features, rows)


@pytest.mark.parametrize("in_features", [1024, 2048])
def test_more_rows_than_a_pass_and_rows_a_page_apart(isa, in_features, threads):
    """Passes of 64 rows, sums carried between blocks of 1024, and x copied out of the way of the weight."""
    x, weight, bias = draw(150, in_features, 200, transposed=False)
    threads(2)
    y = run_kernel(x, weight, bias, False)
    assert (y.double() - truth(x, weight, bias, False)).abs().max().item() <= bound(x, weight, bias, False)
    for start, rows in ((0, 64), (60, 90), (149, 1), (3, 15), (100, 16)):
        assert torch.equal(run_kernel(x[start : start + rows], weight, bias, False), y[start : start + rows])


def test_packed_conv1d_has_the_bits_of_the_weight_in_place(isa):
    for rows, in_features, out_features in [(1, 385, 65), (4, 1100, 130), (9, 770, 193), (33, 384, 31)]:
        x, weight, bias = draw(rows, in_features, out_features, transposed=True)
        y = run_kernel(x, weight, bias, True, pack(weight, True))
        assert torch.equal(y, run_kernel(x, weight, bias, True))
        # The panels of a Linear are those of its transpose.
        assert torch.equal(pack(weight, True), pack(weight.t().contiguous(), False))


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_strides_of_x(isa, transposed):
    x, weight, bias = draw(7, 45, 37, transposed=transposed)
    expected = run_kernel(x, weight, bias, transposed)
    wide = torch.full((7, 3, 61), torch.nan)
    wide[:, 1, 4:49] = x
    for view in (wide[:, 1, 4:49], wide[:, 1:2, 4:49].squeeze(1), x.t().contiguous().t(), x.flip(0).flip(0)):
        assert torch.equal(run_kernel(view, weight, bias, transposed), expected)
    y = run_kernel(wide[:, 1:2, 4:49], weight, bias, transposed)
    assert y.shape == (7, 1, 37)
    assert y.is_contiguous()
    assert torch.equal(y[:, 0], expected)
    assert torch.equal(run_kernel(x[:1].expand(5, 45), weight, bias, transposed), expected[:1].expand(5, 37))


@needs_extension
def test_y_is_written_where_it_should_be_and_nowhere_else(isa):
    for layout, transposed in [("rows_are_outputs", False), ("rows_are_inputs", True), ("panels", True)]:
        for rows, out_features in [(1, 5), (4, 33), (9, 65), (30, 130)]:
            x, weight, bias = draw(rows, 50, out_features, transposed=transposed)
            data = pack(weight, True) if layout == "panels" else weight
            y = torch.full((rows + 2, out_features + 3), 7.0)
            target = y[1 : rows + 1, 1 : out_features + 1]
            extension.linear(
                getattr(extension.WeightLayout, layout),
                *(x.data_ptr(), 50, data.data_ptr(), weight.shape[1], bias.data_ptr()),
                *(target.data_ptr(), y.stride(0), rows, 50, out_features, 2),
            )
            assert torch.equal(target, run_kernel(x, weight, bias, transposed))
            target.fill_(7.0)
            assert (y == 7.0).all()


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_not_finite(isa, transposed):
    """NaN and infinity go where plain arithmetic takes them, to no other row; none comes from outside the arrays."""
    x, weight, bias = draw(6, 37, 19, transposed=transposed, bias=False)
    clean = run_kernel(x, weight, bias, transposed)
    x[2, 36], x[4, 0] = torch.nan, torch.inf
    y = run_kernel(x, weight, bias, transposed)
    assert y[2].isnan().all()
    assert torch.equal(y[4], truth(x[4:5], weight, bias, transposed)[0].float())  # infinities of the weights' signs
    assert torch.equal(y[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])
    (weight[36] if transposed else weight[:, 36])[5] = torch.nan
    assert run_kernel(x[:2], weight, bias, transposed).isnan().sum(0).tolist() == [2 * (n == 5) for n in range(19)]

    storage = torch.full((6 * 37 + 64,), torch.nan)
    inside = storage[32 : 32 + 6 * 37].view(6, 37).copy_(torch.randn(6, 37))
    for rows in (1, 3, 6):
        assert run_kernel(inside[:rows], *draw(1, 37, 19, transposed=transposed)[1:], transposed).isfinite().all()


@needs_extension
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_empty(transposed):
    x, weight, bias = draw(3, 0, 5, transposed=transposed)
    assert torch.equal(run_kernel(x, weight, bias, transposed), bias.expand(3, 5))
    assert torch.equal(run_kernel(x, weight, None, transposed), torch.zeros(3, 5))
    x, weight, bias = draw(0, 4, 5, transposed=transposed)
    assert run_kernel(x, weight, bias, transposed).shape == (0, 5)
    x, weight, bias = draw(3, 4, 0, transposed=transposed)
    assert run_kernel(x, weight, bias, transposed).shape == (3, 0)


@needs_extension
def test_cpp_refuses_nonsense():
    x, weight, _ = draw(4, 20, 9, transposed=False)
    y = torch.zeros(4, 9)
    layout = extension.WeightLayout.rows_are_outputs

    def call(weight_stride=20, y_stride=9, rows=4, threads=1):
        pointers = (x.data_ptr(), 20, weight.data_ptr(), weight_stride, 0, y.data_ptr(), y_stride)
        extension.linear(layout, *pointers, rows, 20, 9, threads)

    for change, message in [
        ({"weight_stride": 5}, "weight_stride is 5, must be >= in_features"),
        ({"y_stride": 8}, "y_stride is 8, must be >= out_features"),
        ({"rows": -1}, "rows is -1, must be >= 0"),
        ({"threads": 0}, "num_threads is 0, must be >= 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(**change)
    with pytest.raises(ValueError, match="isa is 'sse9'; it must be one of auto, "):
        extension.set_isa("sse9")
    with pytest.raises(ValueError, match="backend is 'tbb', must be openmp"):
        extension.set_parallel_backend("tbb")


@needs_extension
def test_threads_are_those_of_pytorch():
    assert extension.parallel_backend() == "openmp"


# ---- fast_linears ---------------------------------------------------------------------------------------------------


def gpt2():
    torch.manual_seed(1)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=67, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def llama():
    torch.manual_seed(1)
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=67,
    )
    return LlamaForCausalLM(config).eval()


LAYERS = {gpt2: 2 * 4 + 1, llama: 2 * 7 + 1}  # linear ones; GPT-2's activations and dropouts are routed as well
IDS = torch.arange(12).view(4, 3)


@pytest.fixture
def kernel_calls(monkeypatch):
    """The number of rows of each call that reached the kernel, and whether it was packed."""
    calls = []

    def spy(x, weight, bias, transposed, packed=None):
        calls.append((x.numel() // x.shape[-1], packed is not None))
        return run_kernel(x, weight, bias, transposed, packed)

    monkeypatch.setattr(modules, "run_kernel", spy)
    return calls


def inside(model):
    """Everything `fast_linears` could leave behind."""
    return {name: dict(module.__dict__) for name, module in model.named_modules()}


@needs_extension
@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("pack", [False, True, "auto"])
def test_a_model_computes_the_same(make, pack, kernel_calls):
    model = make()
    before, weights = inside(model), {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        expected = model(IDS).logits
        with fast_linears(model, 4, pack=pack) as routed:
            assert routed >= LAYERS[make]
            logits = model(IDS).logits
            assert kernel_calls == [(12, pack is True)] * LAYERS[make]
            many = model(torch.zeros(1, most_rows() + 1, dtype=torch.long)).logits
            # Too many rows: the modules' own forward, but for packed layers where these are faster for more.
            takes_more = pack is True and extension.active_isa() == "avx2"
            assert len(kernel_calls) == LAYERS[make] * (2 if takes_more else 1)
        assert torch.allclose(many, model(torch.zeros(1, most_rows() + 1, dtype=torch.long)).logits, atol=1e-5)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert not torch.equal(logits, torch.zeros_like(logits))
    assert inside(model) == before
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not _held


@needs_extension
def test_left_as_found_after_an_exception_and_when_nested(kernel_calls):
    model = gpt2()
    before = inside(model)
    with pytest.raises(KeyboardInterrupt), fast_linears(model, 4, pack=True):
        raise KeyboardInterrupt
    assert inside(model) == before
    with torch.no_grad(), fast_linears(model, 4):
        with fast_linears(model, 4, pack=True), fast_linears(model.transformer, 4):
            model(IDS)
        assert len(kernel_calls) == LAYERS[gpt2]
        model(IDS)
        assert len(kernel_calls) == 2 * LAYERS[gpt2]
    assert inside(model) == before
    assert not _held


@needs_extension
@pytest.mark.parametrize("pack", [False, True])
def test_changed_weights_count_at_once(pack):
    model = torch.nn.Sequential(Conv1D(24, 16), torch.nn.Linear(24, 8))
    x = torch.randn(4, 16)

    def update(module):
        module.weight.mul_(2).add_(0.1)

    def replace(module):
        module.weight = torch.nn.Parameter(torch.randn_like(module.weight))

    def assign_data(module):
        module.weight.data = torch.randn_like(module.weight)

    def transpose(module):  # no longer contiguous: the module's own forward
        module.weight = torch.nn.Parameter(torch.randn_like(module.weight.t()).t())

    def to_double(module):
        module.double()

    with torch.no_grad(), fast_linears(model, 4, pack=pack):
        for change in (update, replace, assign_data, transpose, to_double):
            for module in model:
                change(module)
            x = x.to(model[0].weight.dtype)
            expected = torch_linear(torch.addmm(model[0].bias, x, model[0].weight), model[1].weight, model[1].bias)
            assert torch.allclose(model(x), expected, atol=1e-4), change.__name__


@needs_extension
def test_hooks_run(kernel_calls):
    model = gpt2()
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape) or output + 1)
    with torch.no_grad():
        expected = model(IDS).logits
        with fast_linears(model, 4):
            assert torch.allclose(model(IDS).logits, expected, atol=1e-5)
    assert kernel_calls
    assert seen == [(4, 3, 67)] * 2


@needs_extension
def test_gradients_autocast_and_tracing_take_the_modules_own_forward(kernel_calls):
    model = torch.nn.Sequential(torch.nn.Linear(16, 8), Conv1D(4, 8))
    x = torch.randn(3, 16)
    with fast_linears(model, 3):
        model(x).sum().backward()
        assert model[0].weight.grad is not None
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        with torch.no_grad():
            traced = torch.jit.trace(model, x)
            model[0].weight.mul_(3)
            assert torch.allclose(traced(x), model[1](model[0](x)), atol=1e-5)
            kernel_calls.clear()
            torch._dynamo.reset()
            assert torch.compile(model, backend="eager")(x).shape == (3, 4)
            graph = torch.fx.experimental.proxy_tensor.make_fx(model)(x)
            assert "addmm" in graph.code
            assert torch.vmap(model)(x[:, None]).shape == (3, 1, 4)
        assert not kernel_calls
        with torch.inference_mode():
            model(x)
        assert len(kernel_calls) == 2
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model(x)
        assert len(kernel_calls) == 4
        model(x.clone().requires_grad_()).sum().backward()
        assert len(kernel_calls) == 4


@needs_extension
def test_modules_that_are_not_what_they_seem_are_left_alone():
    class Own(torch.nn.Linear):
        pass

    wrapped, hooked, double = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4).double()
    wrapped.forward = lambda x: x + 1
    hooked._hf_hook = object()
    parametrized = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(4, 4))
    scattered = torch.nn.Linear(4, 4)
    scattered.weight = torch.nn.Parameter(torch.randn(4, 4).t())
    model = torch.nn.ModuleList([Own(4, 4), wrapped, hooked, double, parametrized, scattered])
    before = inside(model)
    with fast_linears(model, 1) as routed:
        assert routed == 0
        assert inside(model) == before
        assert torch.equal(wrapped(torch.zeros(4)), torch.ones(4))
    assert inside(model) == before


@needs_extension
def test_a_class_whose_forward_was_replaced_is_left_alone(monkeypatch):
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: x)
    with fast_linears(torch.nn.Sequential(torch.nn.Linear(4, 4), Conv1D(4, 4)), 1) as routed:
        assert routed == 1


@needs_extension
def test_a_forward_that_somebody_else_puts_in_place_stays():
    layer = torch.nn.Linear(4, 4)
    with fast_linears(layer, 1):
        theirs = layer.__dict__["forward"] = lambda x: x
    assert layer.__dict__["forward"] is theirs


@needs_extension
@pytest.mark.parametrize("pack", [False, True])
def test_copies_made_meanwhile_are_whole(pack):
    model = gpt2()
    with torch.no_grad():
        expected = model(IDS).logits
        with fast_linears(model, 4, pack=pack):
            copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
            model.lm_head.weight.zero_()
            model.transformer.h[0].mlp.c_fc.weight.zero_()
            for other in (copied, loaded):
                assert torch.allclose(other(IDS).logits, expected, atol=1e-5)
        for other in (copied, loaded):
            assert torch.allclose(other(IDS).logits, expected, atol=1e-5)


@needs_extension
def test_another_thread_gets_right_results_throughout():
    model, wrong, stop = gpt2(), [], threading.Event()
    with torch.no_grad():
        expected = model(IDS).logits

    def use():
        with torch.no_grad():
            while not stop.is_set():
                if not torch.allclose(model(IDS).logits, expected, atol=1e-5):
                    wrong.append(1)

    def swap():
        for index in range(30):
            with fast_linears(model, 4, pack=index % 2 == 0), torch.no_grad():
                if not torch.allclose(model(IDS).logits, expected, atol=1e-5):
                    wrong.append(1)

    before = inside(model)
    user = threading.Thread(target=use)
    swappers = [threading.Thread(target=swap) for _ in range(2)]
    for thread in (user, *swappers):
        thread.start()
    for thread in swappers:
        thread.join()
    stop.set()
    user.join()
    assert not wrong
    assert inside(model) == before


@needs_extension
def test_packing_stops_at_a_quarter_of_the_free_memory(monkeypatch, caplog, kernel_calls):
    layer = torch.nn.Linear(64, 64, bias=False)
    for free, packed in [(4 * 64 * 64 * 4, True), (4 * 64 * 64 * 4 - 1, False), (None, False)]:
        monkeypatch.setattr(modules, "free_bytes", lambda device, free=free: free)
        caplog.clear()
        with torch.no_grad(), fast_linears(layer, 1, pack=True):
            layer(torch.randn(1, 64))
        assert kernel_calls.pop() == (1, packed)
        assert bool(caplog.records) is not packed
    assert "more than 25% of the free memory (unknown)" in caplog.text
    monkeypatch.undo()
    assert 0 < modules.free_bytes(torch.device("cpu")) < 1 << 50


@needs_extension
def test_packed_layers_for_many_rows(isa, kernel_calls):
    """More than the 64 rows that pass together; the bits do not depend on how many there are."""
    layer = torch.nn.Linear(70, 40)
    x = torch.randn(513, 70)
    with torch.no_grad(), fast_linears(layer, 513, pack=True):
        few, many, all_rows = layer(x[100:130]), layer(x[:512]), layer(x)
    if isa != "avx2":
        assert not kernel_calls
        return
    assert kernel_calls == [(30, True), (512, True)]
    assert torch.equal(many[100:130], few)
    assert torch.allclose(many, all_rows[:512], atol=1e-5)


@needs_extension
def test_where_packing_pays(isa, monkeypatch):
    layer = torch.nn.Linear(64, 64)
    assert modules.packing_pays(layer, 48) == (isa == "avx2")
    assert not modules.packing_pays(layer, 2)
    for free in (4 * 4 * 64 * 64 - 1, None):
        monkeypatch.setattr(modules, "free_bytes", lambda device, free=free: free)
        assert not modules.packing_pays(layer, 48)


@needs_extension
def test_the_packed_copy_is_used_until_the_weight_changes(kernel_calls):
    layer = torch.nn.Linear(20, 10)
    x = torch.randn(2, 20)
    with torch.no_grad(), fast_linears(layer, 2, pack=True):
        layer(x)
        layer.weight.add_(1)
        assert torch.allclose(layer(x), torch_linear(x, layer.weight, layer.bias), atol=1e-5)
    assert kernel_calls == [(2, True), (2, False)]


def test_arguments():
    layer = torch.nn.Linear(2, 2)
    with (
        pytest.raises(ValueError, match="pack is 'never', must be one of 'auto', True, False"),
        fast_linears(layer, 1, pack="never"),
    ):
        pass
    with pytest.raises(ValueError, match="rows_hint is 0, must be at least 1"), fast_linears(layer, 0):
        pass
    with fast_linears(layer, most_rows() + 1) as routed:
        assert routed == 0


def test_without_the_extension_nothing_changes(monkeypatch):
    monkeypatch.setattr(modules._backends, "extension", lambda: None)
    layer = torch.nn.Linear(2, 2)
    with fast_linears(layer, 1) as routed:
        assert routed == 0
        assert "forward" not in layer.__dict__
