"""`replace_attention`: the delayed cache under a user's own denoising loop, on the live model, with undo.

A call `model(x)` of a patched model goes down this file: `_forward`, which `replace_attention` puts on the model, asks
`Patch.check` whether a cache can serve the call. `Patch.logits` then takes it as the next step of a `Session`, or
starts a new one. Calls that no cache can serve run the model's own forward.
"""

import functools
import inspect
import time
import types
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dkv.first_call import FirstCall, Uncached
from dkv.guard import check_containers
from dkv.inputs import one_of, stacklevel, whole
from dkv.kernels import checks
from dkv.memory import memory_of, separate
from dkv.models import check_not_wrapped, view_of
from dkv.models.view import ModelView
from dkv.policy import Decode, NoCache, Policy, PolicyName, checked_policy
from dkv.sessions import PatchStats, sessions_of

AnyModel = TypeVar("AnyModel", bound=nn.Module)
# a session serves these arguments; any other asks for more than logits, or changes them in a way no cache knows
_SERVED = ("input_ids", "attention_mask", "position_ids", "return_dict")
# arguments that are taken from the config if they are None
_FROM_CONFIG = ("output_attentions", "output_hidden_states")
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def replace_attention(
    model: AnyModel,
    policy: Policy | PolicyName | None = None,
    *,
    block_length: int | None = None,
    impl: checks.Impl = "auto",
) -> AnyModel:
    """Replaces `model.forward` on this instance by one with a delayed K/V cache; the default policy is almost lossless.

    The model's own denoising loop, or yours, runs unchanged and recomputes less: `model(x, ...)` keeps its signature
    and return type. Each call is compared with the last ones of up to four sequences, or batches of them, that the loop
    decodes in turn. It is a cached step if shape and attention mask are the same as there and nothing changed except
    masks that became tokens. Anything else is a full step and begins a new session; a changed weight ends all sessions.
    Logits of positions that were not recomputed are NaN. Steps run in the model's dtype, even under autocast.

    Calls that no cache can serve run the model's own forward and end all sessions: in training mode; in grad mode; for
    more than logits; with an attention mask that does more than hide columns; with positions outside the model's range.
    A UserWarning tells each reason once, except training. With `NoCache` every call runs the model's own forward, whose
    logits are exact bit for bit, as likelihoods need them.

    torch.compile leaves a patched model uncompiled; with fullgraph=True that is an error.

    Args:
        model: a LLaDA or Dream of `dkv.from_pretrained` or of Hugging Face's remote code, or a finetune of those.
        policy: a `dkv.Policy`, or the name of one for its default settings. None: `dkv.Decode()`. `Greedy` works only
            in `dkv.generate`.
        block_length: the block length of the loop. Blocks are counted from the first mask of a row, in the row where it
            comes last. None: one block.
        impl: "auto", "triton" or "reference", see `dkv.kernels`.

    Returns:
        model.

    Raises:
        ValueError: an unsupported model, or a policy that cannot run under a foreign loop. Calls raise it for hooks
            that the cache would skip, and RuntimeError after a loop has taken tokens from logits that are NaN or, if
            the policy computes the current block alone, has put tokens behind it before its end.
        RuntimeError: as in `reset`, if the model was patched already; it is patched anew all the same.

    Example:
        >>> dkv.replace_attention(model, dkv.Decode(8), block_length=32)
        >>> out = generate(model, prompt, gen_length=128, block_length=32)  # LLaDA's own generate.py
    """
    if hasattr(model, "_orig_mod"):
        raise ValueError("the model is compiled: pass the one that torch.compile was given, model._orig_mod.")
    view = view_of(model)
    policy = Decode() if policy is None else checked_policy("policy", policy)
    policy.check(view.family.shifted)
    if policy.needs_order:
        raise ValueError(
            f"{policy!r} must know which masks a step will decode, but a foreign loop does not say; use dkv.generate."
        )
    if policy.needs_blocks and block_length is None:
        raise ValueError(f"{policy!r} depends on blocks: pass the block_length of your loop.")
    block_length = None if block_length is None else whole("block_length", block_length, minimum=1)
    one_of("impl", impl, checks.IMPLS)
    told = None
    try:
        restore_attention(model)
    except RuntimeError as error:  # of the loop before
        told = error
    before = {name: model.__dict__[name] for name in ("forward", "extra_repr") if name in model.__dict__}
    model._dkv = Patch(view, policy, block_length, impl, before, inspect.signature(model.forward))
    # the model is an argument, so that a copied or unpickled model is a patched model of its own
    model.forward = functools.partial(_forward, model)
    model.forward.__signature__ = model._dkv.signature
    model.extra_repr = functools.partial(_extra_repr, model)
    if told is not None:
        raise told
    return model


