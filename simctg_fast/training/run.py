"""Fine-tuning with likelihood and contrastive loss, or another, from a file of texts: what `simctg-fast train` runs.

A run lives in one folder and survives being killed: the same call goes on from the last checkpoint that was written
whole and ends with the same weights as an unbroken run.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checks import is_integer, is_number, require, user_path
from .data import Collator, encode, read_examples

__all__ = ["Summary", "TrainingOptions", "last_checkpoint", "train"]

RECORD, LOG, CARD = "simctg_training.json", "train_log.jsonl", "README.md"
# As many sequences as isotropy is measured on, before and after.
MEASURED_SEQUENCES = 64
_TERMS = ("loss", "mle_loss", "contrastive_loss", "contraclm_loss", "cosreg_loss", "isotropy")
_ADDED = {"loss": "simctg", "temperature": None}  # options that records of earlier versions do not have
_SOURCES = {
    "simctg": 'Su et al. 2022, "A Contrastive Framework for Neural Text Generation"',
    "contraclm": 'Jain et al. 2023, "ContraCLM: Contrastive Learning For Causal Language Model"',
    "cosreg": 'Gao et al. 2019, "Representation Degeneration Problem in Training Natural Language Generation Models"',
}


@dataclass(frozen=True)
class TrainingOptions:
    """What decides the weights. A folder is continued with the same options only.

    ``loss``, ``margin``, ``reduction``, ``temperature`` and ``contrastive_weight`` are those of `SimCTGTrainer`: None
    becomes the loss's own default, and stays None where the loss has no such setting.
    """

    margin: float | None = None
    reduction: str | None = None
    contrastive_weight: float = 1.0
    max_length: int = 256
    pack: bool = False
    batch_size: int = 8
    accumulation: int = 1
    epochs: float = 1.0
    steps: int | None = None  # goes before epochs
    learning_rate: float = 5e-5
    warmup_steps: int = 0
    weight_decay: float = 0.0
    seed: int = 0
    bf16: bool = False
    gradient_checkpointing: bool = False
    loss: str = "simctg"
    temperature: float | None = None

    def __post_init__(self) -> None:
        from ..integrations._batch import loss_settings

        own = loss_settings(self.loss, self.margin, self.reduction, self.temperature, self.contrastive_weight)
        for name, value in own.items():
            object.__setattr__(self, name, value)
        for name, low in (("batch_size", 1), ("accumulation", 1), ("max_length", 2), ("warmup_steps", 0), ("seed", 0)):
            high = 2**32 - 1 if name == "seed" else math.inf  # numpy's
            allowed = "an integer from 0 to 2**32 - 1" if name == "seed" else f"an integer of at least {low}"
            require(is_integer(getattr(self, name), low, high), name, getattr(self, name), allowed)
        require(self.steps is None or is_integer(self.steps, 1), "steps", self.steps, "an integer of at least 1")
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            require(is_number(value, 0, above=True), name, value, "a finite number above 0")
        require(is_number(self.weight_decay, 0), "weight_decay", self.weight_decay, "a finite number of at least 0")
        for name in ("pack", "bf16", "gradient_checkpointing"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        if self.reduction == "dense" and self.accumulation > 1:
            raise ValueError(
                f"reduction='dense' takes no accumulation, got {self.accumulation}; take 'pairs' or 'paper'"
            )


@dataclass(frozen=True)
class Summary:
    """How a run ended. ``resumed_from`` is the step it went on from, 0 for a new run."""

    folder: Path
    steps: int
    resumed_from: int
    isotropy_before: float
    isotropy_after: float
    validation: dict[str, float]


def train(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    options: TrainingOptions | None = None,
    *,
    validation: str | os.PathLike[str] | None = None,
    restart: bool = False,
    device: str | None = None,
    save_every: int = 500,
    log_every: int = 10,
    keep: int = 2,
    trust_remote_code: bool = False,
    on_note: Callable[[str], None] = lambda text: None,
    loading: AbstractContextManager[Any] | None = None,
) -> Summary:
    """Fine-tunes a decoder or an encoder-decoder and writes model, tokenizer, model card and log to ``folder``.

    Args:
        model: ``"bundled"``, a local folder or a hub name.
        data, validation: files as `read_examples` takes them.
        folder: new, empty, or that of an earlier call with the same model, data and options, which is continued.
        restart: throw away the checkpoints and the log that are in ``folder`` and begin again.
        device: ``"cpu"``, ``"cuda"``, or None: the GPU if there is one.
        save_every, log_every: optimizer steps between checkpoints and between lines of the log. The last step has a
            line in any case.
        keep: checkpoints kept.
        trust_remote_code: as in `load_model`.
        on_note: called with a line now and then, for a person to read.
        loading: entered while the model is loaded, which is not done where the run is finished.

    ``~`` is expanded in every path.

    Raises:
        ImportError: accelerate is not installed.
        FileNotFoundError, ValueError: a file, a folder or an option that cannot be used; the text says which and why.
    """
    options = options or TrainingOptions()
    for name, value in (("save_every", save_every), ("log_every", log_every), ("keep", keep)):
        require(is_integer(value, 1), name, value, "an integer of at least 1")
    require(device in (None, "cpu", "cuda"), "device", device, "cpu or cuda")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("this runs in one process; for several write a script with SimCTGTrainer and start that")
    try:
        import accelerate  # noqa: F401 - the Trainer's; its own error comes late and does not name the extra
    except ImportError as error:
        raise ImportError(f"training needs accelerate: pip install 'simctg_fast[train]' ({error})") from error
    import torch

    from ..loading import context_length, load_model

    folder, data = user_path(folder), user_path(data)
    validation = None if validation is None else user_path(validation)
    examples, held = read_examples(data), None if validation is None else read_examples(validation)
    facts: dict[str, Any] = {"model": os.fspath(model), "data": _digest(data), "options": asdict(options)}
    facts["validation"] = None if validation is None else _digest(validation)
    record = _read_record(folder, facts, restart)
    if record is not None and record.get("finished"):
        on_note(f"{folder} is finished; --restart trains again")
        return _summary(folder, record)

    with loading or nullcontext():
        loaded, tokenizer = load_model(model, device, dtype=torch.float32, trust_remote_code=trust_remote_code)
    limit, two_sided = context_length(loaded), bool(loaded.config.is_encoder_decoder)
    if limit is not None and options.max_length > limit:
        raise ValueError(f"max_length is {options.max_length}, the model's context holds {limit}")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # masked everywhere: any token will do
    collate = Collator(pad)
    rows = encode(examples, tokenizer, options.max_length, is_encoder_decoder=two_sided, pack=options.pack)
    held_out = None if held is None else encode(held, tokenizer, options.max_length, is_encoder_decoder=two_sided)
    on_note(f"{len(rows):,} sequences, {sum(len(row['labels']) for row in rows):,} tokens to learn")

    measured = (held_out or rows)[:MEASURED_SEQUENCES]
    if record is None:
        # Only now, when nothing the user gave can be wrong any more.
        record = _new_record(folder, facts, isotropy_before=_measure(loaded, measured, collate))

    progress = _progress_callback(folder / LOG)
    use_cpu = device == "cpu" or not torch.cuda.is_available()
    trainer = _make_trainer(
        options,
        {"model": loaded, "train_dataset": rows, "eval_dataset": held_out, "data_collator": collate},
        progress,
        output_dir=str(folder),
        use_cpu=use_cpu,
        dataloader_pin_memory=not use_cpu,
        logging_steps=log_every,
        save_steps=save_every,
        save_total_limit=keep,
        eval_strategy="no" if held_out is None else "steps",
        eval_steps=save_every,
    )
    checkpoint = last_checkpoint(folder)
    resumed_from = 0
    if checkpoint is not None:
        resumed_from = int(checkpoint.name.rpartition("-")[2])
        on_note(f"going on from step {resumed_from}")
    _cut_log(folder / LOG, resumed_from)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        progress.close()

    final = trainer.model
    record["validation_metrics"] = {} if held_out is None else trainer.evaluate()
    record["isotropy_after"] = _measure(final, measured, collate)
    record["steps"] = trainer.state.global_step
    final.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / CARD).write_text(_card(record), encoding="utf-8", errors="backslashreplace")
    _write_json(folder / RECORD, record | {"finished": True})
    return _summary(folder, record, resumed_from)


def last_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint that was written whole: Trainer writes its state last, so one without it was cut short."""
    found = []
    for path in user_path(folder).glob("checkpoint-*"):
        number = path.name.rpartition("-")[2]
        if number.isdecimal() and isinstance(_read_json(path / "trainer_state.json"), dict):
            found.append((int(number), path))
    return max(found)[1] if found else None


