"""What works together: each setup of a model is tried with decoding, the loss and features; the table is what happened.

    python benchmarks/compatibility.py                     # prints the table
    python benchmarks/compatibility.py --write             # and writes it to docs/compatibility.md
    python benchmarks/compatibility.py --only "LoRA (PEFT)"

"Decodes": the tokens of the definition, recomputed without any cache on the same model. "Trains": after a step with
likelihood and contrastive loss every trainable parameter has a gradient without NaN.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PAGE = Path(__file__).resolve().parents[1] / "docs" / "compatibility.md"
VOCABULARY = 96
GROUP = 32  # inputs of a layer that share a scale where weights have four bits
TIE = 0.02  # scores nearer than this are one to half precision
# Dynamo and AOTAutograd are what can meet our code; Inductor would spend most of an hour on C++ for these tiny models.
COMPILE = {"dynamic": True, "backend": "aot_eager"}


class NotHereError(Exception):
    """This machine lacks what the setup needs."""


class RefusedError(Exception):
    """The setup does not work, and the text says why."""


# ---- models ----------------------------------------------------------------------------------------------------------


def build(kind: str, **options):
    """A tiny random model: ``"decoder"`` (Llama) or ``"encoder-decoder"`` (T5)."""
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": None, "tie_word_embeddings": False}
    if kind == "decoder":
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(**common, **sizes, num_key_value_heads=2, bos_token_id=1))
    else:
        sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
        model = T5ForConditionalGeneration(T5Config(**common, **sizes, decoder_start_token_id=0))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


def saved(kind: str, **options):
    """The model of ``build``, written and loaded again with these options of ``from_pretrained``."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    loader = AutoModelForCausalLM if kind == "decoder" else AutoModelForSeq2SeqLM
    folder = tempfile.mkdtemp()  # offloaded weights are read later
    build(kind).save_pretrained(folder)
    if options.get("offload_folder"):
        options["offload_folder"] = tempfile.mkdtemp()
    return loader.from_pretrained(folder, **options).eval()


