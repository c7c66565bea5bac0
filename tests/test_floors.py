"""The architecture, asserted: floors, no cycles, no hidden imports, no pickle, no long files.

A module imports only from lower floors. A floor can have storeys, where `base`, `layers` and their
like come first; modules of one storey, and folders of one floor, do not know each other. Imports
inside functions count like all others, and only the command line may have first-party ones (so
that `nelbo --help` need not import torch).
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

_SOURCE = Path(__file__).resolve().parents[1] / "src" / "nelbo"

# Module: (floor, storey). A module that is not here fails the tests: give it a place.
_FLOORS = {
    "errors": (0, 0),
    "files": (0, 1),
    "randomness": (0, 0),
    "distributions": (0, 1),
    "schedules": (0, 1),
    "estimate": (0, 1),
    "ranks": (0, 1),
    "distributed": (0, 2),
    "bits": (0, 2),
    "dormand_prince": (0, 2),
    "spacing": (0, 2),
    "checkpoint": (0, 2),
    "subsets": (0, 2),
    "windows": (0, 1),
    "sharding": (0, 2),
    "averages": (0, 3),
    "rates": (0, 1),
    "transfer": (0, 0),
    "console": (0, 2),
    "learned_schedule": (0, 2),
    "timesampling": (0, 3),
    "processes.base": (1, 0),
    "processes.gaussian": (1, 1),
    "processes.bernoulli": (1, 1),
    "processes": (1, 9),
    "networks.layers": (1, 0),
    "networks.attention": (1, 1),
    "networks.unet_config": (1, 0),
    "networks.kernels": (1, 0),
    "networks.c_library": (1, 0),
    "networks.norm_plans": (1, 0),
    "networks.norm_kernels": (1, 1),
    "networks.triton_norm": (1, 2),
    "networks.native": (1, 1),
    "networks.unet_blocks": (1, 2),
    "networks.informed": (1, 2),
    "networks.mlp": (1, 2),
    "networks.adversaries": (1, 2),
    "networks.resnet": (1, 2),
    "networks.heads": (1, 2),
    "networks.unet": (1, 3),
    "networks": (1, 9),
    "data.mixture": (1, 0),
    "data.files": (1, 0),
    "data.part": (1, 1),
    "data.sums": (1, 0),
    "data.index": (1, 0),
    "data.npy": (1, 1),
    "data.feed": (1, 3),
    "data.survey": (1, 2),
    "data.shards": (1, 1),
    "data.folder": (1, 3),
    "data.mapped": (1, 2),
    "data.provenance": (1, 2),
    "data.decoding": (1, 1),
    "data.loading": (1, 0),
    "data.augmentation": (1, 0),
    "data.transforms": (1, 0),
    "data.differentiable": (1, 0),
    "data.features": (1, 3),
    "data.base": (1, 2),
    "data.statistics": (1, 3),
    "data.splits": (1, 4),
    "data.binarized": (1, 3),
    "data.toys": (1, 5),
    "data.heartbeat": (1, 5),
    "data.arrays": (1, 5),
    "data.cifar": (1, 5),
    "data.embedded": (1, 5),
    "data.idx": (1, 5),
    "data.images": (1, 5),
    "data.parquet": (1, 6),
    "data.deadleaves": (1, 5),
    "data.sources": (1, 7),
    "data.texture": (1, 6),
    "data.bitrows": (1, 6),
    "data": (1, 9),
    "reverse": (2, 0),
    "variances": (2, 0),
    "parameterizations": (2, 1),
    "binary": (2, 2),
    "decoders": (2, 2),
    "runfiles": (2, 0),
    "figures": (2, 0),
    "ratedistortion": (2, 1),
    "gan": (2, 1),
    "jsd": (2, 0),
    "sides": (2, 0),
    "looks": (2, 0),
    "logistic": (2, 0),
    "fitting": (2, 0),
    "channels": (2, 0),
    "parts": (2, 1),
    "judges": (2, 1),
    "prequential": (2, 1),
    "calibration": (2, 2),
    "claim": (2, 2),
    "inquiry": (2, 3),
    "blocks": (2, 4),
    "certificate": (2, 5),
    "ladder": (2, 6),
    "lattices": (2, 0),
    "quadrature": (2, 1),
    "blurred": (2, 2),
    "rundir": (2, 0),
    "bound": (3, 0),
    "entropy": (3, 0),
    "samplers": (3, 0),
    "speed": (2, 0),
    "solvers": (3, 1),
    "interpolation": (3, 0),
    "products": (3, 0),
    "factors": (3, 1),
    "particles": (3, 1),
    "conditioning": (3, 2),
    "dots": (3, 0),
    "sandwich": (3, 0),
    "wording": (3, 0),
    "remake": (3, 0),
    "compared": (3, 1),
    "extractors": (3, 0),
    "featurenets": (3, 1),
    "scores": (3, 0),
    "panels": (3, 0),
    "neighbours": (3, 1),
    "modes": (3, 0),
    "companions": (3, 2),
    "pictures": (3, 0),
    "gamefigures": (3, 1),
    "shown": (3, 2),
    "objectives": (4, 0),
    "continuous": (4, 1),
    "losses": (4, 1),
    "stepping": (4, 0),
    "replay": (4, 0),
    "deferred": (4, 1),
    "controls": (3, 0),
    "surrogate": (3, 0),
    "design": (3, 0),
    "accounting": (3, 1),
    "rounds": (3, 1),
    "drawing": (4, 0),
    "pilot": (4, 1),
    "fewcalls": (4, 2),
    "savings": (4, 3),
    "scattered": (4, 3),
    "everyterm": (4, 1),
    "curve": (4, 1),
    "progressive": (4, 1),
    "evaluation": (4, 4),
    "likelihood": (4, 0),
    "flow": (4, 0),
    "odelikelihood": (4, 1),
    "trainer": (4, 2),
    "interop.betas": (4, 0),
    "interop.scales": (4, 0),
    "interop.weights": (4, 0),
    "interop.respacing": (4, 0),
    "interop.openai_flags": (4, 0),
    "interop.openai_names": (4, 1),
    "interop.foreign": (4, 1),
    "interop.configs": (4, 2),
    "interop.callables": (4, 2),
    "interop.openai": (4, 2),
    "interop.modules": (4, 1),
    "interop.diffusers": (4, 3),
    "interop.export": (4, 4),
    "interop": (4, 9),
    "report": (4, 0),
    "derivation.rows": (4, 5),
    "derivation.settings": (4, 6),
    "derivation.identity": (5, 0),
    "derivation.line": (5, 0),
    "derivation.models": (5, 1),
    "derivation.places": (5, 1),
    "derivation.pairs": (5, 1),
    "derivation.carried": (5, 1),
    "derivation.minimax": (5, 2),
    "derivation.slack": (5, 2),
    "derivation.divergences": (5, 2),
    "derivation.certified": (5, 2),
    "derivation.evidence": (5, 2),
    "derivation.between": (5, 2),
    "derivation.stated": (5, 2),
    "derivation.ratio": (5, 3),
    "derivation.telescoping": (5, 3),
    "derivation.steps": (5, 3),
    "derivation.edges": (5, 3),
    "derivation.grids": (5, 3),
    "derivation.wrongbounds": (5, 4),
    "derivation.coin": (5, 1),
    "derivation.denoisers": (5, 1),
    "derivation.algebra": (5, 2),
    "derivation.minima": (5, 2),
    "derivation.noise": (5, 2),
    "derivation.draws": (5, 2),
    "derivation.continuum": (5, 2),
    "derivation.refinement": (5, 2),
    "derivation.strata": (5, 2),
    "derivation.wiener": (5, 2),
    "derivation.twovariances": (5, 2),
    "derivation.onecurve": (5, 2),
    "derivation.simpleweight": (5, 3),
    "derivation.slips": (5, 4),
    "derivation.omissions": (5, 4),
    "derivation.wrongterms": (5, 4),
    "derivation.weights": (5, 2),
    "derivation.flows": (5, 2),
    "derivation.dequantised": (5, 2),
    "derivation.multiplied": (5, 2),
    "derivation.inpainted": (5, 2),
    "derivation.conventions": (5, 2),
    "derivation.conditioned": (5, 3),
    "derivation.chain": (5, 5),
    "derivation.printed": (5, 6),
    "derivation.curves": (5, 2),
    "derivation.drawings": (5, 3),
    "derivation.page": (5, 7),
    "derivation.trained": (5, 1),
    "derivation.trainedchain": (5, 4),
    "derivation.trainedloss": (5, 5),
    "derivation.trainedgame": (5, 2),
    "derivation": (5, 9),
    "recipes.groups": (5, 0),
    "recipes.limits": (5, 0),
    "recipes.combinations": (5, 1),
    "recipes.mixtures": (5, 1),
    "recipes.games": (5, 1),
    "recipes.options": (5, 2),
    "recipes.families": (5, 3),
    "recipes.datasets": (5, 3),
    "recipes.recipe": (5, 3),
    "recipes.models": (5, 3),
    "recipes.patterns": (5, 3),
    "recipes.foreign": (5, 4),
    "recipes.bits": (5, 4),
    "recipes.adversarial": (5, 4),
    "recipes.build": (5, 5),
    "recipes": (5, 9),
    "derivecommand": (5, 0),
    "commands": (5, 1),
    "walks.derived": (6, 2),
    "walks.derive": (6, 3),
    "walks.signals": (6, 0),
    "walks.stored": (6, 0),
    "walks.doctor": (6, 0),
    "walks.compare": (6, 8),
    "walks.verdict": (6, 0),
    "walks.known": (6, 6),
    "walks.witness": (6, 7),
    "walks.measures": (6, 5),
    "walks.chains": (6, 0),
    "walks.opponents": (6, 3),
    "walks.heldout": (6, 4),
    "walks.comparison": (6, 0),
    "walks.weighted": (6, 0),
    "walks.devices": (6, 0),
    "walks.documents": (6, 1),
    "walks.flow": (6, 2),
    "walks.fitting": (6, 1),
    "walks.measuring": (6, 1),
    "walks.evaluate": (6, 2),
    "walks.sample": (6, 2),
    "walks.steps": (6, 3),
    "walks.played": (6, 1),
    "walks.export": (6, 2),
    "walks.against": (6, 3),
    "walks.conditions": (6, 1),
    "walks.conditional": (6, 3),
    "walks.interpolate": (6, 4),
    "walks.progressive": (6, 3),
    "walks.strips": (6, 4),
    "walks.generate": (6, 3),
    "walks.watch": (6, 2),
    "walks.session": (6, 3),
    "walks.pace": (6, 0),
    "walks.training": (6, 4),
    "walks.play": (6, 9),
    "walks.train": (6, 10),
    "walks": (6, 11),
    "cli": (7, 0),
    "__main__": (8, 0),
    "": (0, 9),
}
_FOLDERS = {name.split(".")[0] for name in _FLOORS if "." in name}
_DEFERRING = {"cli"}
_VAGUE = {"utils", "util", "helpers", "helper", "misc", "core", "manager", "common"}
_PICKLING = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
_MAY_LOAD_TENSORS = {"interop.weights"}
_MOST_LINES = 300


class Import(NamedTuple):
    module: str  # the importer, and
    target: str  # what it imports, both relative to the package ("" is the package itself)
    line: int
    nested: bool


def _modules(root: Path) -> dict[str, Path]:
    named = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def _imports(module: str, path: Path, modules: dict[str, Path]) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    nested = {id(x) for f in ast.walk(tree) if isinstance(f, functions) for x in ast.walk(f)}
    package = path.name == "__init__.py"
    for node in ast.walk(tree):
        for name in _first_party(node, module, package):
            # `from nelbo.data import toys` names a module, `from nelbo.data import digits` not.
            target = name if name in modules else name.rpartition(".")[0]
            yield Import(module, target, getattr(node, "lineno", 0), id(node) in nested)


def _first_party(node: ast.AST, module: str, package: bool) -> list[str]:
    """Absolute names below nelbo that a node imports."""
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        above = f"nelbo.{module}".rstrip(".").split(".")
        base = ".".join(above[: len(above) - node.level + package]) if node.level else ""
        origin = ".".join(part for part in (base, node.module) if part)
        names = [f"{origin}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Call) and _called(node) in {"import_module", "__import__"}:
        names = [a.value for a in node.args if isinstance(a, ast.Constant)]  # type: ignore[misc]
    return [n[6:] for n in names if isinstance(n, str) and (n + ".").startswith("nelbo.")]


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", "") or getattr(node.func, "id", "")


def _may(module: str, target: str) -> bool:
    mine, other = _FLOORS[module], _FLOORS[target]
    return other[0] < mine[0] or (other < mine and _folder(module) == _folder(target))


def _folder(module: str) -> str:
    top = module.split(".")[0]
    return top if module in _FOLDERS or "." in module else ""


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def _floor_faults(root: Path) -> list[str]:
    modules = _modules(root)
    faults = [f"{module}: has no floor in the table" for module in modules.keys() - _FLOORS.keys()]
    for module in modules.keys() & _FLOORS.keys():
        for found in _imports(module, modules[module], modules):
            if found.target not in _FLOORS or not _may(module, found.target):
                faults.append(f"{module}:{found.line} imports {found.target or 'nelbo'}")
            if found.nested and module not in _DEFERRING:
                faults.append(f"{module}:{found.line} hides an import in a function")
    return sorted(faults)


def _cycle(root: Path) -> list[str]:
    modules = _modules(root)
    graph = {
        module: {found.target for found in _imports(module, path, modules)}
        for module, path in modules.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def _habit_faults(root: Path) -> list[str]:
    faults = []
    for module, path in _modules(root).items():
        text = path.read_text(encoding="utf-8")
        if (lines := len(text.splitlines())) > _MOST_LINES:
            faults.append(f"{module}: {lines} lines, the most is {_MOST_LINES}")
        if _VAGUE & set(module.replace(".", "_").split("_")):
            faults.append(f"{module}: a name that says nothing")
        loads = module in _MAY_LOAD_TENSORS
        faults += [f"{module}:{line} {what}" for line, what in _pickling(ast.parse(text), loads)]
    return sorted(faults)


def _pickling(tree: ast.AST, loads: bool = False) -> Iterator[tuple[int, str]]:
    """Ways to read or write a pickle: modules, torch.load and torch.save, allow_pickle.

    Where `loads` is set, torch.load(..., weights_only=True) is allowed, with the True spelled out.
    """
    spared = {id(n.func) for n in ast.walk(tree) if loads and _loads_tensors_alone(n)}  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        if id(node) in spared:
            continue
        if isinstance(node, ast.Import):
            roots = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots = {(node.module or "").split(".")[0]}
            if node.module == "torch" and {"load", "save"} & {a.name for a in node.names}:
                yield node.lineno, "imports load or save from torch"
        else:
            roots = set()
        if roots & _PICKLING:
            yield node.lineno, "imports a pickler"  # type: ignore[attr-defined]
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.load", "torch.save"}:
            yield node.lineno, ast.unparse(node)
        if (
            isinstance(node, ast.keyword)
            and node.arg == "allow_pickle"
            and not _is_false(node.value)
        ):
            yield node.value.lineno, "allows pickle"


def _loads_tensors_alone(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call) or ast.unparse(node.func) != "torch.load":
        return False
    said = [k.value for k in node.keywords if k.arg == "weights_only"]
    return [isinstance(v, ast.Constant) and v.value is True for v in said] == [True]


def test_floors() -> None:
    assert _floor_faults(_SOURCE) == []


def test_no_cycles() -> None:
    assert _cycle(_SOURCE) == []


def test_habits() -> None:
    assert _habit_faults(_SOURCE) == []


def test_the_source_was_found() -> None:
    found = _modules(_SOURCE)
    assert {"", "errors", "checkpoint", "processes", "processes.gaussian"} <= found.keys()
    imported = {i.target for m, p in found.items() for i in _imports(m, p, found)}
    assert {"errors", "processes.base", "schedules"} <= imported


def test_the_package_itself_is_light() -> None:
    """`import nelbo` and `nelbo.errors` must not import torch or numpy: `--help` is fast."""
    code = (
        "import sys, nelbo, nelbo.errors; print({'torch', 'numpy'} & set(sys.modules) or 'none')"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "none"


_PLANTED = {
    "upwards": ("bound.py", "from nelbo.evaluation import x", "bound:1 imports evaluation"),
    "sideways": ("bound.py", "import nelbo.samplers", "bound:1 imports samplers"),
    "relative": ("reverse.py", "from . import bound", "reverse:1 imports bound"),
    "deep relative": ("data/toys.py", "from ..reverse import x", "data.toys:1 imports reverse"),
    "sibling above": (
        "processes/base.py",
        "from .gaussian import x",
        "processes.base:1 imports processes.gaussian",
    ),
    "sibling by name": (
        "processes/base.py",
        "from nelbo.processes import gaussian",
        "processes.base:1 imports processes.gaussian",
    ),
    "own package": ("data/toys.py", "from nelbo.data import x", "data.toys:1 imports data"),
    "other package": (
        "networks/unet.py",
        "import nelbo.processes.base",
        "networks.unet:1 imports processes.base",
    ),
    "for types": (
        "schedules.py",
        "import typing\nif typing.TYPE_CHECKING:\n    from nelbo.cli import x",
        "schedules:3 imports cli",
    ),
    "by string": (
        "reverse.py",
        "import importlib\nimportlib.import_module('nelbo.bound')",
        "reverse:2 imports bound",
    ),
    "upwards in a function": (
        "bound.py",
        "def f():\n    from nelbo import report",
        "bound:2 imports report",
    ),
    "hidden": (
        "bound.py",
        "def f():\n    from nelbo.errors import x",
        "bound:2 hides an import in a function",
    ),
    "no place": ("novel.py", "", "novel: has no floor in the table"),
}


def _plant(root: Path, file: str, text: str) -> Path:
    for name in ("bound", "samplers", "evaluation", "report", "reverse", "cli", "errors"):
        (root / f"{name}.py").write_text("")
    for name in ("processes", "networks", "data"):
        (root / name).mkdir()
        (root / name / "__init__.py").write_text("")
    for name in ("processes/base.py", "processes/gaussian.py", "__init__.py"):
        (root / name).write_text("")
    assert _floor_faults(root) == [] and _cycle(root) == [] and _habit_faults(root) == []
    (root / file).write_text(text)
    return root


@pytest.mark.parametrize("kind", _PLANTED)
def test_planted_imports_are_caught(kind: str, tmp_path: Path) -> None:
    file, text, fault = _PLANTED[kind]
    assert fault in _floor_faults(_plant(tmp_path, file, text))


def test_a_planted_cycle_is_caught(tmp_path: Path) -> None:
    root = _plant(tmp_path, "errors.py", "def f():\n    import nelbo.bound")
    (root / "bound.py").write_text("from nelbo.errors import x")
    assert set(_cycle(root)) == {"errors", "bound"}


def test_what_is_allowed_is_not_caught(tmp_path: Path) -> None:
    root = _plant(tmp_path, "cli.py", "def f():\n    from nelbo.evaluation import x")
    (root / "processes/gaussian.py").write_text("from nelbo.processes.base import x\nimport torch")
    (root / "processes/__init__.py").write_text("from .gaussian import x")
    (root / "reverse.py").write_text("from nelbo.processes import x\nfrom nelbo import errors")
    assert _floor_faults(root) == [] and _cycle(root) == []


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        ("image_utils.py", "", "image_utils: a name that says nothing"),
        ("data/core.py", "", "data.core: a name that says nothing"),
        ("bound.py", "\n" * 301, "bound: 301 lines, the most is 300"),
        ("bound.py", "def f():\n    import pickle", "bound:2 imports a pickler"),
        ("bound.py", "from pickle import loads", "bound:1 imports a pickler"),
        ("bound.py", "import torch\ntorch.load('x')", "bound:2 torch.load"),
        ("bound.py", "import torch\nf = torch.save", "bound:2 torch.save"),
        ("bound.py", "from torch import load", "bound:1 imports load or save from torch"),
        ("bound.py", "f(x, allow_pickle=True)", "bound:1 allows pickle"),
    ],
)
def test_planted_habits_are_caught(file: str, text: str, fault: str, tmp_path: Path) -> None:
    assert fault in _habit_faults(_plant(tmp_path, file, text))


@pytest.mark.parametrize(
    ("file", "call", "faults"),
    [
        ("interop/weights.py", "torch.load(x, weights_only=True)", 0),
        ("interop/weights.py", "torch.load(x)", 1),
        ("interop/weights.py", "torch.load(x, weights_only=False)", 1),
        ("interop/weights.py", "torch.load(x, weights_only=trusted)", 1),
        ("interop/weights.py", "torch.load(x, **{'weights_only': True})", 1),
        ("interop/weights.py", "f = torch.load", 1),
        ("interop/weights.py", "torch.save(x, weights_only=True)", 1),
        ("interop/openai.py", "torch.load(x, weights_only=True)", 1),
    ],
)
def test_one_module_may_load_tensors_alone(
    file: str, call: str, faults: int, tmp_path: Path
) -> None:
    (tmp_path / "interop").mkdir()
    (tmp_path / file).write_text(call)
    assert len(_habit_faults(tmp_path)) == faults
