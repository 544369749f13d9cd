"""A model and its tokenizer by name, ready for batched generation."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .assets import ADAPTER, ModelError, did_you_mean, resolve_model

if TYPE_CHECKING:
    import torch

__all__ = [
    "ModelError",
    "context_length",
    "find_model",
    "fitting_threads",
    "load_backbone",
    "load_model",
    "load_tokenizer",
]

logger = logging.getLogger("simctg_fast")

# Below this many parameters a token is too little work to share. On the bundled model a second thread is worth 10 % on
# an idle machine; on a busy one each of its many short waits costs a time slice, and it ran 50 times slower.
_ONE_THREAD_PARAMETERS = 20_000_000

_CANNOT = "the model cannot be loaded"
_HUB_SECONDS = 10.0  # for one answer of the hub

# PEFT's kinds of task and the heads that their adapters were trained under.
_HEADS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def load_model(
    name: str | os.PathLike[str],
    device: str | None = None,
    dtype: str | torch.dtype = "auto",
    *,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """``(model, tokenizer)``, decoder-only or encoder-decoder as the config says, in evaluation mode.

    Args:
        name: ``"bundled"``, a local folder or a hub name; of a model, or of an adapter that PEFT wrote, which comes
            back in its base model as ``peft.PeftModel.from_pretrained`` makes it.
        device: where the model goes; ``None`` is the first GPU if there is one, else the CPU.
        dtype: a torch dtype, its name, or ``"auto"`` for the one in the config.
        trust_remote_code: run Python files that come with the model. Without, a model that needs them is refused.

    Raises:
        ModelError: see `resolve_model`; the hub does not have it or cannot be reached; the files are no model, broken,
            or need `trust_remote_code`; the base model of an adapter cannot be had.
        ValueError: there is no such `device`.
        ImportError: an adapter, and peft is not installed.
    """
    import transformers

    target, source = _device(device), _found(name, trust_remote_code)
    base, _ = _base(source)
    with _one_line(base):
        config = transformers.AutoConfig.from_pretrained(base.place, **base.options)
    loader = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    model, tokenizer = _loaded(loader, source, base, dtype)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # The continuation is written behind the prompt, so the padding of a decoder's prompt must stand before it.
    tokenizer.padding_side = "right" if config.is_encoder_decoder else "left"
    return model.to(target), tokenizer


def load_backbone(
    name: str | os.PathLike[str],
    device: str | None = None,
    dtype: str | torch.dtype = "auto",
    *,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """``(model, tokenizer)`` for `extract_features`: any architecture, without its output layer.

    An adapter's base keeps the head that the adapter was trained under. Arguments and errors are those of `load_model`.

    Raises:
        ModelError: also for an adapter that is a learned prompt, which hidden states of texts do not show.
    """
    import transformers

    target, source = _device(device), _found(name, trust_remote_code)
    base, adapter = _base(source)
    if "num_virtual_tokens" in adapter:
        raise ModelError(f"{_CANNOT}: the adapter in {source.place!r} is a learned prompt, which no hidden state shows")
    named = (adapter.get("auto_mapping") or {}).get("base_model_class")
    head = getattr(transformers, str(named or _HEADS.get(str(adapter.get("task_type")), "AutoModel")), None)
    if head is None:
        raise ModelError(f"{_CANNOT}: the adapter in {source.place!r} is for a {named}, not in transformers")
    model, tokenizer = _loaded(head, source, base, dtype, complete=False)
    return model.to(target), tokenizer


def load_tokenizer(name: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a local folder or hub name: sentencepiece, ``tokenizer.json`` or vocabulary files.

    Raises:
        ModelError: see `load_model`; or a folder without the files of its tokenizer (transformers would make an empty
            one), or with files that cannot be read.
    """
    return _tokenizer(_found(name, trust_remote_code))


def find_model(name: str | os.PathLike[str]) -> str:
    """`resolve_model`, and of a hub name whether it can be had: asked once, within seconds, also with no network.

    Raises:
        ModelError: see `resolve_model`; or the hub has no such model, does not give it away, or cannot be reached and
            the cache does not hold it.
    """
    return _found(name, False).place


