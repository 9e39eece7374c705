"""The library that owns the registered ops `torch.ops.fastprompt.*`."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import forward_ad

from fastprompt import dispatch

library = torch.library.Library("fastprompt", "DEF")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers an op for every device, with its shapes."""
    name = schema[: schema.index("(")]
    library.define(schema)
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastprompt::{name}", fake, lib=library)


def unobserved(tensors: Iterable[Any]) -> bool:
    """Whether nobody must see a call as an op: no compiler, tracer, profiler, transform, mode or special tensor.

    Such a call without gradients may go straight to its implementation; crossing a registered op costs 10 to 20 us.
    """
    if torch.compiler.is_compiling():
        return False
    watchers = (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._autograd._profiler_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )
    special = [x for x in tensors if x is not None and (type(x) not in _PLAIN or x.is_neg())]
    return not watchers and not special


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def straight(op: str, impl: str, check: Callable[[], None], *args: Any) -> Any:
    """Runs an implementation that refuses what it cannot take, in far less time than `check`, which then says why."""
    try:
        return dispatch.kernels(op, impl).forward(*args)
    except Exception:
        check()
        raise


def differentiate(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Gives a registered op its gradients."""
    torch.library.register_autograd(f"fastprompt::{name}", backward, setup_context=setup_context, lib=library)
