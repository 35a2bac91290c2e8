"""The article's CIFAR-10 LoRA experiment in PyTorch, on the CPU: the peer we are compared with.

A 3072-128-128-10 network is trained with SGD, saved, loaded into the same network with a rank-32
adapter beside every layer, and trained again with the base frozen. Three variants:

* ``article``: the article's program. A `DataLoader` with two worker processes turns one PIL image
  at a time into a tensor, the loss is read back after every step, `A @ B` is formed at every
  forward pass.
* ``in_memory``: the same mathematics as fast as we could make eager PyTorch do it. The images are
  normalised once, batches are gathered from an epoch's permutation, the loss is read once per
  epoch, the adapter is applied as `(x @ A) @ B`, the SGD is fused, and the test set is one batch.
* ``compiled``: the same with the model through `torch.compile`.

Two things the article's program does are absent, both in PyTorch's favour: it downloads the data,
and it writes one TensorBoard scalar per epoch. torchvision is not needed: `CifarDataset` does per
item what its dataset and transforms do.

The data are one `.npz` file, or a folder of `.npy` files, with the arrays `train_images`,
`train_labels`, `test_images` and `test_labels`; images are uint8 `[n, 32, 32, 3]`.

Usage:
    python -m benchmarks.peers.article_pytorch --data cifar10.npz --out results.json
    python -m benchmarks.peers.article_pytorch --data cifar10.npz --out r.json --variant in_memory

`--out` receives, for each of `base` and `lora`: `accuracy`, the fraction of test images that are
right after each epoch; `loss`, the mean of each 500 steps in the order printed; `epoch_loss`, the
mean over each epoch; and `seconds`. `seconds_total` spans the training work (both phases, from
preparing the dataset to the last evaluation); `seconds_process` also counts the imports and the
reading of the arrays. The trained weights are written beside it, as `.pth`.
"""

import time

# Read before the heavy imports, so that `seconds_process` counts them too.
_LOADED_AT = time.perf_counter()

# RUF100 for the rule sets that have no E402 to be excused from.
# ruff: noqa: E402, RUF100
import argparse
import json
import math
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu
from torch.utils.data import DataLoader, Dataset

HIDDEN_DIM = 128
NUM_CLASSES = 10
RANK = 32
ALPHA = 1
BATCH_SIZE = 32
LEARNING_RATE = 0.001
MOMENTUM = 0.9
WORKERS = 2
LOG_EVERY = 500
VARIANTS = ("article", "in_memory", "compiled")

Batch = tuple[Tensor, Tensor]


class Arrays(NamedTuple):
    """CIFAR-10 in memory: images uint8 `[n, 32, 32, 3]`, labels integer `[n]`."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_arrays(path: str | Path) -> Arrays:
    """Reads the four arrays from an `.npz` file or from a folder of `.npy` files.

    Args:
        path: The file or the folder.

    Returns:
        The arrays, as stored.

    Raises:
        FileNotFoundError: If `path` is neither.
        ValueError: If an array is missing or has an unexpected shape or dtype; names all of them.
    """
    path = Path(path)
    found: dict[str, np.ndarray] = {}
    if path.is_dir():
        files = {name: path / f"{name}.npy" for name in Arrays._fields}
        found = {name: np.load(file) for name, file in files.items() if file.exists()}
    elif path.is_file():
        with np.load(path) as archive:
            found = {name: archive[name] for name in Arrays._fields if name in archive}
    else:
        raise FileNotFoundError(f"expected an .npz file or a folder of .npy files, got {path}")

    problems = [
        f"{name}: expected an array, got none" for name in Arrays._fields if name not in found
    ]
    for name, array in found.items():
        if name.endswith("_images"):
            if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != (32, 32, 3):
                problems.append(
                    f"{name}: expected uint8 [n, 32, 32, 3], got {array.dtype} {list(array.shape)}"
                )
            continue
        images = found.get(name.replace("_labels", "_images"))
        n = len(array) if images is None else len(images)
        if array.dtype.kind not in "iu" or array.shape != (n,):
            problems.append(f"{name}: expected int [{n}], got {array.dtype} {list(array.shape)}")
    if problems:
        raise ValueError(f"{path}:\n  " + "\n  ".join(problems))
    return Arrays(**found)


def to_tensor(image: Image.Image) -> Tensor:
    """PIL image to float32 `[3, height, width]` in [0, 1], by torchvision's sequence of operations.

    The copy, the permute-then-contiguous and the separate division are kept because they are what
    the article's program spends its time on.
    """
    tensor = torch.from_numpy(np.array(image, np.uint8, copy=True))
    tensor = tensor.view(image.size[1], image.size[0], len(image.getbands()))
    return tensor.permute((2, 0, 1)).contiguous().to(dtype=torch.get_default_dtype()).div(255)


def normalize(tensor: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`(tensor - mean) / std` per channel of `[c, h, w]`, by torchvision's sequence of operations.

    Mean and standard deviation become tensors anew for every image, as they do there.
    """
    tensor = tensor.clone()
    mean_c = torch.as_tensor(mean, dtype=tensor.dtype, device=tensor.device)
    std_c = torch.as_tensor(std, dtype=tensor.dtype, device=tensor.device)
    if (std_c == 0).any():
        raise ValueError(f"expected a non-zero std in every channel, got {list(std)}")
    return tensor.sub_(mean_c.view(-1, 1, 1)).div_(std_c.view(-1, 1, 1))


