"""Imports point downwards only, and ``import jax_lora`` stays light."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import jax_lora

ROOT = Path(jax_lora.__file__).parent

#: From the ground up. A module imports from the rows below its own, and from its own package.
LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(f"jax_lora.{name}" for name in row.split())
    for row in (
        "errors tables",
        "rules",
        "adapter config",
        "virtual sharding linalg",
        "interpreter lowrank",
        "initializers",
        "variants",
        "slots transform optim training io dropout",
        "bank probes algebra combine extract",
        "apply_bank discover",
        "selection peft",
        "plan summary serving",
        "from_data sweep",
    )
)
FACADE = "jax_lora"
EXPERIMENTS = "jax_lora.experiments"
#: These know nothing of LoRA: each imports nothing of ours but itself.
ISLANDS = frozenset({"jax_lora.models", "jax_lora.data", "jax_lora.report"})


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _sources() -> dict[str, str]:
    return {_module(path): path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py")}


def _imports(source: str) -> Iterator[str]:
    """Every module a source names in an import, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "expected absolute imports"
            assert node.module is not None
            yield node.module
            # "from jax_lora import report" names a module as well.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _unit(name: str) -> str:
    """The first component below ``jax_lora``, or the façade itself."""
    return ".".join(name.split(".")[:2])


def _wrong_imports(sources: Mapping[str, str]) -> list[str]:
    """Every import that points upwards, sideways, or to JAX's private modules."""
    row = {unit: k for k, units in enumerate(LAYERS) for unit in units}
    known = set(row) | ISLANDS | {FACADE, EXPERIMENTS}
    wrong = []
    for module, source in sorted(sources.items()):
        importer = _unit(module)
        if importer not in known:
            wrong.append(f"{module} has no layer")
            continue
        for name in sorted(set(_imports(source))):
            if name == "jax._src" or name.startswith("jax._src."):
                wrong.append(f"{module} -> {name}")
            if name.split(".")[0] != "jax_lora":
                continue
            imported = _unit(name)
            if imported == importer or importer == EXPERIMENTS:
                continue
            if imported not in known:
                continue  # a name of the façade, which is an import of it as well
            if importer == FACADE:
                allowed = imported in row
            elif importer in ISLANDS or imported not in row:
                allowed = False
            else:
                allowed = row[imported] < row[importer]
            if not allowed:
                wrong.append(f"{module} -> {name}")
    return wrong


def test_imports_point_downwards() -> None:
    sources = _sources()
    assert len(sources) > 20
    assert _wrong_imports(sources) == []


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("jax_lora.adapter", "from jax_lora.plan import plan", "jax_lora.plan"),
        ("jax_lora.adapter", "import jax_lora.config", "jax_lora.config"),
        ("jax_lora.config", "import jax_lora", "jax_lora"),
        ("jax_lora.plan", "from jax_lora import LoraConfig", "jax_lora"),
        ("jax_lora.plan", "from jax_lora import summary", "jax_lora.summary"),
        ("jax_lora.interpreter.core", "from jax_lora.transform import apply", "jax_lora.transform"),
        ("jax_lora.transform", "def f():\n    import jax_lora.training", "jax_lora.training"),
        ("jax_lora.models.mlp", "from jax_lora.adapter import Layout", "jax_lora.adapter"),
        ("jax_lora.data.cifar10", "from jax_lora.errors import ConfigError", "jax_lora.errors"),
        ("jax_lora.data", "from jax_lora.models import MLP", "jax_lora.models"),
        ("jax_lora.report", "from jax_lora.tables import count", "jax_lora.tables"),
        ("jax_lora.training", "from jax_lora.experiments import fit", "jax_lora.experiments"),
        ("jax_lora", "from jax_lora.experiments import fit", "jax_lora.experiments"),
        ("jax_lora", "from jax_lora.models import MLP", "jax_lora.models"),
        ("jax_lora.interpreter.core", "from jax._src import core", "jax._src"),
        ("jax_lora.experiments.fit", "import jax._src.core", "jax._src.core"),
        ("jax_lora.unheard_of", "", "has no layer"),
    ],
)
def test_the_checker_sees(module: str, source: str, wrong: str) -> None:
    """The negative control of the test above."""
    found = _wrong_imports({module: source})
    assert any(wrong in line for line in found), found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jax_lora.plan", "from jax_lora.adapter import Layout\nimport jax\nimport jax.core"),
        ("jax_lora.interpreter.control", "from jax_lora.interpreter.core import rule"),
        ("jax_lora.experiments.article", "import jax_lora as jl\nfrom jax_lora import report"),
        ("jax_lora.models", "from jax_lora.models.mlp import MLP"),
        ("jax_lora", "from jax_lora.plan import plan\nfrom jax_lora import io"),
    ],
)
def test_the_checker_accepts(module: str, source: str) -> None:
    assert _wrong_imports({module: source}) == []


def test_no_two_modules_import_each_other() -> None:
    """Within a package, too: the graph over all modules has no circle."""
    sources = _sources()
    graph = {
        module: {name for name in _imports(source) if name in sources and name != module}
        for module, source in sources.items()
        if module != FACADE and not module.startswith(EXPERIMENTS)
    }
    # A package's __init__ that is named only on the way to one of its modules is not an edge.
    for module, names in graph.items():
        names -= {n for n in names if module.startswith(f"{n}.")}
    while free := [module for module, names in graph.items() if not names & set(graph)]:
        for module in free:
            del graph[module]
    assert not graph


def _loaded(statement: str) -> set[str]:
    heavy = [
        "flax",
        "optax",
        "orbax",
        "tensorflow",
        "tensorflow_datasets",
        "torch",
        "matplotlib",
        "sklearn",
        "PIL",
        "tqdm",
        "tyro",
        "tensorboardX",
        "array_record",
    ]
    code = f"{statement}\nimport sys\nprint(*[m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
    )
    return set(done.stdout.split())


def test_import_is_light() -> None:
    assert _loaded("import jax_lora") == set()
    # Negative control: what is loaded at first use, and is seen then.
    pytest.importorskip("optax")
    assert "optax" in _loaded("import jax_lora; jax_lora.optim")


def test_every_public_name_has_a_docstring() -> None:
    public = {
        name: value
        for name, value in vars(jax_lora).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__.startswith("jax_lora")
    }
    assert {"apply", "plan", "init", "merge", "LoraConfig", "Adapter", "TargetError"} <= set(public)
    without = [name for name, value in public.items() if not (value.__doc__ or "").strip()]
    for name, value in public.items():
        if inspect.isclass(value):
            without += [
                f"{name}.{key}"
                for key, member in vars(value).items()
                if not key.startswith(("_", "tree_"))
                and (inspect.isfunction(member) or isinstance(member, property))
                and not inspect.getdoc(member)
            ]
    assert without == []


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'jax_lora' has no attribute 'lora'"):
        jax_lora.lora  # noqa: B018
