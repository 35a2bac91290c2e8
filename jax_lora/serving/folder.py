"""A folder of adapters, each of which is loaded when somebody asks for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jax_lora.adapter import Adapter, check_fits
from jax_lora.errors import AdapterError, CheckpointError, ConfigError, near_misses
from jax_lora.io import load_adapter
from jax_lora.peft import load as load_peft

_PEFT_CONFIG = "adapter_config.json"


class AdapterFolder:
    """Adapters in the folders of one folder, by their names: checkpoints, or what PEFT wrote.

    Args:
        root: The folder. It is read again at every call, so that adapters may come and go.
        params: The base parameters that all adapters are for.
        names: What torch calls each parameter, as rules, for `jax_lora.peft.load`; without them,
            folders of PEFT cannot be read.
        layouts: The roles of the parameters' axes, for `jax_lora.peft.load`.

    Raises:
        CheckpointError: There is no such folder.
        ConfigError: Names without layouts, or the reverse.

    Example:
        >>> import pathlib, tempfile
        >>> import jax, jax.numpy as jnp, jax_lora as jl
        >>> model = lambda params, x: x @ params["w"]
        >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
        >>> plan = jl.plan(model, params, x, config=jl.LoraConfig(rank=2))
        >>> root = pathlib.Path(tempfile.mkdtemp())
        >>> jl.io.save_adapter(root / "french", jl.init(jax.random.key(0), params, plan))
        >>> folder = jl.serving.AdapterFolder(root, params)
        >>> list(folder), folder("french")["w"].rank
        (['french'], 2)
    """

    def __init__(
        self,
        root: str | Path,
        params: Any,
        names: Iterable[Any] | None = None,
        layouts: Mapping[str, Any] | None = None,
    ):
        self._root, self._params = Path(root).expanduser(), params
        if (names is None) != (layouts is None):
            raise ConfigError("expected names and layouts, or none of them, got one")
        self._names = None if names is None else list(names)
        self._layouts = layouts
        if not self._root.is_dir():
            raise CheckpointError(f"{root}: expected a folder of adapters, found none")

    def __iter__(self) -> Iterator[str]:
        """The names of all adapters in it.

        Raises:
            CheckpointError: The folder is gone.
        """
        if not self._root.is_dir():
            raise CheckpointError(f"{self._root}: expected a folder of adapters, found none")
        return iter(sorted(p.name for p in self._root.iterdir() if p.is_dir()))

    def __call__(self, name: str) -> Adapter:
        """Load an adapter.

        Args:
            name: The name of its folder.

        Raises:
            AdapterError: There is none of this name, with the nearest names; or it does not fit
                the parameters.
            CheckpointError: It is damaged, or PEFT wrote it and there are no names for it.
        """
        # A name is no path: ".." and the like lead nowhere.
        if name not in list(self):
            near = near_misses(str(name), self)
            raise AdapterError(f"{self._root}: no adapter {name!r} ({near})")
        folder = self._root / name
        if not (folder / _PEFT_CONFIG).exists():
            adapter, _, _ = load_adapter(folder, self._params)
            return adapter
        if self._names is None or self._layouts is None:
            raise CheckpointError(
                f"{folder}: PEFT wrote this adapter; expected names and layouts, got none"
            )
        adapter = load_peft(folder, self._params, self._names, self._layouts).adapter
        check_fits(self._params, adapter)
        return adapter
