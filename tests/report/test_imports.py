"""What the package imports, and when."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jax_lora import report

Results = dict[str, Any]
MakeResults = Callable[..., Results]


def test_extras_come_only_with_the_functions_that_need_them_and_nothing_global_is_touched(
    tmp_path: Path, make_results: MakeResults
) -> None:
    """In a fresh interpreter: in this one other tests have imported everything."""
    code = f"""
import json, sys
from jax_lora import report
results = json.loads({json.dumps(make_results())!r})
report.write_json(results, "results.json")
report.write_report(results, "report.md")
assert not {{"matplotlib", "tensorboardX"}} & set(sys.modules)
import matplotlib
before = matplotlib.rcParams.copy()  # not dict(): it would resolve the backend
report.write_plots(results, ".")
assert matplotlib.rcParams.copy() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    pytest.importorskip("matplotlib")
    paths = [str(Path(report.__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "path", sorted(Path(report.__file__).parent.glob("*.py")), ids=lambda p: p.stem
)
def test_nothing_else_of_the_library_is_imported(path: Path) -> None:
    top = [n for n in ast.parse(path.read_text("utf-8")).body if not isinstance(n, ast.If)]
    names: set[str] = set()
    for node in (inner for statement in top for inner in ast.walk(statement)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module or "")
    ours = {name for name in names if name.startswith("jax_lora.report.")}
    assert {name.partition(".")[0] for name in names - ours} <= sys.stdlib_module_names


@pytest.mark.parametrize(
    ("package", "write"),
    [("matplotlib", report.write_plots), ("tensorboardX", report.write_tensorboard)],
)
def test_missing_extra_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    write: Any,
    make_results: MakeResults,
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*pip install 'jax_lora\[cifar10\]'"):
        write(make_results(), tmp_path)
