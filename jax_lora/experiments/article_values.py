"""What the article printed, in the shape of a results dict (see `jax_lora.report`).

Every number was read from the output printed in "Road to Efficient LLMs: LoRA", whose experiment
`jax_lora.experiments` repeats. Nothing here was measured by this repository.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

ARTICLE: Final[Mapping[str, Any]] = {
    "name": "article",
    "dataset": "cifar10",
    # Not printed as such: 50,000 training images in batches of 32, the last one of 16.
    "steps_per_epoch": 1563,
    # Read from its training loop and from the steps in its printed lines: [1, 500], [1, 1000], ...
    "loss_window": 500,
    "base": {
        # Read from "Total params: 411,146" above the pre-training.
        "params": 411_146,
        # Read from "Accuracy of the network on the 10000 test images: 38 %", one line per epoch.
        "accuracy": (0.38, 0.44, 0.47, 0.49, 0.49),
        # Read from "[epoch, step] loss: ...", three lines per epoch.
        "loss": (
            *(2.150, 1.900, 1.770),
            *(1.697, 1.628, 1.613),
            *(1.565, 1.534, 1.512),
            *(1.474, 1.461, 1.450),
            *(1.400, 1.415, 1.381),
        ),
        # Read from the foot of the first torchinfo table. The multiply-adds are millions for a
        # batch of 32 (its "Units.MEGABYTES" is a count); the sizes are megabytes of 10^6 bytes.
        "summary": {
            "total mult-adds (M)": 13.16,
            "input size (MB)": 0.39,
            "forward/backward pass size (MB)": 0.07,
            "params size (MB)": 1.64,
            "estimated total size (MB)": 2.11,
        },
    },
    "lora": {
        # Read from its call CifarLoRAModel(..., rank=32, alpha=1).
        "rank": 32,
        "alpha": 1.0,
        # Read from the foot of the second torchinfo table.
        "trainable_params": 115_008,
        "total_params": 526_154,
        # Read from the accuracy lines of the fine-tuning.
        "accuracy": (0.50, 0.50, 0.50, 0.51, 0.51),
        # Read from the loss lines of the fine-tuning.
        "loss": (
            *(1.341, 1.325, 1.328),
            *(1.316, 1.312, 1.315),
            *(1.300, 1.296, 1.317),
            *(1.285, 1.305, 1.290),
            *(1.287, 1.291, 1.283),
        ),
        # Read from the foot of the second torchinfo table. It prints the base model's
        # multiply-adds again: 32 x 411,146 = 13.16 M, so the adapter's products are not in it.
        "summary": {
            "total mult-adds (M)": 13.16,
            "input size (MB)": 0.39,
            "forward/backward pass size (MB)": 0.14,
            "params size (MB)": 2.10,
            "estimated total size (MB)": 2.63,
        },
    },
    # How far a comparison can go.
    "precision": "accuracies are printed in whole per cent, and one run of each phase is printed",
}