def _make_trainer(options: TrainingOptions, parts: dict[str, Any], progress: Any, **arguments: Any) -> Any:
    """``parts`` of a `SimCTGTrainer`, ``arguments`` of its `TrainingArguments` beside those that are ``options``."""
    from transformers import PrinterCallback, TrainingArguments

    from ..integrations.trainer import SimCTGTrainer

    fields = TrainingArguments.__dataclass_fields__
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    arguments |= {checkpointing: options.gradient_checkpointing}
    arguments |= _named(options, "learning_rate", "warmup_steps", "weight_decay", "seed", "bf16")
    settings = TrainingArguments(
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        num_train_epochs=options.epochs,
        max_steps=options.steps or -1,
        prediction_loss_only=True,
        disable_tqdm=True,
        report_to="none",
        **arguments,
    )
    loss = _named(options, "loss", "margin", "reduction", "temperature", "contrastive_weight")
    trainer = SimCTGTrainer(args=settings, callbacks=[progress], **parts, **loss)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _progress_callback(log: Path) -> Any:
    import sys

    from tqdm import tqdm
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        """A bar on a terminal, lines elsewhere, and every log entry in the log file."""

        bar: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=None)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            self.bar.update(state.global_step - self.bar.n)
            if state.global_step >= state.max_steps:
                control.should_log = True  # behind the Trainer's own rule: the last step has its line
            return control

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" not in logs and not any(name.startswith("eval_") for name in logs):
                return  # the summary of the run, which counts from the last start only
            entry = {"step": state.global_step, "seconds": round(time.perf_counter() - self.started, 3), **logs}
            with log.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(entry) + "\n")
            shown = {name: f"{logs[name]:.4g}" for name in _TERMS if name in logs}
            if not shown:
                return
            if self.bar.disable:
                text = ", ".join(f"{name} {value}" for name, value in shown.items())
                print(f"step {state.global_step}/{state.max_steps}: {text}", file=sys.stderr, flush=True)
            else:
                self.bar.set_postfix(shown)

        def close(self) -> None:
            """Also where the training was broken off: the terminal's line is free again."""
            if self.bar is not None:
                self.bar.close()

    return Progress()