class CifarDataset(Dataset[tuple[Tensor, int]]):
    """What torchvision's `CIFAR10` with `ToTensor` and `Normalize(0.5, 0.5)` gives, item by item.

    Args:
        images: uint8 `[n, 32, 32, 3]`.
        labels: integer `[n]`.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.data = images
        self.targets: list[int] = labels.tolist()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.data[index])
        return normalize(to_tensor(image), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), self.targets[index]

    def __len__(self) -> int:
        return len(self.data)


class CifarModel(nn.Module):
    """Three linear layers with ReLU between them, initialised by PyTorch's default."""

    def __init__(self, hidden_dim: int = HIDDEN_DIM, num_classes: int = NUM_CLASSES) -> None:
        super().__init__()
        self.l1 = nn.Linear(32 * 32 * 3, hidden_dim)
        self.l2 = nn.Linear(hidden_dim, hidden_dim)
        self.l3 = nn.Linear(hidden_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[n, 3, 32, 32]` (or already flat `[n, 3072]`) to logits `[n, num_classes]`."""
        x = torch.flatten(x, start_dim=1)
        x = relu(self.l1(x))
        x = relu(self.l2(x))
        return self.l3(x)


class LoRALinear(nn.Module):
    """The article's adapter of one layer: `x @ (A @ B)`, with A `[in, rank]`, B `[rank, out]` zero.

    `kaiming_uniform_` takes the fan-in from dimension 1, which here is the rank: A is uniform in
    ±1/√rank, not ±1/√in. The article also stores alpha/rank as `scaling` and never uses it; the
    model multiplies by alpha instead.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        rank: Inner width of the adapter.
        factored: Compute `(x @ A) @ B` instead, which is the same up to rounding and much cheaper.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, factored: bool = False
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(in_features, rank))
        self.B = nn.Parameter(torch.empty(rank, out_features))
        self.factored = factored
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, in]` to the adapter's unscaled contribution `[n, out]`."""
        if self.factored:
            return (x @ self.A) @ self.B
        return x @ (self.A @ self.B)


class CifarLoRAModel(CifarModel):
    """`CifarModel` with its weights frozen and an adapter, times alpha, beside every layer."""

    def __init__(
        self,
        hidden_dim: int = HIDDEN_DIM,
        num_classes: int = NUM_CLASSES,
        rank: int = RANK,
        alpha: float = ALPHA,
        factored: bool = False,
    ) -> None:
        super().__init__(hidden_dim, num_classes)
        self.alpha = alpha
        # Before the adapters exist, so that it freezes the base only.
        for parameter in self.parameters():
            parameter.requires_grad = False
        self.l1_lora = LoRALinear(32 * 32 * 3, hidden_dim, rank, factored)
        self.l2_lora = LoRALinear(hidden_dim, hidden_dim, rank, factored)
        self.l3_lora = LoRALinear(hidden_dim, num_classes, rank, factored)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[n, 3, 32, 32]` (or already flat `[n, 3072]`) to logits `[n, num_classes]`."""
        x = torch.flatten(x, start_dim=1)
        x = relu(self.l1(x) + self.alpha * self.l1_lora(x))
        x = relu(self.l2(x) + self.alpha * self.l2_lora(x))
        return self.l3(x) + self.alpha * self.l3_lora(x)


def build_base_model() -> CifarModel:
    """A freshly initialised base of the article's sizes."""
    return CifarModel()


def build_lora_model(base_state: dict[str, Tensor], factored: bool = False) -> CifarLoRAModel:
    """The article's LoRA model over trained base weights (copied in, frozen).

    Args:
        base_state: `state_dict` of a `CifarModel`.
        factored: See `LoRALinear`.
    """
    model = CifarLoRAModel(factored=factored)
    # Not strict: the adapters have no counterpart in the base's weights.
    model.load_state_dict(base_state, strict=False)
    return model


def build_optimizer(model: nn.Module, fused: bool = False) -> torch.optim.SGD:
    """The article's SGD over *all* parameters; frozen ones get no gradient and are passed over."""
    # None, not False, is what an SGD built without the option has.
    return torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, fused=fused or None
    )


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor
) -> Tensor:
    """One step of SGD on the mean cross-entropy of one batch; returns the loss before it."""
    optimizer.zero_grad()
    loss = cross_entropy(model(inputs), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def train_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Batch]
) -> list[float]:
    """Trains on the batches in turn, reading the loss back after each, as the article does.

    Args:
        model: Updated in place.
        optimizer: The one built for `model`.
        batches: Pairs of inputs `[n, 3, 32, 32]` or `[n, 3072]` and int64 labels `[n]`.

    Returns:
        The loss of each step, taken before its update.
    """
    return [train_step(model, optimizer, inputs, labels).item() for inputs, labels in batches]


@dataclass
class Phase:
    """What one phase (pre-training or LoRA) gave."""

    accuracy: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    epoch_loss: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def record(self, losses: Sequence[float], accuracy: float) -> None:
        """Adds an epoch and prints it: each full 500 steps, as in the article, and the accuracy."""
        epoch = len(self.accuracy) + 1
        for stop in range(LOG_EVERY, len(losses) + 1, LOG_EVERY):
            self.loss.append(sum(losses[stop - LOG_EVERY : stop]) / LOG_EVERY)
            print(f"[{epoch}, {stop:5d}] loss: {self.loss[-1]:.3f}")
        self.epoch_loss.append(sum(losses) / len(losses))
        self.accuracy.append(accuracy)
        print(f"Accuracy on the test images: {100 * accuracy:.2f} %", flush=True)


class ArticleRun:
    """The article's way to train an epoch and to evaluate: a `DataLoader` over PIL images."""

    factored = False
    fused = False
    compiled = False

    def __init__(self, arrays: Arrays) -> None:
        self.train_loader = DataLoader(
            CifarDataset(arrays.train_images, arrays.train_labels),
            batch_size=BATCH_SIZE,
            shuffle=True,
            num_workers=WORKERS,
        )
        self.test_loader = DataLoader(
            CifarDataset(arrays.test_images, arrays.test_labels),
            batch_size=BATCH_SIZE,
            shuffle=False,
            num_workers=WORKERS,
        )

    def epoch(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        """One epoch of training; returns the loss of each step."""
        return train_steps(model, optimizer, self.train_loader)

    def accuracy(self, model: nn.Module) -> float:
        """Fraction of the test images that are right."""
        correct = total = 0
        with torch.no_grad():
            for images, labels in self.test_loader:
                predicted = model(images).argmax(dim=1)
                total += labels.size(0)
                correct += (predicted == labels).sum().item()
        return correct / total


class InMemoryRun:
    """The strongest eager form we found: resident tensors, nothing read back within an epoch."""

    factored = True
    fused = True

    def __init__(self, arrays: Arrays, compiled: bool = False) -> None:
        self.compiled = compiled
        self.train_images, self.train_labels = self._resident(
            arrays.train_images, arrays.train_labels
        )
        self.test_images, self.test_labels = self._resident(arrays.test_images, arrays.test_labels)

    @staticmethod
    def _resident(images: np.ndarray, labels: np.ndarray) -> Batch:
        """Images to float32 `[n, 3072]` in channel-first order, x/127.5 - 1; labels to int64."""
        channels_first = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)
        x = torch.from_numpy(channels_first).float().div_(127.5).sub_(1)
        return x, torch.from_numpy(labels.astype(np.int64))

    def batches(self) -> Iterator[Batch]:
        """An epoch's batches in a fresh order, the last one short where 32 does not divide."""
        # Gathering each batch beats shuffling the whole epoch at once: 32 rows stay in cache,
        # 600 MB do not.
        for index in torch.randperm(len(self.train_labels)).split(BATCH_SIZE):
            yield self.train_images.index_select(0, index), self.train_labels.index_select(0, index)

    def epoch(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        """One epoch of training; returns the loss of each step, read back once at the end."""
        return torch.stack([train_step(model, optimizer, x, y) for x, y in self.batches()]).tolist()

    def accuracy(self, model: nn.Module) -> float:
        """Fraction of the test images that are right."""
        with torch.inference_mode():
            predicted = model(self.test_images).argmax(dim=1)
            return (predicted == self.test_labels).float().mean().item()


def train(run: ArticleRun | InMemoryRun, model: nn.Module, epochs: int) -> Phase:
    """Trains with a fresh optimizer and evaluates after each epoch; the caller times it."""
    phase = Phase()
    optimizer = build_optimizer(model, fused=run.fused)
    if run.compiled:
        model = torch.compile(model)  # shares its parameters
    for _ in range(epochs):
        losses = run.epoch(model, optimizer)
        phase.record(losses, run.accuracy(model))
    return phase


def run_experiment(arrays: Arrays, variant: str, epochs: int, checkpoint: Path) -> dict[str, Any]:
    """Pre-trains, saves, loads into the LoRA model, trains that.

    Args:
        arrays: The data.
        variant: One of `VARIANTS`.
        epochs: Epochs of each of the two phases.
        checkpoint: Where the base weights are saved and read back.

    Returns:
        `base` and `lora` (see the module's docstring) and `seconds_total`.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    started = time.perf_counter()
    # The in-memory variants pay here for their normalised images, so the timer runs already.
    run: ArticleRun | InMemoryRun
    if variant == "article":
        run = ArticleRun(arrays)
    else:
        run = InMemoryRun(arrays, compiled=variant == "compiled")
    base_model = build_base_model()
    base = train(run, base_model, epochs)
    base.seconds = time.perf_counter() - started

    torch.save(base_model.state_dict(), checkpoint)
    print("LoRA:")
    lora_started = time.perf_counter()
    lora_model = build_lora_model(torch.load(checkpoint), factored=run.factored)
    lora = train(run, lora_model, epochs)
    ended = time.perf_counter()
    lora.seconds = ended - lora_started
    return {"base": asdict(base), "lora": asdict(lora), "seconds_total": ended - started}


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, from `argv` or from `sys.argv`."""
    parser = argparse.ArgumentParser(
        description="The article's CIFAR-10 LoRA experiment in PyTorch, on the CPU."
    )
    parser.add_argument(
        "--data", type=Path, required=True, help=".npz file or folder of .npy files"
    )
    parser.add_argument("--out", type=Path, required=True, help="results, JSON")
    parser.add_argument("--epochs", type=_positive, default=5, help="epochs of each phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", choices=VARIANTS, default="article")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the experiment, prints its course, writes the results to `--out` and returns them."""
    args = parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    about = {
        "variant": args.variant,
        "epochs": args.epochs,
        "seed": args.seed,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print("expected after 5 + 5 epochs, by the article: 49 % for the base, 51 % with LoRA")
    results = run_experiment(
        load_arrays(args.data), args.variant, args.epochs, args.out.with_suffix(".pth")
    )
    results |= {"seconds_process": time.perf_counter() - _LOADED_AT, **about}
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    print(
        f"got {100 * results['base']['accuracy'][-1]:.2f} % for the base and "
        f"{100 * results['lora']['accuracy'][-1]:.2f} % with LoRA in "
        f"{results['base']['seconds']:.1f} + {results['lora']['seconds']:.1f} s; "
        f"whole process {results['seconds_process']:.1f} s"
    )
    return results


if __name__ == "__main__":
    main()