@dataclass(frozen=True)
class _Source:
    """Where the files of a model are: a folder or a hub name, and the options of every ``from_pretrained`` of it."""

    place: str
    options: dict[str, Any]
    is_adapter: bool

    def __str__(self) -> str:
        return f"the folder {self.place!r}" if os.path.isdir(self.place) else repr(self.place)


def _found(name: str | os.PathLike[str], trust_remote_code: bool) -> _Source:
    place = resolve_model(name)
    # Passed even where it is False: unset, transformers asks on standard input, where prompts may be lying.
    options: dict[str, Any] = {"trust_remote_code": bool(trust_remote_code)}
    for file in (ADAPTER, "config.json"):  # an adapter's folder may hold its base's config too
        if os.path.isfile(os.path.join(place, file)):
            return _Source(place, options, file == ADAPTER)
    file, local_only = _on_hub(place)
    return _Source(place, options | ({"local_files_only": True} if local_only else {}), file == ADAPTER)


def _on_hub(name: str) -> tuple[str, bool]:
    """The file that says what `name` is, and whether the hub does not answer, but the cache has it."""
    from huggingface_hub import constants, errors, try_to_load_from_cache

    known = [file for file in ("config.json", ADAPTER) if isinstance(try_to_load_from_cache(name, file), str)]
    here = "; the folder of that name has no config.json" if os.path.isdir(name) else ""
    tail = here + did_you_mean(name)
    try:
        return _ask_hub(name), False
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{_CANNOT}: {name!r} is gated; ask for access at {constants.ENDPOINT}/{name}, and log in with "
            f"`hf auth login`{tail}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{_CANNOT}: there is no folder {name!r}, and on the hub no such model, or a private one, for which "
            f"`hf auth login` logs in{tail}"
        ) from error
    except errors.EntryNotFoundError as error:
        raise ModelError(f"{_CANNOT}: {name!r} on the hub holds no model, it has no config.json{tail}") from error
    except Exception as error:  # no connection, in the words of an HTTP library that depends on the hub's version
        if known:
            return known[0], True
        if isinstance(error, errors.OfflineModeIsEnabled):
            what = "which HF_HUB_OFFLINE forbids to ask, has it not in its cache"
        else:
            status = getattr(getattr(error, "response", None), "status_code", None)
            what = "cannot be reached" if status is None else f"answers with error {status}"
            what += f" ({_shortened(error)})"
        raise ModelError(
            f"{_CANNOT}: there is no folder {name!r}, and the hub, {constants.ENDPOINT}, {what}{tail}"
        ) from error


def _ask_hub(name: str) -> str:
    """Which of the two files it has. One attempt: a download tries again for half a minute, and so for every file."""
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        raise errors.OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=_HUB_SECONDS)
        return "config.json"
    except errors.EntryNotFoundError:
        get_hf_file_metadata(hf_hub_url(name, ADAPTER), timeout=_HUB_SECONDS)
        return ADAPTER


def _loaded(loader: Any, source: _Source, base: _Source, dtype: Any, complete: bool = True) -> tuple[Any, Any]:
    """Model and tokenizer; of an adapter the one in its base, the other its own if it has one."""
    tokenizer = _tokenizer(source if _has_tokenizer(source) else base)
    model = _weights(loader, base, dtype, complete)
    return (_adapted(model, tokenizer, source) if source.is_adapter else model), tokenizer


def _tokenizer(source: _Source) -> Any:
    import transformers

    with _one_line(source, f"the tokenizer in {source.place!r} cannot be read"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.place, **source.options)
    names = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if tokenizer.vocab_files_names and os.path.isdir(source.place) and names.isdisjoint(os.listdir(source.place)):
        raise ModelError(f"{source} holds no tokenizer: a {type(tokenizer).__name__} needs one of {sorted(names)}")
    return tokenizer