def restore_attention(model: AnyModel) -> AnyModel:
    """Undoes `replace_attention` completely, and gives merged weights their own memory again. Returns model.

    Raises:
        ValueError: model.forward was replaced again later, or the model only wraps a patched one.
        RuntimeError: as in `reset`, after everything was undone.
    """
    patch = _patch_of(model)
    if patch is not None:
        forward = model.__dict__.get("forward")
        if forward is not None and getattr(forward, "func", None) is not _forward:
            raise ValueError(f"model.forward was replaced after replace_attention, by {forward!r}: undo that first.")
        for name in ("forward", "extra_repr", "_dkv"):
            model.__dict__.pop(name, None)
        model.__dict__.update(patch.before)
    try:
        _forget(model)
    finally:
        memory_of(model).take("sessions")
        separate(model)
    return model


def reset(model: nn.Module) -> None:
    """Frees the memory of a model's sessions and of its last `generate`; a patched model's next call is a full step.

    Raises:
        ValueError: an unsupported model, or one that only wraps another.
        RuntimeError: a loop has put tokens from logits that are NaN into its last input, in place; told once.
    """
    _patch_of(model)
    view_of(model)
    _forget(model)


def stats(model: nn.Module) -> PatchStats:
    """What the calls of a patched model did: how many were cached, which were not, and why. Waits for the GPU.

    Returns:
        `PatchStats`: full, cached, original (reason -> calls that ran the model's own forward), calls (all of them),
        cache_ratio and seconds.

    Raises:
        ValueError: the model is not patched.
        RuntimeError: as in `reset`.
    """
    if _patch_of(model) is None:
        raise ValueError("stats needs a model of dkv.replace_attention; dkv.generate returns its own as output.stats.")
    sessions_of(model).check()
    return sessions_of(model).stats()


def _forget(model):
    memory_of(model).take("run")
    model.__dict__.pop("_kept", None)  # a native model's view, which keeps modules alive
    sessions = memory_of(model).sessions
    if sessions is not None:
        try:
            sessions.end()
        finally:
            sessions.past.clear()


def _patch_of(model):
    """The `Patch` of a model, or None."""
    check_not_wrapped(model)
    patch = model.__dict__.get("_dkv")
    if patch is None and hasattr(model, "_dkv"):
        raise ValueError("the model is compiled: pass the patched one, model._orig_mod.")
    return patch


@torch._disable_dynamo
def _forward(model, *args, **kwargs):
    """Takes the place of `model.forward`: serves a call from the cache or, where none can, by the original forward."""
    start, patch, sessions = time.perf_counter(), model._dkv, sessions_of(model)
    original = patch.before.get("forward") or types.MethodType(type(model).forward, model)
    reason, warns = None, False
    if type(patch.policy) is NoCache:
        reason = "the policy is NoCache()"
    elif model.training:
        reason = "the model is in training mode"
    else:
        arguments = patch.signature.bind(*args, **kwargs).arguments
        try:
            patch.check(model, arguments)
            with torch.autocast(arguments["input_ids"].device.type, enabled=False):
                logits = patch.logits(model, arguments)
            output = patch.output(model, arguments, logits)
        except Uncached as why:
            reason, warns = str(why), True
    if reason is not None:
        sessions.end()
        output = original(*args, **kwargs)
    if sessions.count(time.perf_counter() - start, reason) == 1 and warns:
        warnings.warn(
            f"a patched {type(model).__name__} ran its own forward, without the cache, as it will whenever {reason}.",
            stacklevel=stacklevel(),
        )
    return output


def _extra_repr(model):
    patch = model._dkv
    own = patch.before["extra_repr"]() if "extra_repr" in patch.before else type(model).extra_repr(model)
    blocks = "" if patch.block_length is None else f", block_length={patch.block_length}"
    found, calls = sessions_of(model).stats(), ""
    if found.calls:
        original = sum(found.original.values())
        calls = f", calls: {found.full} full, {found.cached} cached, {original} original"
    return ", ".join(filter(None, (own, f"dkv={patch.policy!r}{blocks}{calls}")))


