"""Files damaged at random: each is read right or refused; and what would not be is seen."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jax_lora as jl
from jax_lora.errors import ConfigError
from jax_lora.experiments.fuzzing import campaign, worker
from jax_lora.experiments.fuzzing.campaign import Fuzz, FuzzError, fuzz
from jax_lora.experiments.fuzzing.mutations import Mutation, mutate
from jax_lora.experiments.fuzzing.subjects import Subject, subjects
from jax_lora.experiments.fuzzing.worker import TooLateError, case, judge

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # of orbax, when collected


NAMES = (
    *(f"peft {kind}" for kind in ("lora", "half", "dora", "whole", "table", "loha", "lokr")),
    *("kohya", "weights"),
    *("checkpoint of an adapter", "checkpoint of parameters", "checkpoint of a training"),
)


@pytest.fixture(scope="module")
def known() -> dict[str, Subject]:
    found = {subject.name: subject for subject in subjects()}
    assert tuple(found) == NAMES
    return found


def test_five_hundred_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What fails is kept, and its number repeats it."""
    outcomes = fuzz(Fuzz(cases=500, seed=20, workers=1, slow=0.1, keep=tmp_path))
    assert sorted(outcome.index for outcome in outcomes) == list(range(500))
    assert len({outcome.subject for outcome in outcomes}) == len(NAMES)
    results = [outcome.result for outcome in outcomes]
    # Not all of them are refused: then nothing about reading right would be said.
    assert results.count("right") > 40
    assert results.count("refused") > 200
    assert "500 cases of seed 20" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_case_is_the_same_each_time(known: dict[str, Subject]) -> None:
    first, again, other = (case(3, index, list(known.values()), 0.5) for index in (7, 7, 8))
    assert first[1] == again[1]
    assert first[1].files != other[1].files
    texts = {mutate(np.random.default_rng(k), {"x": b'{"a": 1}'}, {}, "o").text for k in range(300)}
    assert len(texts) > 100


class TestWhatIsWrongIsSeen:
    """The judge has no teeth unless it bites: readers that are wrong in one respect."""

    @pytest.fixture
    def folders(self, known: dict[str, Subject], tmp_path: Path) -> dict[str, Path]:
        for name, subject in known.items():
            Mutation(subject.files, "").write(tmp_path / name)
        return {name: tmp_path / name for name in known}

    @pytest.mark.parametrize("name", NAMES)
    def test_another_of_the_same_kind(
        self, known: dict[str, Subject], folders: dict[str, Path], tmp_path: Path, name: str
    ) -> None:
        subject = known[name]
        assert judge(subject, folders[name]) == "right"
        Mutation(subject.donor, "").write(tmp_path / "donor")
        other = subject.load(tmp_path / "donor")
        assert judge(subject, folders[name], lambda _: other) not in ("right", "refused")

    @pytest.mark.parametrize("name", ["peft lora", "peft half", "peft dora", "peft lokr", "kohya"])
    def test_one_number(
        self, known: dict[str, Subject], folders: dict[str, Path], name: str
    ) -> None:
        subject = known[name]
        loaded = subject.load(folders[name])
        entry = loaded.adapter["head/kernel"]
        for field in ("scale", "b", *(["magnitude"] if name == "peft dora" else [])):
            x = np.array(getattr(entry, field))
            x[(0,) * x.ndim] *= 1.01
            changed = {"head/kernel": dataclasses.replace(entry, **{field: x})}
            wrong = loaded._replace(adapter=jl.Adapter(dict(loaded.adapter) | changed))
            found = judge(subject, folders[name], lambda _, wrong=wrong: wrong)
            assert found.startswith("head.weight: off by"), field

    def test_an_entry_less_or_more(
        self, known: dict[str, Subject], folders: dict[str, Path]
    ) -> None:
        subject = known["peft whole"]
        loaded = subject.load(folders["peft whole"])
        less = loaded._replace(adapter=jl.drop(loaded.adapter, "table"))
        assert "adapts" in judge(subject, folders["peft whole"], lambda _: less)
        whole = known["peft lora"].load(folders["peft lora"])
        assert "adapts" in judge(known["peft table"], folders["peft table"], lambda _: whole)

    def test_another_error_and_no_end(
        self, known: dict[str, Subject], folders: dict[str, Path]
    ) -> None:
        def breaks(folder: Path) -> Any:
            return {}["key"]

        def hangs(folder: Path) -> Any:
            time.sleep(60)

        subject, folder = known["kohya"], folders["kohya"]
        assert judge(subject, folder, breaks).startswith("KeyError: 'key' at ")
        with worker._alarm(0.05):
            assert judge(subject, folder, hangs) == "took too long"
        with pytest.raises(TooLateError), worker._alarm(0.05):
            time.sleep(60)

    def test_containers_and_static_fields(
        self, known: dict[str, Subject], folders: dict[str, Path]
    ) -> None:
        name = "checkpoint of parameters"
        params, metadata = known[name].load(folders[name])
        wrong = (params | {"empty": []}, metadata)
        assert "has another structure" in judge(known[name], folders[name], lambda _: wrong)
        name = "checkpoint of an adapter"
        adapter, config, metadata = known[name].load(folders[name])
        rows = dataclasses.replace(adapter["p/embedding"], rows=(1, 4))
        other = jl.Adapter(dict(adapter) | {"p/embedding": rows})
        found = judge(known[name], folders[name], lambda _: (other, config, metadata))
        assert "has other static fields" in found


class TestCampaign:
    """Processes that end, and outcomes beyond the limits."""

    def start(self, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
        """Workers that run a program of a few lines in the place of the cases."""

        def start(options: Fuzz, numbers: range) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", program, json.dumps(list(numbers))]
            return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

        monkeypatch.setattr(campaign, "_start", start)

    @pytest.fixture(autouse=True)
    def _no_output(self, capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
        yield
        capsys.readouterr()

    _SAYS = (
        "import json, os, sys\n"
        "for k in json.loads(sys.argv[1]):\n"
        "    if k == 3: os.abort()\n"
        "    x = dict(index=k, subject='x', text='', result='right', seconds=0.0)\n"
        "    print(json.dumps(x | dict(megabytes=700.0 if k == 5 else 1.0)), flush=True)\n"
    )

    def test_a_process_that_ends_and_one_that_takes_much(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.start(monkeypatch, self._SAYS)
        with pytest.raises(FuzzError, match="2 were not: 3, 5; repeat one with --seed 0"):
            fuzz(Fuzz(cases=7, workers=1))
        outcomes = fuzz(Fuzz(cases=7, workers=1, megabytes=800, only=5))
        assert [outcome.index for outcome in outcomes] == [5]

    def test_options_out_of_range(self) -> None:
        for options in (Fuzz(cases=0), Fuzz(workers=0), Fuzz(seconds=-1.0)):
            with pytest.raises(ConfigError, match="above 0"):
                fuzz(options)
