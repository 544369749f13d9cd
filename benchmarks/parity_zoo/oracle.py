"""Runs jobs with the contrastive search of transformers 4.55.4. A script for another interpreter: imports nothing of
ours.

    python oracle.py FOLDER   # from any interpreter that has torch and transformers 4.55.4

reads `FOLDER/jobs.json`, a list of models, each with the runs wanted from it, and writes one line of JSON to standard
output for each run, and one for each model before its runs: logits on a probe, which show whether both versions of
transformers see the same model.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from transformers.utils import logging


def load(folder: Path, job: dict) -> torch.nn.Module:
    config = getattr(transformers, job["config_class"])(**job["config"])
    model_class = getattr(transformers, job["model_class"])
    model, info = model_class.from_pretrained(
        folder / job["folder"], config=config, attn_implementation="eager", output_loading_info=True
    )
    wrong = {key: list(value) for key, value in info.items() if value}
    if wrong:
        raise RuntimeError(f"weights of {job['name']} do not fit transformers {transformers.__version__}: {wrong}")
    model.generation_config = transformers.GenerationConfig(**job["generation_config"])
    return model.eval()


@torch.no_grad()
def main(folder: Path) -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    for job in json.loads((folder / "jobs.json").read_text()):
        model = load(folder, job)
        probe = {key: torch.tensor(value) for key, value in job["probe"].items()}
        logits = model(**probe, use_cache=False).logits[0, -1]
        report({"model": job["name"], "seed": job["seed"], "logits": logits.tolist()})
        for run in job["runs"]:
            inputs = {key: torch.tensor(value) for key, value in run["inputs"].items()}
            # k = 1 is greedy search, and that is what this version makes of it.
            tokens = model.generate(**inputs, **run["arguments"])
            new = tokens[:, run["prompt_length"] :].tolist()
            report({"model": job["name"], "seed": job["seed"], "case": run["case"], "tokens": new})


def report(line: dict) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
