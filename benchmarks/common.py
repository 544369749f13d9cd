"""What every benchmark here shares: interleaved timing, peak memory, the machine's description, and the CSV schema."""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass
class Row:
    """One measured figure; the file is append-only, so that runs on different days and machines stand side by side."""

    kernel: str  # what is measured: decode, contrastive_loss, …
    provider: str  # whose code
    mode: str  # decode, forward, backward, …
    metric: str  # ms_per_token, peak_mb, …
    x_name: str  # what varies
    x_value: str
    p20: float
    p50: float
    p80: float
    config: str = ""  # json
    gpu: str = ""  # or the CPU
    version: str = ""
    timestamp: str = field(default_factory=lambda: datetime.datetime.now().isoformat(timespec="seconds"))


def append_csv(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(row) for row in rows]
    if not rows:
        return
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile (nearest rank: with few repetitions nothing is invented between them)."""
    ordered = sorted(values)
    return tuple(ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.2, 0.5, 0.8))


def interleaved(variants: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Run every variant once per round, in turn, so that the machine's moods reach all alike. A variant returns its own
    figure (seconds)."""
    figures: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            figures[name].append(run())
    return figures


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} ({os.cpu_count()} cores)"


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()


def versions(*modules: str) -> str:
    found = {"python": platform.python_version()}
    for name in ("torch", *modules):
        found[name] = getattr(sys.modules.get(name) or __import__(name), "__version__", "?")
    return json.dumps(found)


def reset_peak_memory() -> None:
    """Forget this process's peak resident size (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_megabytes() -> tuple[float, float]:
    """Resident size now and at its peak since :func:`reset_peak_memory`, in 10⁶ bytes (Linux)."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Vm")
    )
    return tuple(int(fields[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM"))


class Worker:
    """A process of its own for one provider, maybe in another environment, or with the library of another checkout
    (`root`): `script` with `arguments` answers one JSON line when it is ready (`ready`) and one for every JSON line it
    reads."""

    def __init__(self, python: str, script: str, *arguments: object, threads: int, root: Path = ROOT):
        environment = os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
        command = [python, str(Path(script).resolve()), *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ready = self._answer()

    def _answer(self) -> dict:
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"the worker ended with exit code {self.process.wait()}")

    def ask(self, **request) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def cpu_seconds(self) -> float:
        """Processor time it has used so far (Linux)."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system, of all its threads

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
