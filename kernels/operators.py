"""`operator`: makes one custom operator of PyTorch from the launcher of a kernel and its PyTorch twin."""

import inspect
from collections.abc import Callable, Sequence
from types import UnionType
from typing import Any

import torch
from torch import Tensor

from dkv.kernels.checks import float_and_tensor
from dkv.kernels.reference import DeferredNorm

# parameters of launchers for a run of dkv, a sweep or a test; the operators do not have them
INTERNAL = ("config", "counters", "semaphores")
EITHER = (float | Tensor, float | Tensor | None)
# types that PyTorch's schemas do not know, and those that stand for them there
TRANSLATED = {DeferredNorm: Sequence[Tensor]} | dict.fromkeys(EITHER, float | None)


def operator(
    name: str,
    launch: Callable[..., Any],
    twin: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    mutates: Sequence[str] = (),
) -> Callable[..., Any]:
    """Registers the custom operator `dkv::name`, and returns the function `call(*, impl, **arguments)`.

    `call` runs the launcher (impl "triton") or the twin ("reference"). It uses the registered operator only while
    torch.compile traces, because dispatching one costs as much as a small call.

    The operator has the parameters of the launcher, without INTERNAL, and `impl`. PyTorch's schemas do not know three
    types of ours: a `float | Tensor` becomes two parameters, a float in its place and a tensor behind all others, named
    in the plural; a `DeferredNorm` becomes a list of tensors, and so does a result of one tensor or several.

    Args:
        launch: the launcher, annotated.
        twin: has the same parameters.
        fake: has the same parameters; returns empty contiguous tensors in place of the results.
        mutates: names of the tensors that are written in place.
    """
    signature = inspect.signature(launch)
    types = {each.name: each.annotation for each in signature.parameters.values() if each.name not in INTERNAL}
    either = [parameter for parameter, kind in types.items() if kind in EITHER]
    schema = {parameter: TRANSLATED.get(kind, kind) for parameter, kind in types.items()}
    schema |= {parameter + "s": Tensor | None for parameter in either} | {"impl": str}
    returns = signature.return_annotation
    is_list, is_named = isinstance(returns, UnionType), hasattr(returns, "_fields")

    def run(function, values):
        """Calls one of our functions with the values of the schema; its results become contiguous, as `fake` says."""
        arguments = dict(zip(schema, values, strict=True))
        del arguments["impl"]
        for parameter in either:
            tensor = arguments.pop(parameter + "s")
            arguments[parameter] = arguments[parameter] if tensor is None else tensor
        arguments |= {p: DeferredNorm(*arguments[p]) for p, kind in types.items() if kind is DeferredNorm}
        found = function(**arguments)
        found = [each.contiguous() for each in ([found] if isinstance(found, Tensor) else found)]
        return found if is_list else found[0] if returns is Tensor else tuple(found)

    def implementation(*values):
        return run(launch if values[-1] == "triton" else twin, values)

    # PyTorch reads the schema from this signature
    implementation.__signature__ = inspect.Signature(
        [inspect.Parameter(p, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=schema[p]) for p in schema],
        return_annotation=tuple[(Tensor,) * len(returns._fields)] if is_named else list[Tensor] if is_list else returns,
    )
    custom_op = torch.library.custom_op(f"dkv::{name}", implementation, mutates_args=mutates)
    custom_op.register_fake(lambda *values: run(fake, values))
    registered = getattr(torch.ops.dkv, name)

    def call(*, impl, **arguments):
        numbers = {parameter: float_and_tensor(arguments[parameter]) for parameter in either}
        if not torch.compiler.is_compiling():
            for parameter, (number, tensor) in numbers.items():
                arguments[parameter] = number if tensor is None else tensor
            return (launch if impl == "triton" else twin)(**arguments)
        for parameter, pair in numbers.items():
            arguments[parameter], arguments[parameter + "s"] = pair
        found = registered(**arguments, impl=impl)
        if is_list:
            return found[0] if len(found) == 1 else tuple(found)
        return returns(*found) if is_named else found

    return call
