"""One custom operator of PyTorch for the two implementations of a kernel: its launcher and its PyTorch twin."""

import inspect
from collections.abc import Callable, Sequence
from types import UnionType
from typing import Any

import torch
from torch import Tensor

from dkv.kernels.checks import float_and_tensor
from dkv.kernels.reference import DeferredNorm

# launchers take these too, from a run of dkv, a sweep or a test; the operators do not
INTERNAL = ("config", "counters", "semaphores")
EITHER = (float | Tensor, float | Tensor | None)
# annotations that PyTorch's schemas do not know, and what stands for them there
TRANSLATED = {DeferredNorm: Sequence[Tensor]} | dict.fromkeys(EITHER, float | None)


def operator(
    name: str,
    launch: Callable[..., Any],
    twin: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    mutates: Sequence[str] = (),
) -> Callable[..., Any]:
    """Registers the operator `dkv::name` and returns the function that calls it: call(impl=impl, **arguments).

    In eager mode the function calls the launcher or the twin itself: dispatching a custom operator costs as much as a
    small call. While torch.compile traces, it calls the operator.

    Args:
        launch: the launcher, for impl "triton". Its annotations, without INTERNAL, are the schema. A `float | Tensor`
            becomes a float and, behind all other arguments, a tensor; a `DeferredNorm` the list of its tensors; and a
            result that is one tensor or several a list.
        twin: for impl "reference", with the same arguments.
        fake: returns empty contiguous tensors in place of the results, from the same arguments.
        mutates: names of the tensors that are written in place.
    """
    signature = inspect.signature(launch)
    hints = {key: each.annotation for key, each in signature.parameters.items() if key not in INTERNAL}
    either = [key for key, hint in hints.items() if hint in EITHER]
    schema = {key: TRANSLATED.get(hint, hint) for key, hint in hints.items()}
    schema |= {key + "s": Tensor | None for key in either} | {"impl": str}
    returns = signature.return_annotation
    is_list, is_named = isinstance(returns, UnionType), hasattr(returns, "_fields")

    def run(function, values):
        arguments = dict(zip(schema, values, strict=True))
        del arguments["impl"]
        for key in either:
            tensor = arguments.pop(key + "s")
            arguments[key] = arguments[key] if tensor is None else tensor
        arguments |= {key: DeferredNorm(*arguments[key]) for key, hint in hints.items() if hint is DeferredNorm}
        found = function(**arguments)
        found = [each.contiguous() for each in ([found] if isinstance(found, Tensor) else found)]
        return found if is_list else found[0] if returns is Tensor else tuple(found)

    def implementation(*values):
        return run(launch if values[-1] == "triton" else twin, values)

    parameters = [
        inspect.Parameter(key, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=schema[key]) for key in schema
    ]
    result = tuple[(Tensor,) * len(returns._fields)] if is_named else list[Tensor] if is_list else returns
    implementation.__signature__ = inspect.Signature(parameters, return_annotation=result)
    custom_op = torch.library.custom_op(f"dkv::{name}", implementation, mutates_args=mutates)
    custom_op.register_fake(lambda *values: run(fake, values))
    registered = getattr(torch.ops.dkv, name)

    def call(*, impl, **arguments):
        if not torch.compiler.is_compiling():
            return (launch if impl == "triton" else twin)(**arguments)
        for key in either:
            arguments[key], arguments[key + "s"] = float_and_tensor(arguments[key])
        found = registered(**arguments, impl=impl)
        if is_list:
            return found[0] if len(found) == 1 else tuple(found)
        return returns(*found) if is_named else found

    return call
