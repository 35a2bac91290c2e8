"""The programs beside ours, each in its own file: what one would use instead of jax_lora.

A file has a function `subject` that takes a `Task` and returns what the step benchmark measures.
What it imports need not be installed: its row then says what to install.
"""

#: By the name in the tables, the module, in the order in which the tables show them.
STEP_PROGRAMS = {
    "jax_lora": "ours",
    "by hand": "by_hand",
    "weight-space": "weight_space",
    "jax_lora on linen": "ours_linen",
    "qwix on linen": "qwix_linen",
    "jax_lora on NNX": "ours_nnx",
    "qwix on NNX": "qwix_nnx",
    "nnx.LoRA": "nnx_lora",
    "PEFT": "torch_peft",
    "PEFT, torch.compile": "torch_peft_compiled",
    "loralib": "torch_loralib",
}