def _measure(model: Any, rows: list, collate: Collator) -> float:
    """Isotropy of the last hidden states of some sequences, those too short for a pair left out."""
    import torch

    from ..integrations._batch import isotropy_sums, real_tokens
    from ..text.features import evaluation_mode

    two_sided, total, count = bool(model.config.is_encoder_decoder), 0.0, 0
    with torch.no_grad(), evaluation_mode(model):
        for start in range(0, len(rows), 8):
            batch = {name: tensor.to(model.device) for name, tensor in collate(rows[start : start + 8]).items()}
            outputs = model(**batch, output_hidden_states=True)
            states = (outputs.decoder_hidden_states if two_sided else outputs.hidden_states)[-1]
            value, sequences = isotropy_sums(states, real_tokens(batch, two_sided))
            total, count = total + float(value), count + int(sequences)
    return total / count if count else float("nan")


def _read_record(folder: Path, facts: dict[str, Any], restart: bool) -> dict[str, Any] | None:
    """The record of the run in the folder, None where a new one begins; raises where the folder is something else's."""
    path = folder / RECORD
    record = _read_json(path)
    if path.exists() and not _is_record(record):
        raise ValueError(f"{str(path)!r} is no record of this command, nothing is changed; name another folder")
    if record is None:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{str(folder)!r} is a file; name a folder")
        if folder.is_dir() and any(path.name != RECORD + ".tmp" for path in folder.iterdir()):
            raise ValueError(f"the folder {str(folder)!r} is not empty and holds no run of this command; name another")
        return None
    if restart:
        return None
    different = _differences(record, facts)
    if different:
        raise ValueError(
            f"the run in {str(folder)!r} was started with {'; '.join(different)}; name another folder, or restart"
        )
    return record


