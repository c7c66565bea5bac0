"""The kernels of the folder c as a library, compiled where they run.

The machine's own compiler (`cc`, or what CC names) makes it for this very processor when it is
first asked for, in about a second, and it is kept in the user's cache under a name made of source,
compiler, options and processor. Its threads are those of the OpenMP that torch has loaded. A
machine without a compiler is no failure: `library` says what stands in the way.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nelbo.errors import InputRefused
from nelbo.files import cache_folder

FOLDER = Path(__file__).with_name("c")
PARTS = ("norm", "attention")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
SECONDS = 120
"""How long the compiler may take."""


def _made(compiler: list[str], folder: Path) -> Path:
    objects = [str(folder / f"{part}.o") for part in PARTS]
    commands = [
        [*compiler, *FLAGS, "-c", str(FOLDER / f"{part}.c"), "-o", made]
        for part, made in zip(PARTS, objects, strict=True)
    ]
    library = folder / "native.so"
    # linked without -fopenmp, so that the threads are those of the OpenMP that torch has loaded
    commands.append([*compiler, "-shared", *objects, "-lm", "-o", str(library)])
    for command in commands:
        subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
    return library


def _place(compiler: list[str]) -> Path:
    """Where the library of this source, compiler and processor is kept."""
    told = hashlib.sha256()
    for path in sorted(FOLDER.iterdir()):
        told.update(path.read_bytes())
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    kinds = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    told.update("\n".join([*compiler, *FLAGS, platform.machine(), *sorted(kinds)]).encode())
    return cache_folder() / f"native-{told.hexdigest()[:16]}.so"


def _compiled(compiler: list[str], place: Path) -> ctypes.CDLL:
    if place.exists():
        try:
            return _opened(place)
        except OSError:
            pass  # cut short: it is made again
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        os.replace(_made(compiler, Path(folder)), place)
    return _opened(place)


def _opened(place: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(place))
    long, pointer, number = ctypes.c_long, ctypes.c_void_p, ctypes.c_int
    found.norm_forward.argtypes = [pointer] * 7 + [long] * 4 + [ctypes.c_double, number]
    found.norm_backward.argtypes = [pointer] * 10 + [long] * 4 + [number]
    found.attention_forward.argtypes = [pointer] * 2 + [long] * 4
    found.attention_backward.argtypes = [pointer] * 3 + [long] * 4
    found.map_forward.argtypes = [pointer] * 4 + [long] * 4
    found.map_backward.argtypes = [pointer] * 6 + [long] * 4
    for part in ("norm", "attention", "map"):
        for way in ("forward", "backward"):
            getattr(found, f"{part}_{way}").restype = None
    return found


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and what stands in the way."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if sys.platform != "linux" or shutil.which(compiler[0]) is None:
        return None, f"it needs Linux and a C compiler; {compiler[0]} is none, CC names another"
    try:
        place = _place(compiler)
        return _compiled(compiler, place), ""
    except subprocess.CalledProcessError as error:
        return None, f"{compiler[0]}: {error.stderr.decode(errors='replace').strip()[:200]}"
    except (subprocess.SubprocessError, InputRefused) as error:
        return None, str(error)
    except AttributeError as error:
        return None, f"{error}: delete that file"
    except OSError as error:
        return None, f"{error}; NELBO_CACHE names another folder"


def call(name: str, *arguments: Any) -> None:
    """Call a function of the library: float32 tensors by address; the caller answers for shapes.

    Raises:
        InputRefused: there is no library.
    """
    found, reason = library()
    if found is None:
        raise InputRefused(f"kernels in C were asked for: {reason}")
    getattr(found, name)(*(_address(a) if isinstance(a, Tensor) else a for a in arguments))


def _address(tensor: Tensor) -> int:
    assert tensor.dtype == torch.float32 and tensor.device.type == "cpu", "float32 in memory"
    return tensor.data_ptr()
