"""A model backend for EleutherAI's lm-evaluation-harness: ``--model simctg_fast`` for generation tasks.

    lm_eval run --model simctg_fast --model_args pretrained=DIR,penalty_alpha=0.6,top_k=4,slots=32 --tasks gsm8k

The harness finds it by the entry point of this package. Releases up to 0.4.13 do not look for entry points; there

    python -m simctg_fast.integrations.lm_eval run --model simctg_fast …

is the harness's own command line with the backend registered.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from ..engine import Engine

__all__ = ["SimCTGLM"]

DEFAULT_MAX_NEW_TOKENS = 256  # where a task names none, as the harness's own backend


@register_model("simctg_fast")
class SimCTGLM(LM):
    """Answers ``generate_until`` by :class:`simctg_fast.engine.Engine`.

    Args:
        pretrained: folder, hub name or ``bundled``.
        device, dtype: see `load_model`.
        batch_size, max_batch_size: what the harness passes to every backend; slots take their place.
        options: of the engine: ``strategy``, ``slots``, ``penalty_alpha``, ``top_k`` …
    """

    def __init__(
        self,
        pretrained: str = "bundled",
        *,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: Any = None,
        max_batch_size: Any = None,
        **options: Any,
    ):
        super().__init__()
        if "slots" not in options and isinstance(batch_size, int | str) and str(batch_size).isdigit():
            options["slots"] = int(batch_size)
        self.pretrained = pretrained
        self.engine = Engine.from_pretrained(pretrained, device=device, dtype=dtype, **options)
        self.tokenizer = self.engine.tokenizer

    @property
    def tokenizer_name(self) -> str:
        return str(self.pretrained).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        from tqdm import tqdm

        lines = [self._line(index, *request.args) for index, request in enumerate(requests)]
        texts = [""] * len(lines)
        bar = tqdm(total=len(lines), disable=disable_tqdm, desc="generate_until")
        for result in self.engine.generate(lines):
            if result.error is not None:
                raise RuntimeError(f"request {result.id} of the task failed: {result.error['message']}")
            texts[int(result.id)] = result.text  # type: ignore[arg-type]
            self.cache_hook.add_partial("generate_until", requests[int(result.id)].args, result.text)  # type: ignore[arg-type]
            bar.update()
        bar.close()
        return texts

    def _line(self, index: int, context: str, given: dict[str, Any]) -> dict[str, Any]:
        """The request of one instance. Of its settings those count that a strategy uses."""
        given = dict(given)
        until = given.pop("until", None) or []
        wanted = int(given.pop("max_gen_toks", None) or given.pop("max_new_tokens", None) or DEFAULT_MAX_NEW_TOKENS)
        line: dict[str, Any] = {"id": index, "stop": [until] if isinstance(until, str) else list(until)}
        line["stop"] = [stop for stop in line["stop"] if stop]
        random = given.pop("do_sample", False)
        if self.engine.strategy_name == "sample" and random:
            names = ("temperature", "top_k", "top_p", "min_p")
            line |= {name: given[name] for name in names if given.get(name)}
        key = "source" if self.engine.prepare.is_encoder_decoder else "prompt"
        ids = self.tokenizer(context, verbose=False)["input_ids"]
        limit = self.engine.prepare.limit
        if limit is not None and key == "prompt":
            wanted = min(wanted, limit - 1)
            ids = ids[-(limit - wanted) :]  # the harness's own backend keeps the end of a context as well
        line["max_new_tokens"] = wanted
        line[key] = context if key == "source" else list(ids)
        return line

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "simctg_fast serves generation tasks (generate_until); for tasks by likelihood use --model hf"
        )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError(
            "simctg_fast serves generation tasks (generate_until); for tasks by likelihood use --model hf"
        )


def main() -> None:
    """The harness's command line, with this backend registered."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    # As a script this module has another name; the harness must get the class of the real one.
    import simctg_fast.integrations.lm_eval as backend

    backend.main()
