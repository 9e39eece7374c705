"""The library that owns the registered ops `torch.ops.fastprompt.*`."""

from collections.abc import Callable
from typing import Any

import torch

library = torch.library.Library("fastprompt", "DEF")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers an op for every device, with its shapes."""
    name = schema[: schema.index("(")]
    library.define(schema)
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastprompt::{name}", fake, lib=library)


def differentiate(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Gives a registered op its gradients."""
    torch.library.register_autograd(f"fastprompt::{name}", backward, setup_context=setup_context, lib=library)
