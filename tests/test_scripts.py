"""The scripts as a user runs them: one after the other, wrongly, and interrupted."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

import jax_lora as jl
from jax_lora.experiments.epochs import Resident

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboardX")

SCRIPTS = Path(jl.__file__).parents[1] / "scripts"
NAMES = sorted(path.stem for path in SCRIPTS.glob("*.py"))
TRAINING = ("--epochs", "2", "--batch-size", "64", "--learning-rate", "0.02", "--num-devices", "1")
DIGITS = ("--dataset", "digits")
TINY = (*DIGITS, *TRAINING, "--hidden-dim", "12")
TINY_LORA = (*DIGITS, *TRAINING, "--rank", "3")

Run = Callable[..., tuple[int, str, str]]


def run_script(name: str, *arguments: Any) -> int:
    """Run a script as if by ``python scripts/name.py``, in this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPTS / f"{name}.py"), *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    code = caught.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a script; returns its exit code, standard output and standard error."""

    def run(name: str, *arguments: Any) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run_script(name, *arguments)
        return code, *capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and its adapter, made by the scripts."""
    folder = tmp_path_factory.mktemp("saved")
    base = folder / "base"
    assert run_script("pretrain", *TINY, "--out", base) == 0
    assert run_script("finetune_lora", *TINY_LORA, "--base", base, "--out", folder / "lora") == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def accuracy_in(text: str) -> float:
    found = re.search(r"^base.*: ([\d.]+)% of 360 test images", text, re.MULTILINE)
    assert found, text
    return float(found[1]) / 100


