"""Ranks for tests: a server imports the library once and forks as many as are wanted."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from nelbo import cli

SERVER = """
import importlib, json, os, sys, traceback
sys.path[:0] = json.loads(sys.argv[1])
import torch, torch._dynamo
torch.set_num_threads(1)
import nelbo.cli, nelbo.walks.train, nelbo.walks.evaluate
nelbo.report.write = lambda run: run  # it takes longer than the rest of a tiny run

for line in sys.stdin:
    order = json.loads(line)
    module = importlib.import_module(order["module"])
    children = []
    for rank in range(order["world"]):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            os.environ.update(
                order["environment"], RANK=str(rank), LOCAL_RANK=str(rank),
                WORLD_SIZE=str(order["world"]),
            )
            name = f"{order['folder']}/rank{rank}.log"
            log = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1), os.dup2(log, 2)
            code = getattr(module, order["function"])(rank, order["folder"], *order["arguments"])
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code or 0)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(codes), flush=True)
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Ranks:
    """Starts functions of test modules on several ranks.

    Arguments:
        cuda: let them see the devices; the server itself must not start CUDA before it forks.
    """

    def __init__(self, cuda: bool = False) -> None:
        paths = [str(Path(cli.__file__).parents[1]), str(Path(__file__).parent)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, json.dumps(paths)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                **(
                    {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
                    if cuda
                    else {"CUDA_VISIBLE_DEVICES": ""}
                ),
            },
        )

    def run(self, function: Any, world: int, folder: Path, *arguments: Any) -> list[int]:
        """Call function(rank, folder, *arguments) on every rank; how each ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        folder.mkdir(parents=True, exist_ok=True)
        order = {
            "module": function.__module__,
            "function": function.__name__,
            "world": world,
            "folder": str(folder),
            "arguments": arguments,
            "environment": {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
        }
        print(json.dumps(order), file=self.process.stdin, flush=True)
        codes: list[int] = json.loads(self.process.stdout.readline())
        return codes

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def logs(folder: Path) -> str:
    """What the ranks said."""
    return "\n".join(path.read_text() for path in sorted(folder.glob("rank*.log")))