def needs(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise NotHereError(f"{package} is not installed")


def needs_gpu() -> None:
    if not torch.cuda.is_available():
        raise NotHereError("no GPU")


# ---- setups ----------------------------------------------------------------------------------------------------------


def lora(kind: str):
    needs("peft")
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "v_proj"] if kind == "decoder" else ["q", "v"]
    model = get_peft_model(build(kind), LoraConfig(r=4, target_modules=targets, lora_dropout=0.0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # which begins as zeros, and then would change nothing
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def lora_merged(kind: str):
    return lora(kind).merge_and_unload().eval()


def learned_prompt(config: str) -> Callable:
    def make(kind: str):
        needs("peft")
        import peft

        task = "CAUSAL_LM" if kind == "decoder" else "SEQ_2_SEQ_LM"
        model = peft.get_peft_model(build(kind), getattr(peft, config)(task_type=task, num_virtual_tokens=4))
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
        return model.eval()

    return make


def torchao(kind: str):
    needs("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = build(kind)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def torchao_dynamic(kind: str):
    needs("torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = build(kind)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def bitsandbytes(**bits: bool) -> Callable:
    def make(kind: str):
        needs("bitsandbytes", "accelerate")
        from transformers import BitsAndBytesConfig

        return saved(kind, quantization_config=BitsAndBytesConfig(**bits), device_map="auto")

    return make


def hqq(kind: str):
    needs("hqq")
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = build(kind)  # transformers 5 has no loader of HQQ yet
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    for name, layer in layers:
        config = BaseQuantizeConfig(nbits=4, group_size=GROUP)
        if name != "lm_head" and not name.endswith(".wo"):  # T5 reads the weight of its "wo" by itself
            model.set_submodule(name, HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu"))
    return model


def quanto(weights: str) -> Callable:
    def make(kind: str):
        needs("optimum", "accelerate")
        needs("optimum.quanto")  # apart: without optimum its very search fails
        from transformers import QuantoConfig

        return saved(kind, quantization_config=QuantoConfig(weights=weights), device_map="cpu", dtype=torch.float32)

    return make


def _four_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's weight as numbers from 0 to 15, (in, out), and its scales, (in // GROUP, out): 8 stands for zero."""
    groups = weight.detach().T.unflatten(0, (-1, GROUP))
    scales = (groups.abs().amax(1) / 7).half()
    numbers = (groups / scales.float()[:, None]).round().clamp(-8, 7) + 8
    return numbers.flatten(0, 1).to(torch.int32), scales


def _packed(numbers: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Eight numbers of the last dimension to an int32, the lowest four bits first."""
    eights = numbers.unflatten(-1, (-1, 8))
    return sum(eights[..., place] << (4 * bits) for bits, place in enumerate(order)).contiguous()


def gptq_layer(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    numbers, scales = _four_bits(weight)
    straight = tuple(range(8))
    zeros = torch.full(scales.shape, 7, dtype=torch.int32)  # the format stores one less
    return {
        "qweight": _packed(numbers.T, straight).T.contiguous(),
        "qzeros": _packed(zeros, straight),
        "scales": scales,
        "g_idx": torch.arange(len(numbers), dtype=torch.int32) // GROUP,
    }


def awq_layer(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    numbers, scales = _four_bits(weight)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    zeros = torch.full(scales.shape, 8, dtype=torch.int32)
    return {"qweight": _packed(numbers, order), "qzeros": _packed(zeros, order), "scales": scales}


def four_bit_checkpoint(kind: str, pack: Callable, quantization_config: dict) -> str:
    """A folder with the model of ``build``, its layers but the head packed: rounded, without calibration."""
    from safetensors.torch import save_file

    model, folder = build(kind), tempfile.mkdtemp()
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weights |= {f"{name}.{part}": value for part, value in pack(weights.pop(f"{name}.weight")).items()}
    model.config.quantization_config = quantization_config
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
    return folder


def gptq(kind: str):
    needs("gptqmodel", "optimum", "accelerate")
    decoder_only(kind)
    config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
    folder = four_bit_checkpoint(kind, gptq_layer, config | {"checkpoint_format": "gptq"})
    return decoder_from(folder)


def awq(kind: str):
    needs("gptqmodel", "accelerate")
    decoder_only(kind)
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    folder = four_bit_checkpoint(kind, awq_layer, config)
    return decoder_from(folder)


def decoder_from(folder: str):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32).eval()


def decoder_only(kind: str) -> None:
    if kind != "decoder":
        raise NotHereError("packed here for the decoder alone")


def device_map(kind: str):
    needs("accelerate")
    return saved(kind, device_map="auto")


def offloaded(kind: str):
    needs("accelerate")
    if kind == "decoder":
        places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
        places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    else:
        places = {"shared": "cpu", "encoder": "cpu", "decoder.embed_tokens": "cpu", "decoder.block.0": "cpu"}
        places |= {"decoder.block.1": "disk", "decoder.final_layer_norm": "cpu", "decoder.dropout": "cpu"}
        places |= {"lm_head": "cpu"}
    return saved(kind, device_map=places, offload_folder=True)


def compiled_forward(kind: str):
    model = build(kind)
    model.forward = torch.compile(model.forward, **COMPILE)
    return model


def compiled_module(kind: str):
    return torch.compile(build(kind), **COMPILE)


def compiled_in_place(kind: str):
    model = build(kind)
    model.compile(**COMPILE)
    return model


def in_dtype(dtype: torch.dtype, device: str) -> Callable:
    def make(kind: str):
        if device == "cuda":
            needs_gpu()
        return build(kind).to(device, dtype)

    return make


def checkpointed(kind: str):
    model = build(kind)
    model.gradient_checkpointing_enable()
    return model


SETUPS: dict[str, Callable] = {
    "float32": build,
    "float16, CPU": in_dtype(torch.float16, "cpu"),
    "bfloat16, CPU": in_dtype(torch.bfloat16, "cpu"),
    "float16, GPU": in_dtype(torch.float16, "cuda"),
    "bfloat16, GPU": in_dtype(torch.bfloat16, "cuda"),
    "LoRA (PEFT)": lora,
    "LoRA, merged": lora_merged,
    "prompt tuning (PEFT)": learned_prompt("PromptTuningConfig"),
    "prefix tuning (PEFT)": learned_prompt("PrefixTuningConfig"),
    "p-tuning (PEFT)": learned_prompt("PromptEncoderConfig"),
    "torchao int8 weights": torchao,
    "torchao int8 weights and activations": torchao_dynamic,
    "bitsandbytes 8-bit": bitsandbytes(load_in_8bit=True),
    "bitsandbytes 4-bit": bitsandbytes(load_in_4bit=True),
    "HQQ 4-bit": hqq,
    "quanto int8": quanto("int8"),
    "quanto int4": quanto("int4"),
    "GPTQ 4-bit": gptq,
    "AWQ 4-bit": awq,
    '`device_map="auto"`': device_map,
    "`device_map`, a layer on disk": offloaded,
    "`torch.compile(model)`": compiled_module,
    "`model.compile()`": compiled_in_place,
    "`model.forward = torch.compile(…)`": compiled_forward,
    "gradient checkpointing": checkpointed,
}


# ---- what is tried with each -----------------------------------------------------------------------------------------


def device_of(model) -> torch.device:
    return next(iter(model.parameters())).device


def inputs_for(model) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    row = slice(5, None) if model.config.is_encoder_decoder else slice(0, 3)
    ids[1, row], mask[1, row] = 0, 0
    return {"input_ids": ids.to(device_of(model)), "attention_mask": mask.to(device_of(model))}


def decodes(model) -> str:
    """The tokens of whole-sequence recomputation, and the path that was taken."""
    from simctg_fast import ContrastiveSearch, support
    from simctg_fast.reference.contrastive_search import contrastive_search

    inputs = inputs_for(model)
    settings = {"max_new_tokens": 12, "do_sample": False}
    out = model.generate(**inputs, custom_generate=ContrastiveSearch(0.6, 4), **settings)
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return decodes_behind_a_learned_prompt(model)
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    plain = getattr(plain, "_orig_mod", plain)
    truth = contrastive_search(plain, **inputs, penalty_alpha=0.6, top_k=4, max_new_tokens=12)
    path, start = support(plain).path, truth.sequences.shape[1] - 12
    for row, (ours, theirs) in enumerate(zip(out.tolist(), truth.sequences.tolist(), strict=True)):
        step = next((i - start for i in range(len(theirs)) if i >= len(ours) or ours[i] != theirs[i]), None)
        if step is None:
            continue
        margin = min(float(truth.steps[step].score_margin[row]), float(truth.steps[step].candidate_margin[row]))
        if _is_float32(model) or margin > TIE:
            raise RefusedError(f"another token at step {step}, where the choice is clear by {margin:.2g}")
        path += "; a tie within rounding falls otherwise"
        break
    return f"yes ({path})"


def decodes_behind_a_learned_prompt(model) -> str:
    """The likeliest tokens by PEFT's own forward of the whole text: the definition above calls the model inside, which
    knows nothing of the prompt. Rows of one length: PEFT's own counts no position for padding."""
    from simctg_fast import ContrastiveSearch, support

    source = inputs_for(model)["input_ids"].flip(1).clone()
    source[source == 0] = 3
    inputs = {"input_ids": source, "attention_mask": torch.ones_like(source)}
    out = model.generate(**inputs, custom_generate=ContrastiveSearch(0.0), max_new_tokens=12, do_sample=False)
    for end in range(out.shape[1] - 12, out.shape[1]):
        text = inputs | {"decoder_input_ids": out[:, :end]}
        if not model.config.is_encoder_decoder:
            text = {"input_ids": out[:, :end], "attention_mask": torch.ones_like(out[:, :end])}
        with torch.no_grad():
            expected = model(**text, use_cache=False).logits[:, -1].argmax(dim=-1)
        if not torch.equal(out[:, end], expected):
            raise RefusedError(f"another token at step {end - out.shape[1] + 12} than by PEFT's own forward")
    return f"yes ({support(model).path})"


def trains(model) -> str:
    """Likelihood plus contrastive loss, backward."""
    from simctg_fast import contrastive_loss
    from simctg_fast.integrations._batch import real_tokens

    model.train()
    inputs = inputs_for(model)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    batch = inputs | {"labels": labels}
    outputs = model(**batch, output_hidden_states=True)
    two_sided = bool(model.config.is_encoder_decoder)
    states = (outputs.decoder_hidden_states if two_sided else outputs.hidden_states)[-1]
    mask = real_tokens(batch, two_sided)
    if states.shape[1] != mask.shape[1]:
        raise RefusedError(f"{states.shape[1]} hidden states for {mask.shape[1]} tokens: cut those of the prompt off")
    loss = outputs.loss + contrastive_loss(states, 1.0, mask)
    if not loss.requires_grad:
        raise RefusedError("no parameter is trainable; put adapters on it")
    loss.backward()
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    without = [name for name, p in trainable if p.grad is None]
    if not torch.isfinite(loss) or any(not torch.isfinite(p.grad).all() for _, p in trainable if p.grad is not None):
        raise RefusedError("NaN or infinity")
    if without:
        raise RefusedError(f"no gradient for {without[0]}" + (f" and {len(without) - 1} more" if without[1:] else ""))
    return "yes"


def gives_features(model) -> str:
    """Of two texts in a batch those of each alone."""
    from simctg_fast import extract_features

    class Characters:
        pad_token_id = eos_token_id = 0

        def __call__(self, texts, **options):
            return {"input_ids": [[3 + ord(letter) % 90 for letter in text] for text in texts]}

    together = extract_features(model, Characters(), ["longer text", "short"])
    alone = extract_features(model, Characters(), ["short"])
    wide = together.values.dtype == torch.float32 and device_of(model).type == "cpu"
    tolerance = 2e-4 if wide and _is_float32(model) else 6e-2
    if not torch.allclose(together[1], alone[0], rtol=tolerance, atol=tolerance):
        raise RefusedError(f"off by {float((together[1] - alone[0]).abs().max()):.2g} in a batch")
    return "yes"


def _is_float32(model) -> bool:
    """Throughout: a quantised weight calls itself float32 as well."""
    return all(p.dtype == torch.float32 and type(p.data) is torch.Tensor for p in model.parameters())


CHECKS = {
    "decodes, decoder": (decodes, "decoder"),
    "decodes, encoder-decoder": (decodes, "encoder-decoder"),
    "trains": (trains, "decoder"),
    "features": (gives_features, "decoder"),
}


def run_cell(setup: str, check: str) -> str:
    """What happened, in the words of the table: "yes …", "no: why", or "not tried: why"."""
    function, kind = CHECKS[check]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            return function(SETUPS[setup](kind))
        except NotHereError as error:
            return f"not tried: {error}"
        except RefusedError as error:
            return f"no: {error}"
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            return f"no: {first[:160]}"
        finally:
            torch._dynamo.reset()


def run_table(setups: list[str]) -> dict[str, dict[str, str]]:
    table = {}
    for setup in setups:
        table[setup] = {check: run_cell(setup, check) for check in CHECKS}
        print(setup, table[setup], sep=": ", file=sys.stderr)
    return table


# ---- the page --------------------------------------------------------------------------------------------------------

HEAD = """# What works together

Made by `python benchmarks/compatibility.py --write`, which runs every cell; `tests/project/test_compatibility.py` runs
them again and compares. Decoding is compared token by token with the definition, recomputed without a cache on the same
model; in brackets the path that `support(model)` names. Training is one step with likelihood and contrastive loss.
`torch.compile` is tried with `backend="aot_eager"`: the same tracing, without Inductor's compiler behind it.

"""


def versions() -> str:
    import transformers

    found = [f"torch {torch.__version__.partition('+')[0]}", f"transformers {transformers.__version__}"]
    for name in ("peft", "torchao", "bitsandbytes", "hqq", "optimum-quanto", "optimum", "gptqmodel", "accelerate"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def render(table: dict[str, dict[str, str]]) -> str:
    lines = [f"| setup | {' | '.join(CHECKS)} |", f"|---{'|---' * len(CHECKS)}|"]
    for setup, cells in table.items():
        lines.append(f"| {setup} | {' | '.join(cells[check].replace('|', '/') for check in CHECKS)} |")
    return "\n".join(lines) + "\n"


def read_page(text: str) -> dict[str, dict[str, str]]:
    """The table of a page, as `run_table` made it."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    names = rows[0][1:]
    return {row[0]: dict(zip(names, row[1:], strict=True)) for row in rows[2:]}


def merge(found: dict[str, str], before: dict[str, str]) -> dict[str, str]:
    """A row of the page: what cannot be tried here keeps what another machine found."""
    row = {}
    for check in CHECKS:
        row[check] = found.get(check, "not tried: no run yet")
        if row[check].startswith("not tried") and check in before:
            row[check] = before[check]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/compatibility.md")
    parser.add_argument("--only", action="append", choices=list(SETUPS), help="this setup; may be repeated")
    options = parser.parse_args()
    import transformers

    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    table = run_table(options.only or list(SETUPS))
    print(render(table))
    if options.write:
        before = read_page(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}
        whole = {setup: merge(table.get(setup, {}), before.get(setup, {})) for setup in SETUPS}
        PAGE.write_text(HEAD + render(whole) + f"\n{versions()}.\n", encoding="utf-8")


if __name__ == "__main__":
    main()