def _is_record(record: Any) -> bool:
    """Whether this is what a run of this command writes: whole as it began, or as it ended."""
    if not isinstance(record, dict) or not isinstance(record.get("options"), dict):
        return False
    kinds: dict[str, Any] = {"model": str, "data": dict, "validation": dict | None, "isotropy_before": int | float}
    if record.get("finished"):
        kinds |= {"steps": int, "isotropy_after": int | float, "validation_metrics": dict}
    files = [record.get(name) for name in ("data", "validation")]
    return all(name in record and isinstance(record[name], kind) for name, kind in kinds.items()) and all(
        isinstance(file.get(name), str) for file in files if file is not None for name in ("file", "sha256")
    )


def _new_record(folder: Path, facts: dict[str, Any], isotropy_before: float) -> dict[str, Any]:
    """Writes it, and takes away what an earlier run has left."""
    from .. import __version__

    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    (folder / LOG).unlink(missing_ok=True)
    record = {"simctg_fast": __version__, **facts, "isotropy_before": isotropy_before}
    _write_json(folder / RECORD, record)
    return record


def _differences(record: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    old, new = _ADDED | record["options"], dict(facts["options"])
    for name in ("model", "data", "validation"):
        old[name], new[name] = record[name], facts[name]
    changed = [name for name in new if old.get(name) != new[name]]
    return [f"{name} {_short(old.get(name))}, now {_short(new[name])}" for name in changed]


def _short(value: Any) -> str:
    return f"{value['file']} (sha256 {value['sha256'][:8]}…)" if isinstance(value, dict) else str(value)


def _cut_log(path: Path, step: int) -> None:
    """Takes out what was logged after the checkpoint, and a last line that was cut short.

    Raises:
        ValueError: another line is not of this log; nothing is changed then.
    """
    if not path.exists():
        return
    kept = []
    lines = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            logged = entry["step"]
            if isinstance(logged, bool) or not isinstance(logged, int):
                raise TypeError("step")
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) or not line.strip():  # what stands behind the last newline, cut short or nothing
                continue
            raise ValueError(
                f"{str(path)!r}, line {number}: is not of a training log: {line[:60]!r}; mend or remove it"
            ) from error
        if logged <= step:
            kept.append(line + "\n")
    _replace(path, "".join(kept))


def _card(record: dict[str, Any]) -> str:
    options = _ADDED | record["options"]
    unused = [name for name in ("margin", "reduction", "temperature") if options[name] is None]
    rows = [f"| {name.replace('_', ' ')} | {value} |" for name, value in options.items() if name not in unused]
    beside = {
        "simctg": "contrastive loss",
        "contraclm": "ContraCLM's token-level loss",
        "cosreg": "cosine regularisation",
    }
    return f"""---
base_model: {record["model"]}
library_name: transformers
tags: [simctg, contrastive-search]
---
# {Path(record["model"]).name}, fine-tuned with likelihood and {beside[options["loss"]]}

Trained for {record["steps"]} steps on `{record["data"]["file"]}` with simctg_fast {record["simctg_fast"]}.
Isotropy of the last hidden states (1 - mean cosine): {record["isotropy_before"]:.3f} before,
{record["isotropy_after"]:.3f} after.

| option | value |
|---|---|
{chr(10).join(rows)}

Try it: `simctg-fast generate FOLDER "…" --top-k 4 --penalty-alpha 0.6`

Loss: {_SOURCES[options["loss"]]}.
"""


def _named(options: TrainingOptions, *names: str) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names}


def _summary(folder: Path, record: dict[str, Any], resumed_from: int = 0) -> Summary:
    before, after = record["isotropy_before"], record["isotropy_after"]
    return Summary(folder, record["steps"], resumed_from, before, after, record["validation_metrics"])


def _digest(path: Path) -> dict[str, str]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"file": path.name, "sha256": digest.hexdigest()}


def _read_json(path: Path) -> Any:
    """None for a file that is not there or was cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write_json(path: Path, content: Any) -> None:
    _replace(path, json.dumps(content, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    """In one step: whoever is killed here leaves the old file or the new one."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