class Patch:
    """The settings of `replace_attention`, kept on the model, and the attributes that it replaced.

    Attributes:
        policy, block_length, impl: the arguments of `replace_attention`.
        before: the instance's own `forward` and `extra_repr`, if it had any.
        signature: of the replaced forward.
        make_output, honours_mask, shifted: as in `ModelView` and `Family`.
    """

    def __init__(
        self,
        view: ModelView,
        policy: Policy,
        block_length: int | None,
        impl: checks.Impl,
        before: dict[str, Callable],
        signature: inspect.Signature,
    ) -> None:
        self.policy, self.block_length, self.impl = policy, block_length, impl
        self.before, self.signature = before, signature
        self.make_output, self.honours_mask = view.make_output, view.honours_attention_mask
        self.shifted = view.family.shifted

    def check(self, model: nn.Module, arguments: dict[str, Any]) -> None:
        """Raises `Uncached` for a call whose arguments or shapes no session serves; reads nothing from the device."""
        if torch.is_grad_enabled():
            raise Uncached("grad mode is on (torch.no_grad() turns it off)")
        parameters = self.signature.parameters
        for name, value in arguments.items():
            if name not in _SERVED and not _is_off(value, parameters[name].default):
                raise Uncached(f"{name} is passed")
        for name in _FROM_CONFIG:
            if name in parameters and arguments.get(name) is None and getattr(model.config, name, False):
                raise Uncached(f"config.{name} is set")
        x = arguments.get("input_ids")
        if not (isinstance(x, Tensor) and x.dim() == 2 and x.numel() and x.dtype in (torch.int32, torch.int64)):
            raise Uncached("input_ids is not a non-empty (batch, seqlen) tensor of int32 or int64")
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        if self.honours_mask and not self._may_be_padding(mask, x):
            raise Uncached(Uncached.MASK)
        if positions is not None and not (
            isinstance(positions, Tensor)
            and positions.dtype in _INTEGERS
            and positions.device == x.device
            and positions.shape in (x.shape, (1, x.shape[1]))
        ):
            raise Uncached(Uncached.POSITIONS)

    def _may_be_padding(self, mask, x):
        if mask is None or (self.shifted and isinstance(mask, str) and mask == "full"):
            return True
        if not isinstance(mask, Tensor) or mask.device != x.device:
            return False
        # LLaDA's files read zeros and ones of any dtype; Dream's pass the mask to attention, which adds a float mask
        batch, seqlen = x.shape
        if mask.dim() == 2:
            return mask.shape == x.shape and not (self.shifted and mask.is_floating_point())
        shapes = [(rows, 1, queries, seqlen) for rows in (1, batch) for queries in (1, seqlen)]
        return self.shifted and mask.shape in shapes and (mask.dtype == torch.bool or mask.is_floating_point())

    def logits(self, model: nn.Module, arguments: dict[str, Any]) -> Tensor:
        """The logits by the next step of the session, or by a new session; raises `Uncached` if none can serve them."""
        x, mask, positions = map(arguments.get, ("input_ids", "attention_mask", "position_ids"))
        mask = mask if isinstance(mask, Tensor) else None
        sessions = sessions_of(model)
        session = sessions.next_step(x, mask, positions)
        if session is not None:
            session.step(x)
        else:
            view = view_of(model)
            check_containers(model, view.called, runs_forward=True)
            first_call = FirstCall.read(view, x, mask, positions)
            session = sessions.begin(model, view, first_call, self.policy, self.block_length, self.impl)
        logits = session.logits()
        sessions.put(session)
        return logits

    def output(self, model: nn.Module, arguments: dict[str, Any], logits: Tensor) -> Any:
        """The logits in the type that the model's own forward returns."""
        return_dict = arguments.get("return_dict")
        if return_dict is None and "return_dict" in self.signature.parameters:
            config = model.config
            return_dict = getattr(config, "return_dict", True) and not getattr(config, "torchscript", False)
        asks_for_tuple = return_dict is not None and not return_dict
        return self.make_output(logits, return_dict=not asks_for_tuple)


def _is_off(value, default):
    """Whether an argument means the same as leaving it out."""
    if value is None:
        return not default
    return value is default or (isinstance(value, bool | int | float | str) and value == (default or 0))
