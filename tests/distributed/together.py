"""Runs a function of a test module in several processes that form a group, as torchrun would."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Process:
    """One process of a group, and what became of it."""

    def __init__(self, process: subprocess.Popen[str], result: Path) -> None:
        self._process = process
        self._result = result

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self, timeout: float = 120) -> None:
        try:
            self.output, _ = self._process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self.output, _ = self._process.communicate()
            self.output += "\n... was killed: it took too long"
        self.status = self._process.returncode

    @property
    def result(self) -> Any:
        """What the function returned, through JSON."""
        assert self.status == 0, self.output
        return json.loads(self._result.read_text())


def start(count: int, function: Callable[..., Any], *arguments: object) -> list[Process]:
    """Start processes which call a function of a module's top level with (str of) the arguments."""
    place = Path(tempfile.mkdtemp(prefix="together-"))
    found = []
    for rank in range(count):
        words = [__file__, function.__code__.co_filename, function.__name__, str(place), *map(str, arguments)]
        env = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }
        process = subprocess.Popen(
            [sys.executable, *words], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        found.append(Process(process, place / f"{rank}.json"))
    return found


def together(count: int, function: Callable[..., Any], *arguments: object) -> list[Any]:
    """What a function returned in each of several processes."""
    processes = start(count, function, *arguments)
    for process in processes:
        process.wait()
    return [process.result for process in processes]


def _main() -> None:
    file, name, place, *arguments = sys.argv[1:]
    import torch.distributed as dist

    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    sys.path[:0] = [str(Path(__file__).parent), str(Path(file).parent)]
    spec = importlib.util.spec_from_file_location("worker", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["worker"] = module
    spec.loader.exec_module(module)
    dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=count)
    result = getattr(module, name)(*arguments)
    (Path(place) / f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    _main()
