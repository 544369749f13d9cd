"""Two processes that talk over gloo: `run_two(code)` runs the same code in both and returns what each left in `result`.

The code finds `rank`, `torch`, `dist` and `argument` in its scope. It is run by a script and not by
`torch.multiprocessing`, which would have to import the test modules by a name they do not have.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import textwrap
from typing import Any

import torch

from .processes import LIMIT, end
from .repository import WITH_TESTS

PROLOGUE = """
import sys, torch, torch.distributed as dist
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
{init}
argument = torch.load(folder + "/argument.pt", weights_only=False)
result = None
"""
INIT = 'dist.init_process_group("gloo", init_method="file://" + folder + "/meeting", rank=rank, world_size=2)'
EPILOGUE = """
torch.save(result, f"{folder}/result-{rank}.pt")
if dist.is_initialized():
    dist.destroy_process_group()
"""


def run_two(folder: pathlib.Path, code: str, argument: Any = None, *, init: bool = True, port: int = 0) -> list[Any]:
    """``init=False`` leaves `init_process_group` to the code, with the variables of torchrun in the environment."""
    torch.save(argument, folder / "argument.pt")
    script = folder / "script.py"
    script.write_text(PROLOGUE.format(init=INIT if init else "") + textwrap.dedent(code) + EPILOGUE)
    environment = {**os.environ, "PYTHONPATH": WITH_TESTS, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if not init:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        environment |= {"ACCELERATE_USE_CPU": "true"}
    processes = []
    for rank in range(2):
        own = environment if init else environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = (folder / f"log-{rank}.txt").open("w")
        command = [sys.executable, str(script), str(rank), str(folder)]
        processes.append(
            subprocess.Popen(command, env=own, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        )
        log.close()
    try:
        codes = [process.wait(timeout=LIMIT) for process in processes]
    finally:
        for process in processes:
            end(process)
    logs = [(folder / f"log-{rank}.txt").read_text() for rank in range(2)]
    assert codes == [0, 0], "\n".join(logs)
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(2)]