def _weights(loader: Any, source: _Source, dtype: Any, complete: bool = True) -> Any:
    """The model in evaluation mode; `complete`: it needs every one of its weights."""
    options = dict(source.options)
    if "local_files_only" in options:
        options["adapter_kwargs"] = {"local_files_only": True}  # an adapter is looked for too, by options of its own
    with _one_line(source):
        model, info = loader.from_pretrained(
            source.place, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    if wrong := sorted(info.get("mismatched_keys") or (), key=str):
        name, there, needed = wrong[0]
        raise ModelError(
            f"{_CANNOT}: {source} has weights of another shape than its config.json says: {name} is {tuple(there)}, "
            f"not {tuple(needed)}" + (f", and {len(wrong) - 1} more" if wrong[1:] else "")
        )
    if complete and (missing := sorted(info.get("missing_keys") or ())):
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        logger.warning("%s has no weights for %s%s: these are random.", source, missing[0], more)
    return model.eval()


def _base(source: _Source) -> tuple[_Source, dict[str, Any]]:
    """The model itself, or that of an adapter with what PEFT wrote beside it."""
    if not source.is_adapter:
        return source, {}
    with _one_line(source):
        adapter = json.loads(Path(_file(source, ADAPTER)).read_text(encoding="utf-8"))
    if not isinstance(adapter, dict) or not isinstance(adapter.get("base_model_name_or_path"), str):
        raise ModelError(f"{_CANNOT}: {source} has an {ADAPTER} that names no base_model_name_or_path")
    try:
        base = _found(adapter["base_model_name_or_path"], source.options["trust_remote_code"])
    except ModelError as error:
        raise ModelError(f"the base model of the adapter in {source} cannot be had: {error}") from error
    if base.is_adapter:
        raise ModelError(f"the base model of the adapter in {source} is {base}, an adapter itself: merge that first")
    return base, adapter


def _has_tokenizer(source: _Source) -> bool:
    """An adapter's need not; of any other model it is to be there."""
    from huggingface_hub.errors import EntryNotFoundError

    if not source.is_adapter:
        return True
    try:
        return os.path.isfile(_file(source, "tokenizer_config.json"))
    except EntryNotFoundError:
        return False


def _file(source: _Source, name: str) -> str:
    from huggingface_hub import hf_hub_download

    if os.path.isdir(source.place):
        return os.path.join(source.place, name)
    return hf_hub_download(source.place, name, local_files_only="local_files_only" in source.options)


def _adapted(model: Any, tokenizer: Any, source: _Source) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"the adapter in {source} needs peft: pip install peft ({error})") from error

    with _one_line(source, f"the adapter in {source.place!r} cannot be loaded"), warnings.catch_warnings():
        # Otherwise weights that are not in the file would be those of a fresh adapter.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))  # tokens that came with the adapter, as PEFT's own loading
        return peft.PeftModel.from_pretrained(model, source.place).eval()


@contextmanager
def _one_line(source: _Source, what: str | None = None) -> Iterator[None]:
    """Whatever kind of error a loader raises about files (there are many) becomes one line that names them."""
    what = what or f"{_CANNOT}: {source}"
    try:
        yield
    except (ModelError, MemoryError):
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{what}: it brings Python code of its own, which is run with --trust-remote-code "
                "(trust_remote_code=True) only; read it first"
            ) from error
        raise ModelError(f"{what}: {_config_fault(source.place) or _shortened(error)}") from error


def _config_fault(folder: str) -> str | None:
    """What is wrong with a folder's config.json, in plainer words than a loader's."""
    path = Path(folder, "config.json")
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"its config.json is not JSON ({error})"
    except OSError as error:
        return f"its config.json cannot be read ({error.strerror})"
    if not isinstance(config, dict):
        return f"its config.json must hold an object, got {json.dumps(config)[:40]}"
    from transformers import CONFIG_MAPPING, __version__

    kind = config.get("model_type")
    if not (isinstance(kind, str) and kind in CONFIG_MAPPING) and not config.get("auto_map"):
        return f"its config.json has model_type {kind!r}, which transformers {__version__} does not know"
    return None


def _shortened(error: BaseException) -> str:
    """One line of an error, which may be many."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch raises either, by build
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be one that this torch can use, got {name!r}: {reason}") from error


def context_length(model: Any) -> int | None:
    """How many tokens the model's position embedding holds; None where the config names no limit."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


@contextmanager
def fitting_threads(model: Any) -> Iterator[None]:
    """One thread while a small model runs on the CPU; torch's own setting for every other, and again afterwards."""
    import torch

    before = torch.get_num_threads()
    if model.device.type == "cpu" and model.num_parameters() < _ONE_THREAD_PARAMETERS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
