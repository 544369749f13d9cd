"""What two engines of `peers.py` read, from a Hugging Face folder.

A GGUF file for llama.cpp, without a vocabulary: Llama's and GPT-2's shapes. And OpenVINO's form, with the cache as its
state, as OpenVINO GenAI expects it: optimum-intel would write that, but not beside the transformers that we need.
"""

from __future__ import annotations

import shutil
from pathlib import Path

QUANTIZATION = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}


def gguf_file(folder: Path, out: Path, weights: str) -> None:
    import gguf
    import numpy as np
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    llama = config.model_type == "llama"
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads if llama else heads
    kind = gguf.GGMLQuantizationType[QUANTIZATION[weights]]
    writer = gguf.GGUFWriter(str(out), config.model_type)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_feed_forward_length(config.intermediate_size if llama else 4 * config.hidden_size)
    if llama:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.hidden_size // heads)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA if llama else gguf.MODEL_ARCH.GPT2, config.num_hidden_layers)
    for name, tensor in load_file(folder / "model.safetensors").items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if not llama and tensor.ndim == 2 and ".h." in name:
            tensor = tensor.T  # Conv1D
        if "q_proj" in name or "k_proj" in name:  # pairs of rotary channels lie side by side
            count = heads if "q_proj" in name else kv_heads
            tensor = tensor.view(count, 2, -1, config.hidden_size).transpose(1, 2).reshape(tensor.shape)
        array = tensor.to(torch.float32).contiguous().numpy()
        if tensor.ndim == 1 or target == "position_embd.weight" or weights == "float32":
            writer.add_tensor(target, array.astype(np.float32))
        else:
            writer.add_tensor(target, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Past:
    """The part of transformers' cache that a traced step uses."""

    def __init__(self, tensors):
        self.tensors = list(tensors)  # keys and values of each layer in turn

    def update(self, keys, values, layer, *args, **kwargs):
        import torch

        for place, new in zip((2 * layer, 2 * layer + 1), (keys, values), strict=True):
            self.tensors[place] = torch.cat((self.tensors[place], new), -2)
        return self.tensors[2 * layer], self.tensors[2 * layer + 1]

    def get_seq_length(self, layer: int = 0):
        return self.tensors[2 * layer].shape[-2]


def openvino_folder(folder: Path, out: Path) -> None:
    import openvino
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32).eval()
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    shape = [heads, config.hidden_size // config.num_attention_heads]
    past = [f"past_key_values.{i}.{kind}" for i in range(config.num_hidden_layers) for kind in ("key", "value")]

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, position_ids, past):
            new, places = input_ids.shape[1], torch.arange(attention_mask.shape[1])
            seen = places[None] <= places[attention_mask.shape[1] - new :, None]
            seen = seen[None, None] & attention_mask[:, None, None].bool()
            mask = torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, torch.finfo(torch.float32).min)
            cache = Past(past)
            out = self.model(input_ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache)
            return (out.logits, *cache.tensors)

    example = {
        "input_ids": torch.ones(2, 2, dtype=torch.long),
        "attention_mask": torch.ones(2, 4, dtype=torch.long),
        "position_ids": torch.tensor([[2, 3], [2, 3]]),
        "past": [torch.zeros(2, shape[0], 2, shape[1]) for _ in past],
    }
    with torch.no_grad():
        graph = openvino.convert_model(Step(), example_input=example)
    give_state(graph, past, shape)
    out.mkdir()
    openvino.save_model(graph, out / "openvino_model.xml", compress_to_fp16=False)
    config.save_pretrained(out)
    model.generation_config.save_pretrained(out)


def openvino_compressed(folder: Path, out: Path) -> None:
    """The same with weights of 8 bits."""
    import nncf
    import openvino

    graph = nncf.compress_weights(openvino.Core().read_model(folder / "openvino_model.xml"))
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("openvino_model.*"))
    openvino.save_model(graph, out / "openvino_model.xml", compress_to_fp16=False)


def give_state(graph, past: list[str], shape: list[int]) -> None:
    """Name inputs and outputs as OpenVINO GenAI knows them; the cache becomes state, which beams may reorder."""
    import numpy as np
    import openvino
    from openvino import opset13
    from openvino._offline_transformations import apply_make_stateful_transformation

    for port, name in zip(graph.inputs, ["input_ids", "attention_mask", "position_ids", *past], strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
        wanted = [-1, shape[0], -1, shape[1]] if name in past else [-1, -1]
        port.get_node().set_partial_shape(openvino.PartialShape(wanted))
    present = [name.replace("past_key_values", "present") for name in past]
    for port, name in zip(graph.outputs, ["logits", *present], strict=True):
        port.get_tensor().set_names({name})
    beams = opset13.parameter([-1], openvino.Type.i32, name="beam_idx")
    beams.output(0).get_tensor().add_names({"beam_idx"})
    graph.add_parameters([beams])
    zero = opset13.constant(0)
    for name in past:
        port = graph.input(name)
        readers = port.get_target_inputs()
        ordered = opset13.gather(port, beams, zero)
        for reader in readers:
            reader.replace_source_output(ordered.output(0))
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, dict(zip(past, present, strict=True)))
    rows = opset13.gather(opset13.shape_of(graph.input("input_ids"), output_type="i64"), opset13.constant([0]), zero)
    numbers = [opset13.constant(np.array([number])) for number in (shape[0], 0, shape[1])]
    empty = opset13.broadcast(opset13.constant(np.float32(0)), opset13.concat([rows, *numbers], axis=0))
    for operation in graph.get_ops():
        if operation.get_type_name() == "ReadValue":
            operation.set_arguments([empty])
    graph.validate_nodes_and_infer_types()