@pytest.mark.parametrize("name", NAMES)
def test_importing_a_script_runs_nothing(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(SCRIPTS / f"{name}.py"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", NAMES)
def test_help(name: str, run: Run) -> None:
    code, out, err = run(name, "--help")
    assert (code, err) == (0, "")
    assert "usage" in out
    # Every option has a text, and the first line says what the script does.
    assert len(out.splitlines()) > 10


class TestInTurn:
    def test_evaluate_gives_what_training_recorded(self, saved: Path, run: Run) -> None:
        _, base = jl.io.load_params(saved / "base")
        _, _, lora = jl.io.load_adapter(saved / "lora")
        assert base["accuracy"] != lora["accuracy"]
        for arguments, expected in (
            ((), base["accuracy"]),
            (("--adapter", saved / "lora"), lora["accuracy"]),
        ):
            code, out, err = run("evaluate", "--base", saved / "base", *arguments)
            assert (code, err) == (0, "")
            # The percentage is printed with two digits.
            assert accuracy_in(out) == pytest.approx(expected, abs=0.51e-4)

    def test_merged_is_as_good_as_beside(self, saved: Path, run: Run) -> None:
        _, _, lora = jl.io.load_adapter(saved / "lora")
        arguments = ("--base", saved / "base", "--adapter", saved / "lora", "--merge")
        code, out, _ = run("evaluate", *arguments)
        assert code == 0
        # Rounded elsewhere: an image on the edge between two classes may turn.
        assert accuracy_in(out) == pytest.approx(lora["accuracy"], abs=1.5 / 360)

    def test_finetuning_again_is_the_same_and_leaves_the_base_as_it_was(
        self, saved: Path, tmp_path: Path
    ) -> None:
        before = contents(saved)
        found = {}
        for seed in (0, 1):
            arguments = ("--base", saved / "base", "--seed", seed, "--out", tmp_path / f"{seed}")
            assert run_script("finetune_lora", *TINY_LORA, *arguments) == 0
            found[seed], _, _ = jl.io.load_adapter(tmp_path / f"{seed}")
        assert contents(saved) == before
        first, _, _ = jl.io.load_adapter(saved / "lora")
        for path, factors in first.items():
            assert (found[0][path].a == factors.a).all()
            assert (found[0][path].b == factors.b).all()
            assert (found[1][path].a != factors.a).any()

    def test_summary_of_the_saved(self, saved: Path, run: Run) -> None:
        arguments = ("--base", saved / "base", "--adapter", saved / "lora")
        code, out, err = run("summary", *arguments)
        assert (code, err) == (0, "")
        base = 64 * 12 + 12 + 12 * 12 + 12 + 12 * 10 + 10
        lora = 3 * (64 + 12 + 12 + 12 + 12 + 10)
        for number in (base, lora, base + lora):
            assert f"{number:,}" in out


SWEEP = (*DIGITS, "--epochs", "2", "--batch-size", "64", "--learning-rate", "0.02")


class TestSweep:
    def test_each_trial_is_what_finetuning_gives_and_the_best_is_saved(
        self, saved: Path, tmp_path: Path, run: Run
    ) -> None:
        arguments = ("--base", saved / "base", *SWEEP, "--ranks", 2, 3, "--num-seeds", 2)
        code, out, err = run("sweep", *arguments, "--order", "own", "--out", tmp_path / "sweep")
        assert (code, err) == (0, "")
        assert (tmp_path / "sweep" / "table.txt").read_text() in out
        names = {path.name for path in (tmp_path / "sweep").iterdir()}
        assert names == {"best", "curves.png", "hyperparameters.png", "sweep.json", "table.txt"}
        found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
        runs = {(run["trial"]["rank"], run["trial"]["seed"]): run for run in found["trials"]}
        final = {name: run["metrics"]["accuracy"][-1] for name, run in runs.items()}
        assert set(final) == {(2, 0), (2, 1), (3, 0), (3, 1)}

        best = tmp_path / "sweep" / "best"
        code, out, _ = run("evaluate", "--base", saved / "base", "--adapter", best)
        assert code == 0
        assert accuracy_in(out) == pytest.approx(max(final.values()), abs=0.51e-4)

        _, _, alone = jl.io.load_adapter(saved / "lora")  # rank 3, seed 0
        # Summed in another order: an image on the edge between two classes may turn.
        assert final[3, 0] == pytest.approx(alone["accuracy"], abs=1.5 / 360)


def test_summary_prints_the_articles_numbers(run: Run) -> None:
    code, out, err = run("summary")
    assert (code, err) == (0, "")
    for number in ("411,146", "115,008", "526,154", "393,344", "16,512", "1,290"):
        assert number in out
    # torchinfo's totals for the base: 13.16 M multiply-adds, sizes in MB.
    for label, value in (
        ("multiply-adds \\(M\\)", "13.16"),
        ("input size \\(MB\\)", "0.39"),
        ("forward/backward pass size \\(MB\\)", "0.07"),
        ("params size \\(MB\\)", "1.64"),
        ("estimated total size \\(MB\\)", "2.11"),
    ):
        assert re.search(rf"{label} +{value}\b", out), label
    assert re.search(r"params size \(MB\) +2\.10\b", out)


class TestWrongly:
    def refuse(self, run: Run, words: list[str], name: str, *arguments: Any) -> None:
        """One line on standard error with these words, a failing exit code, and nothing else."""
        code, _, err = run(name, *arguments)
        assert code == 1
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        assert [word for word in words if word not in err] == [], err

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("--rank", "0"), ["rank of at least 1", "rank=0"]),
            (("--rank", "-1"), ["rank=-1"]),
            (("--rank", "999"), ["at most 12", "rank=999"]),
            (("--alpha", "nan"), ["finite", "alpha=nan"]),
            (("--alpha", "inf"), ["finite", "alpha=inf"]),
            (("--num-devices", "99"), ["devices", "got 99"]),
        ],
        ids=lambda value: "=".join(value) if isinstance(value, tuple) else "",
    )
    def test_a_number(
        self, run: Run, saved: Path, tmp_path: Path, arguments: Any, words: list[str]
    ) -> None:
        lora = ("--base", saved / "base", *TINY_LORA, *arguments, "--out", tmp_path / "lora")
        self.refuse(run, words, "finetune_lora", *lora)
        self.refuse(run, words, "reproduce_cifar10", *TINY, *arguments, "--out", tmp_path / "all")
        # Of what was wrong before anything was trained, nothing is left.
        assert contents(tmp_path) == {}

    @pytest.mark.parametrize("option", ["--targets", "--exclude"])
    def test_a_target_that_matches_nothing(
        self, run: Run, saved: Path, tmp_path: Path, option: str
    ) -> None:
        wrong = (option, "params/l1/kernal", "--out", tmp_path / "out")
        for name, arguments in (
            ("finetune_lora", (*TINY_LORA, "--base", saved / "base", *wrong)),
            ("reproduce_cifar10", (*TINY, "--rank", "3", *wrong)),
        ):
            code, _, err = run(name, *arguments)
            assert code == 1
            assert "'params/l1/kernal' matches no parameter" in err
            assert "'params/l1/kernel'" in err
            assert "Traceback" not in err
            assert contents(tmp_path) == {}

    def test_what_the_parser_refuses(self, run: Run, tmp_path: Path) -> None:
        for arguments, words in (
            (("--dataset", "mnist"), ["mnist", "'digits'"]),
            (("--epoch", "1"), ["--epoch", "--epochs"]),
            (("--rank", "many"), ["--rank", "many"]),
            (("--parallel", "gpu"), ["gpu", "'pmap'"]),
            (("--epochs", "0"), ["expected --epochs of at least 1", "got 0"]),
            (("--batch-size", "-1"), ["expected --batch-size of at least 1", "got -1"]),
            (("--learning-rate", "nan"), ["expected --learning-rate of at least 0", "got nan"]),
        ):
            code, out, err = run("reproduce_cifar10", *TINY, *arguments, "--out", tmp_path / "x")
            assert (code, out) == (2, "")
            # The parser prints a box.
            text = " ".join(err.replace("│", " ").split())
            assert [word for word in words if word not in text] == [], err
            assert "Traceback" not in err
        code, _, err = run("finetune_lora", *TINY_LORA)
        assert code == 2
        assert "--base" in err
        assert contents(tmp_path) == {}

    @pytest.mark.parametrize("name", ["pretrain", "finetune_lora", "reproduce_cifar10"])
    def test_an_out_that_holds_something(
        self, run: Run, saved: Path, tmp_path: Path, name: str
    ) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.tex").write_text("years of work")
        (tmp_path / "file").write_text("hello")
        before = contents(tmp_path)
        arguments = {
            "pretrain": TINY,
            "finetune_lora": (*TINY_LORA, "--base", saved / "base"),
            "reproduce_cifar10": TINY,
        }[name]
        for out in ("mine", "file"):
            words = [out, "never overwritten"]
            self.refuse(run, words, name, *arguments, "--out", tmp_path / out)
        if name != "reproduce_cifar10":
            words = ["--out of an unfinished run to --resume", "another --out, and the run's"]
            self.refuse(run, words, name, *arguments, "--out", tmp_path / "mine", "--resume")
        assert contents(tmp_path) == before

    def test_a_checkpoint_that_is_not_there(self, run: Run, saved: Path, tmp_path: Path) -> None:
        nowhere, base = tmp_path / "nowhere", ("--base", saved / "base")
        out = ("--out", tmp_path / "lora")
        self.refuse(run, ["nowhere"], "evaluate", "--base", nowhere)
        self.refuse(run, ["nowhere"], "evaluate", *base, "--adapter", nowhere)
        self.refuse(run, ["nowhere"], "summary", "--base", nowhere)
        self.refuse(run, ["nowhere"], "finetune_lora", *TINY_LORA, "--base", nowhere, *out)
        assert contents(tmp_path) == {}

    def test_a_checkpoint_of_the_wrong_kind(self, run: Run, saved: Path) -> None:
        base = ("--base", saved / "base")
        kinds = ["jax_lora.adapter", "jax_lora.params"]
        self.refuse(run, kinds, "evaluate", "--base", saved / "lora")
        self.refuse(run, kinds, "evaluate", *base, "--adapter", saved / "base")
        self.refuse(run, kinds, "summary", *base, "--adapter", saved / "base")

    @pytest.mark.parametrize("item", ["arrays", "config"])
    # When an array cannot be read, orbax closes its event loop while others are still being read,
    # and their threads complain.
    @pytest.mark.filterwarnings(
        "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
    )
    def test_a_truncated_checkpoint(self, run: Run, saved: Path, tmp_path: Path, item: str) -> None:
        damaged = tmp_path / "base"
        for name, content in contents(saved / "base").items():
            (damaged / name).parent.mkdir(parents=True, exist_ok=True)
            cut = name.startswith(item)
            (damaged / name).write_bytes(content[: len(content) // 2] if cut else content)
        self.refuse(run, ["base", "damaged", "from a copy"], "evaluate", "--base", damaged)
        out = ("--out", tmp_path / "lora")
        code, _, err = run("finetune_lora", *TINY_LORA, "--base", damaged, *out)
        assert code == 1
        assert "damaged" in err
        assert not (tmp_path / "lora").exists()
        time.sleep(0.2)  # for the last of those threads

    def test_params_of_some_other_program(self, run: Run, tmp_path: Path) -> None:
        jl.io.save_params(tmp_path / "theirs", {"w": jnp.ones((2, 2))})
        self.refuse(run, ["metadata lacks", "features"], "evaluate", "--base", tmp_path / "theirs")

    def test_a_base_of_another_data_set(self, run: Run, saved: Path, tmp_path: Path) -> None:
        params, metadata = jl.io.load_params(saved / "base")
        metadata |= {"dataset": "cifar10", "image_shape": [4, 16, 1]}
        jl.io.save_params(tmp_path / "base", params, metadata)
        base = ("--base", tmp_path / "base")
        words = ["cifar10", "digits", "--dataset cifar10"]
        self.refuse(run, words, "evaluate", *DIGITS, *base)
        out = ("--out", tmp_path / "lora")
        self.refuse(run, words, "finetune_lora", *TINY_LORA, *base, *out)
        assert not (tmp_path / "lora").exists()

    def test_an_adapter_of_another_base(self, run: Run, saved: Path, tmp_path: Path) -> None:
        wide = (*TINY, "--hidden-dim", "13", "--epochs", "1")
        assert run_script("pretrain", *wide, "--out", tmp_path / "wide") == 0
        arguments = ("--base", tmp_path / "wide", "--adapter", saved / "lora")
        code, _, err = run("evaluate", *arguments)
        assert code == 1
        assert "params/l1/kernel: made for shape (64, 12), found (64, 13)" in err
        assert "Traceback" not in err

    def test_merge_without_an_adapter(self, run: Run, saved: Path) -> None:
        self.refuse(run, ["--adapter"], "evaluate", "--base", saved / "base", "--merge")
        self.refuse(run, ["--base"], "summary", "--adapter", saved / "lora")

    def test_a_learning_rate_that_diverges(self, run: Run, tmp_path: Path) -> None:
        arguments = (*TINY, "--learning-rate", "1e30", "--out", tmp_path / "base")
        self.refuse(run, ["finite loss", "lower --learning-rate"], "pretrain", *arguments)
        assert contents(tmp_path) == {}


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that do not outlive their test."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def start(processes: list[subprocess.Popen[str]], name: str, *arguments: Any, **env: str) -> Any:
    paths = [str(SCRIPTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"} | env
    command = [sys.executable, "-W", "error", str(SCRIPTS / f"{name}.py"), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, **pipes)
    processes.append(process)
    return process


RESUME = (*TINY_LORA, "--dropout", "0.2", "--save-every-steps", "5")


@pytest.fixture(scope="module")
def interrupted(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter trained in one go, and the checkpoints of one that was not."""
    folder, base = tmp_path_factory.mktemp("resume"), ("--base", saved / "base")
    plain = (*TINY_LORA, "--dropout", "0.2", *base, "--out", folder / "plain")
    assert run_script("finetune_lora", *plain) == 0
    run_steps = Resident.__call__

    def until(self: Any, state: Any, *arguments: Any) -> Any:
        if int(state.step) >= 30:
            raise KeyboardInterrupt
        return run_steps(self, state, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Resident, "__call__", until)
        assert run_script("finetune_lora", *RESUME, *base, "--out", folder / "lora") == 130
    return folder


class TestResume:
    def test_goes_on_in_the_middle_of_an_epoch(
        self, run: Run, saved: Path, interrupted: Path
    ) -> None:
        steps = interrupted / "lora-checkpoints"
        last = max(int(path.name) for path in steps.iterdir() if path.name.isdigit())
        assert 23 <= last < 46  # an epoch has 23 steps
        arguments = (*RESUME, "--base", saved / "base", "--out", interrupted / "lora")
        other = ("--batch-size", "32", "--seed", "7", "--learning-rate", "1", "--rank", "2")
        code, _, err = run("finetune_lora", *arguments, *other, "--dropout", "0", "--resume")
        assert code == 1
        assert err.splitlines()[1:] == [
            "  batch_size: saved 64, now 32",
            "  learning_rate: saved 0.02, now 1.0",
            "  seed: saved 0, now 7",
            "  config.dropout: saved 0.2, now 0.0",
            "  config.rank: saved 3, now 2",
        ]
        code, _, err = run("finetune_lora", *arguments)
        assert code == 1
        assert "pass --resume to go on" in err
        assert run("finetune_lora", *arguments, "--resume")[0] == 0
        plain, _, metadata = jl.io.load_adapter(interrupted / "plain")
        found, _, found_metadata = jl.io.load_adapter(interrupted / "lora")
        assert found_metadata == metadata
        for path, entry in plain.items():
            assert (found[path].a == entry.a).all()
            assert (found[path].b == entry.b).all()
        # A checkpoint is an adapter.
        code, out, _ = run("evaluate", "--base", saved / "base", "--adapter", steps / "46")
        assert code == 0
        assert accuracy_in(out) == pytest.approx(metadata["accuracy"], abs=0.51e-4)

    def test_another_base_is_refused(self, run: Run, saved: Path, tmp_path: Path) -> None:
        params, metadata = jl.io.load_params(saved / "base")
        params["params"]["l2"]["bias"] += 1
        jl.io.save_params(tmp_path / "base", params, metadata)
        arguments = ("--base", tmp_path / "base", "--adapter", saved / "lora")
        code, _, err = run("evaluate", *arguments)
        assert code == 1
        assert err.splitlines()[1:] == ["  params/l2/bias: other values"]
        assert run("evaluate", *arguments, "--force")[0] == 0

    def test_of_nothing(self, run: Run, tmp_path: Path) -> None:
        code, _, err = run("pretrain", *TINY, "--resume")
        assert code == 1
        assert "expected --out or --checkpoints of the run to --resume" in err
        code, _, err = run("pretrain", *TINY, "--keep", "3", "--out", tmp_path / "x")
        assert code == 2


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_leaves_what_was_saved(
    tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    out = tmp_path / "out"
    process = start(
        processes, "reproduce_cifar10", *TINY, "--rank", "3", "--epochs", "300", "--out", out
    )
    for line in process.stdout:
        if line.startswith("[LoRA, epoch 1]"):
            break
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert "[LoRA, epoch 300]" not in rest, "the signal came too late to test anything"
    assert process.returncode == 130
    assert err == "interrupted; checkpoints already saved are complete\n"
    assert [path.name for path in out.iterdir()] == ["base"]
    params, metadata = jl.io.load_params(out / "base")
    assert params["params"]["l1"]["kernel"].shape == (64, 12)
    assert run_script("evaluate", "--base", out / "base") == 0
    assert 0 < metadata["accuracy"] <= 1


def test_devices_that_cannot_share_a_batch(
    tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    out = tmp_path / "out"
    arguments = (*DIGITS, "--batch-size", "10", "--num-devices", "4", "--parallel", "pmap")
    devices = "--xla_force_host_platform_device_count=4"
    environment = {"XLA_FLAGS": devices, "JAX_PLATFORMS": "cpu"}
    process = start(processes, "pretrain", *arguments, "--out", out, **environment)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.startswith("error: expected a batch size that 4 devices can share, got 10")
    assert err.count("\n") == 1
    assert contents(tmp_path) == {}


def test_results_are_plain_json(tmp_path: Path, run: Run) -> None:
    """`reproduce_cifar10` as a user calls it; its numbers are tested with the experiment."""
    code, out, err = run("reproduce_cifar10", *TINY, "--rank", "3", "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "reproduce_cifar10.py" in results["command"]
    assert f"base {results['base']['accuracy'][-1]:.2%}" in out
