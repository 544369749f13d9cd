"""The engines of `peers.py`: how each gets its weights from a Hugging Face folder, and how it continues token ids.

`convert` runs in a process of its own. What it makes lies beside the folder; weight types that share a file share it.
No engine may stop before all tokens are there.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import runpy
import sys
from dataclasses import dataclass, field
from pathlib import Path

LENGTH = 128  # tokens a row at most: prompt and new ones
ROWS = 48  # rows at a time at most
OPENVINO = {  # properties
    "float32": {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"},
    "bfloat16": {"INFERENCE_PRECISION_HINT": "bf16"},
    "int8": {},
}


class Engine:
    """One engine with one type of weights."""

    module: str  # without it the engine is not installed
    versions: tuple[str, ...] = ()  # distributions
    converts = True  # it reads files of its own

    def __init__(self, folder: Path, weights: str, threads: int, **search):
        raise NotImplementedError

    @classmethod
    def convert(cls, folder: Path, weights: str) -> None:
        """Make what `__init__` reads."""
        raise NotImplementedError

    def generate(self, ids: list[list[int]], new: int) -> list[list[int]]:
        """New tokens of a batch, by greedy search unless it is ours."""
        raise NotImplementedError

    def answer(self, ids: list[list[int]], new: int, size: int) -> list[list[int]]:
        """New tokens of many requests, `size` at a time. They are of one length, so batches end together."""
        return [row for i in range(0, len(ids), size) for row in self.generate(ids[i : i + size], new)]


# ---- transformers and ours -------------------------------------------------------------------------------------------


class Transformers(Engine):
    module, converts = "transformers", False
    versions = ("transformers", "torch")

    def __init__(self, folder, weights, threads, **search):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, weights), attn_implementation="sdpa"
        ).eval()
        self.model.config.eos_token_id = self.model.generation_config.eos_token_id = None
        self.arguments, self.search = {}, search

    def generate(self, ids, new):
        import torch

        ids = torch.tensor(ids)
        arguments = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, **self.arguments}
        with torch.inference_mode():
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
        return out[:, ids.shape[1] :].tolist()

    def judge(self, prefixes: list[list[int]], pairs: list[list[int]]) -> list[tuple[bool, str]]:
        import torch
        from decode import near_ties

        with torch.inference_mode():
            return near_ties(self.model, prefixes, pairs)


class Ours(Transformers):
    """`search`: strategy, top_k and penalty_alpha, and what else both of our entries take. `weights` is the type the
    model is loaded in, and of 8 bits the option of that name over a float32 model."""

    module = "simctg_fast"
    versions = ("simctg_fast", "transformers", "torch")

    def __init__(self, folder, weights, threads, **search):
        from simctg_fast import ContrastiveSearch

        super().__init__(folder, "float32" if weights == "int8" else weights, threads)
        search |= {"weights": "int8"} if weights == "int8" else {}
        self.search = search
        given = {name: value for name, value in search.items() if name != "strategy"}
        if search["strategy"] == "greedy":
            given |= {"top_k": 1, "penalty_alpha": 0.0}
        self.arguments = {"custom_generate": ContrastiveSearch(**given)}
        self.engines = {}

    def answer(self, ids, new, size):
        from throughput import Ids

        from simctg_fast.engine import Engine

        if size not in self.engines:
            given = self.search
            if given["strategy"] == "greedy":
                given = {name: value for name, value in given.items() if name not in ("top_k", "penalty_alpha")}
            self.engines[size] = Engine(self.model, Ids(), slots=size, batching="slots", **given)
        lines = [{"id": i, "prompt": " ".join(map(str, row)), "max_new_tokens": new} for i, row in enumerate(ids)]
        results = {result.id: result for result in self.engines[size].generate(lines)}
        if errors := [result.error for result in results.values() if result.error]:
            raise RuntimeError(f"{len(errors)} errors, the first: {errors[0]}")
        return [results[i].token_ids for i in range(len(ids))]


# ---- peers -----------------------------------------------------------------------------------------------------------


class CTranslate2(Engine):
    module = "ctranslate2"
    versions = ("ctranslate2",)

    def __init__(self, folder, weights, threads, **search):
        import ctranslate2

        self.generator = ctranslate2.Generator(f"{folder}-ct2", compute_type=weights, intra_threads=threads)

    @classmethod
    def convert(cls, folder, weights):
        from ctranslate2.converters import TransformersConverter

        if not Path(f"{folder}-ct2").exists():  # one for all types
            TransformersConverter(str(folder)).convert(f"{folder}-ct2")

    def generate(self, ids, new):
        return self.answer(ids, new, len(ids))

    def answer(self, ids, new, size):
        results = self.generator.generate_batch(
            [[f"<{i}>" for i in row] for row in ids],
            max_batch_size=size,
            max_length=new,
            include_prompt_in_result=False,
            end_token=[],
        )
        return [result.sequences_ids[0] for result in results]


class OpenVINO(Engine):
    """Continuous batching over its paged attention. In bfloat16 and 8 bits it keeps its own defaults: a cache of 8
    bits, and with 8-bit weights the arithmetic that it thinks best."""

    module = "openvino_genai"
    versions = ("openvino-genai",)

    def __init__(self, folder, weights, threads, **search):
        import openvino_genai

        cache = openvino_genai.SchedulerConfig()
        cache.cache_size, cache.max_num_seqs, cache.enable_prefix_caching = 1, ROWS, False
        cache.max_num_batched_tokens = ROWS * LENGTH
        properties = {"INFERENCE_NUM_THREADS": threads, **OPENVINO[weights]}
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(self.path(folder, weights), cache, "CPU", properties)

    @staticmethod
    def path(folder, weights) -> str:
        return f"{folder}-openvino" + ("-int8" if weights == "int8" else "")

    @classmethod
    def convert(cls, folder, weights):
        from peer_exports import openvino_compressed, openvino_folder

        plain = Path(cls.path(folder, "float32"))
        if not plain.exists():  # all types begin with it
            openvino_folder(folder, plain)
        if weights == "int8":
            openvino_compressed(plain, Path(cls.path(folder, weights)))

    def generate(self, ids, new):
        import numpy as np
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
        prompts = [openvino.Tensor(np.array([row])) for row in ids]
        return [result.m_generation_ids[0] for result in self.pipeline.generate(prompts, [config] * len(ids))]


class OnnxRuntime(Engine):
    module = "onnxruntime_genai"
    versions = ("onnxruntime-genai",)

    def __init__(self, folder, weights, threads, **search):
        import onnxruntime_genai

        config = onnxruntime_genai.Config(f"{folder}-ort-{weights}")
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.model = onnxruntime_genai.Model(config)

    @classmethod
    def convert(cls, folder, weights):
        precision = {"float32": "fp32"}.get(weights, weights)
        arguments = ["-i", folder, "-o", f"{folder}-ort-{weights}", "-c", f"{folder}-ort-cache"]
        sys.argv = ["builder", *map(str, arguments), "-e", "cpu", "-p", precision]
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")

    def generate(self, ids, new):
        import numpy as np
        import onnxruntime_genai

        parameters = onnxruntime_genai.GeneratorParams(self.model)
        length = len(ids[0]) + new
        parameters.set_search_options(batch_size=len(ids), max_length=length, min_length=length, do_sample=False)
        generator = onnxruntime_genai.Generator(self.model, parameters)
        generator.append_tokens(np.array(ids, dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return [generator.get_sequence(row)[len(ids[0]) :].tolist() for row in range(len(ids))]


class LlamaCpp(Engine):
    """Its own loop is for one sequence: batches go through `llama_decode`, and numpy takes the best token. The cache is
    float16 as by default, but for float32 weights."""

    module = "llama_cpp"
    versions = ("llama-cpp-python",)

    def __init__(self, folder, weights, threads, **search):
        import llama_cpp as api

        self.quiet = api.llama_log_callback(lambda *_: None)  # kept: C calls it
        api.llama_log_set(self.quiet, None)
        api.llama_backend_init()
        path = f"{folder}-{weights}.gguf".encode()
        self.model = api.llama_model_load_from_file(path, api.llama_model_default_params())
        if not self.model:
            raise RuntimeError("it refuses the file")
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.batch = api.llama_batch_init(ROWS * LENGTH, 0, 1)
        self.cache = 0 if weights == "float32" else 1  # its numbers of float32 and float16
        self.threads, self.rows, self.context = threads, 0, None

    def open(self, api, rows: int) -> None:
        if self.context is not None:
            api.llama_free(self.context)
        given = api.llama_context_default_params()
        given.n_ctx, given.n_batch, given.n_seq_max = rows * LENGTH, rows * LENGTH, rows
        given.n_threads = given.n_threads_batch = self.threads
        given.type_k = given.type_v = self.cache
        self.rows, self.context = rows, api.llama_init_from_model(self.model, given)
        if not self.context:
            raise RuntimeError(f"it has no room for {rows} rows")

    @classmethod
    def convert(cls, folder, weights):
        from peer_exports import gguf_file

        gguf_file(folder, Path(f"{folder}-{weights}.gguf"), weights)

    def generate(self, ids, new):
        import llama_cpp as api

        if self.rows != len(ids):
            self.open(api, len(ids))
        api.llama_memory_clear(api.llama_get_memory(self.context), False)
        rows = [[best] for best in self.step(api, ids, 0)]
        for place in range(len(ids[0]), len(ids[0]) + new - 1):
            for row, best in zip(rows, self.step(api, [row[-1:] for row in rows], place), strict=True):
                row.append(best)
        return rows

    def step(self, api, ids: list[list[int]], place: int) -> list[int]:
        """The best next token of each row, whose tokens `ids` stand at `place`."""
        import numpy as np

        batch, at = self.batch, 0
        for row, tokens in enumerate(ids):
            for offset, token in enumerate(tokens):
                batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, place + offset, 1
                batch.seq_id[at][0], batch.logits[at] = row, offset == len(tokens) - 1
                at += 1
        batch.n_tokens = at
        if code := api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode answers {code}")
        logits = api.llama_get_logits(self.context)
        return np.ctypeslib.as_array(logits, (len(ids), self.vocabulary)).argmax(1).tolist()


# ---- what is compared ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """An engine with a type of weights, and what ours searches by."""

    name: str
    engine: type[Engine]
    weights: str
    search: dict = field(default_factory=dict, hash=False)

    @property
    def label(self) -> str:
        return f"{self.name} {self.weights}"

    @property
    def greedy(self) -> bool:
        return self.search.get("strategy", "greedy") == "greedy"

    def missing(self) -> bool:
        return importlib.util.find_spec(self.engine.module) is None

    def versions(self) -> dict[str, str]:
        return {} if self.missing() else {name: version(name) for name in self.engine.versions}


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # from a checkout
        return "?"


REFERENCE = Variant("transformers, greedy", Transformers, "float32")
GREEDY = ("ours, greedy", Ours, {"strategy": "greedy"})
CONTRASTIVE = ("ours, contrastive k=4", Ours, {"strategy": "contrastive", "top_k": 4, "penalty_alpha": 0.6})
TABLE = (  # name, engine, search; types of weights
    (GREEDY, ("float32", "bfloat16", "int8")),
    (CONTRASTIVE, ("float32", "bfloat16", "int8")),
    (("CTranslate2", CTranslate2, {}), ("float32", "bfloat16", "int8")),
    (("OpenVINO GenAI", OpenVINO, {}), ("float32", "bfloat16", "int8")),
    (("ONNX Runtime GenAI", OnnxRuntime, {}), ("float32", "int8", "int4")),
    (("llama.cpp", LlamaCpp, {}), ("float32", "bfloat16", "int8")),
)
VARIANTS = (
    REFERENCE,
    *(Variant(name, engine, type_, search) for (name, engine, search), types in TABLE for type_ in types),
)
