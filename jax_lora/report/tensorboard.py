"""The curves as TensorBoard event files."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_lora.report.extras import import_extra
from jax_lora.report.results import CURVE_KEYS, PHASES, check_keys, curve_of

ACCURACY_TAG = "Accuracy/test"
LOSS_TAG = "Loss/train"


def write_tensorboard(results: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write the event files of both phases, which TensorBoard shows as two lines in each chart.

    The runs are ``folder/base`` and ``folder/lora``. Both hold `ACCURACY_TAG` (percent; the step is
    the epoch, from 1) and `LOSS_TAG` (mean of each window; the step is the optimizer step at its
    end). Writing again replaces the files of the last time, and no other.

    Args:
        results: The results of a run.
        folder: TensorBoard's log folder.

    Returns:
        The event files, base first.

    Raises:
        ImportError: If tensorboardX is not installed.
        ValueError: If the results lack a key, or have another number of losses than of windows.
    """
    check_keys(results, CURVE_KEYS)
    curves = {phase: curve_of(results, phase) for phase in PHASES}
    # tensorboardX's record writer, not its SummaryWriter: the latter starts a thread and a queue
    # per run, stays registered until exit, and names its files after the host and the time.
    tensorboardx = import_extra("tensorboardX")
    event_pb2 = import_extra("tensorboardX.proto.event_pb2")
    summary_pb2 = import_extra("tensorboardX.proto.summary_pb2")

    paths = []
    for phase, curve in curves.items():
        path = Path(folder) / phase / "events.out.tfevents.0.jax_lora"
        path.parent.mkdir(parents=True, exist_ok=True)
        points = [
            *((ACCURACY_TAG, *point) for point in zip(curve.epochs, curve.accuracy, strict=True)),
            *((LOSS_TAG, *point) for point in zip(curve.loss_steps, curve.loss, strict=True)),
        ]
        events = [event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2")]
        for tag, step, value in points:
            scalar = summary_pb2.Summary.Value(tag=tag, simple_value=value)
            summary = summary_pb2.Summary(value=[scalar])
            events.append(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))
        with contextlib.closing(tensorboardx.RecordWriter(str(path))) as writer:
            for event in events:
                writer.write(event.SerializeToString())
        paths.append(path)
    return paths
