"""The walk over a jaxpr that keeps adapted weights factored; one file per family of primitives."""

from jax_lora.interpreter import contraction, control, lookup, structural
from jax_lora.interpreter.core import RULES, Event, Interpreter

__all__ = ["RULES", "Event", "Interpreter", "contraction", "control", "lookup", "structural"]
