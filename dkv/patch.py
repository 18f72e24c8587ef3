"""`replace_attention`: the delayed cache under a user's own denoising loop, on the live model, with undo.

A call `model(x)` of a patched model goes down this file: `_forward`, which `replace_attention` puts on the model, asks
`Patch.check` whether a cache can serve the call. `Patch.logits` then takes it as the next step of the `Session`, or
starts a new one. Calls that no cache can serve run the model's own forward.
"""

import functools
import inspect
import types
import warnings
from collections import Counter as Tally
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from dkv.active import write_active
from dkv.cuda_graphs import StepGraphs
from dkv.guard import Fingerprint, check_containers
from dkv.inputs import one_of, stacklevel, whole
from dkv.kernels import checks, cpu, reference
from dkv.kernels.rows import Size
from dkv.memory import memory_of, separate
from dkv.model_runner import ModelRunner
from dkv.models import check_not_wrapped, view_of
from dkv.models.view import ModelView
from dkv.policy import Decode, NoCache, Policy, PolicyName, checked_policy
from dkv.rooms import Room, Rooms
from dkv.state import State

AnyModel = TypeVar("AnyModel", bound=nn.Module)
# a session serves these arguments; any other asks for more than logits, or changes them in a way no cache knows
_SERVED = ("input_ids", "attention_mask", "position_ids", "return_dict")
# arguments that are taken from the config if they are None
_FROM_CONFIG = ("output_attentions", "output_hidden_states")
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# a score this low has no weight beside any other; the lowest float32 and bfloat16 and -inf are below it
_MASKED_SCORE = torch.finfo(torch.float16).min


class Uncached(Exception):
    """Raised for a call that must run the model's own forward; the message is the reason."""

    MASK = "attention_mask does more than hide columns"
    POSITIONS = "position_ids are not (batch, seqlen) integers in the model's range"


def replace_attention(
    model: AnyModel,
    policy: Policy | PolicyName | None = None,
    *,
    block_length: int | None = None,
    impl: checks.Impl = "auto",
) -> AnyModel:
    """Replaces `model.forward` on this instance by one with a delayed K/V cache; the default policy is almost lossless.

    The model's own denoising loop, or yours, runs unchanged and recomputes less: `model(x, ...)` keeps its signature
    and return type. Each call is compared with the previous one. It is a cached step if shape and attention mask are
    the same and nothing changed except masks that became tokens. Anything else, even a changed weight, is a full step
    and starts a new session. Logits of positions that were not recomputed are NaN. Steps run in the model's dtype, even
    under autocast.

    Calls that no cache can serve run the model's own forward and end the session: in training mode; in grad mode; for
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
            that the cache would skip, and RuntimeError after a loop has taken tokens from logits that are NaN.

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
    restore_attention(model)
    before = {name: model.__dict__[name] for name in ("forward", "extra_repr") if name in model.__dict__}
    model._dkv = Patch(view, policy, block_length, impl, before, inspect.signature(model.forward))
    # the model is an argument, so that a copied or unpickled model is a patched model of its own
    model.forward = functools.partial(_forward, model)
    model.forward.__signature__ = model._dkv.signature
    model.extra_repr = functools.partial(_extra_repr, model)
    return model


def restore_attention(model: AnyModel) -> AnyModel:
    """Undoes `replace_attention` completely, and gives merged weights their own memory again. Returns model.

    Raises:
        ValueError: model.forward was replaced again later, or the model only wraps a patched one.
    """
    patch = _patch_of(model)
    if patch is not None:
        forward = model.__dict__.get("forward")
        if forward is not None and getattr(forward, "func", None) is not _forward:
            raise ValueError(f"model.forward was replaced after replace_attention, by {forward!r}: undo that first.")
        for name in ("forward", "extra_repr", "_dkv"):
            model.__dict__.pop(name, None)
        model.__dict__.update(patch.before)
    _forget(model)
    separate(model)
    return model


def reset(model: nn.Module) -> None:
    """Frees the memory of a model's session and of its last `generate`; a patched model's next call is a full step.

    Raises:
        ValueError: an unsupported model, or one that only wraps another.
    """
    _patch_of(model)
    view_of(model)
    _forget(model)


def _forget(model):
    _take_session(model)
    memory_of(model).take("run")
    model.__dict__.pop("_kept", None)  # a native model's view, which keeps modules alive


def _take_session(model):
    """The session, or None. The caller has it alone: no other thread gets it, nor the next call if this one fails."""
    session = memory_of(model).take("session")
    if session is not None:
        session.settle()
    return session


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
    patch = model._dkv
    original = patch.before.get("forward") or types.MethodType(type(model).forward, model)
    if model.training or type(patch.policy) is NoCache:
        _take_session(model)
        return original(*args, **kwargs)
    arguments = patch.signature.bind(*args, **kwargs).arguments
    try:
        patch.check(model, arguments)
        with torch.autocast(arguments["input_ids"].device.type, enabled=False):
            logits = patch.logits(model, arguments)
        return patch.output(model, arguments, logits)
    except Uncached as why:
        reason = str(why)
    _take_session(model)
    output = original(*args, **kwargs)
    patch.uncached[reason] += 1
    if patch.uncached[reason] == 1:
        warnings.warn(
            f"a patched {type(model).__name__} ran its own forward, without the cache, as it will whenever {reason}.",
            stacklevel=stacklevel(),
        )
    return output


def _extra_repr(model):
    patch = model._dkv
    own = patch.before["extra_repr"]() if "extra_repr" in patch.before else type(model).extra_repr(model)
    blocks = "" if patch.block_length is None else f", block_length={patch.block_length}"
    return ", ".join(filter(None, (own, f"dkv={patch.policy!r}{blocks}")))


class Patch:
    """The settings of `replace_attention`, kept on the model, and the attributes that it replaced.

    Attributes:
        policy, block_length, impl: the arguments of `replace_attention`.
        before: the instance's own `forward` and `extra_repr`, if it had any.
        signature: of the replaced forward.
        make_output, honours_mask, shifted: as in `ModelView` and `Family`.
        uncached: reason -> number of calls that ran the model's own forward for it.
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
        self.uncached = Tally()

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
        session = _take_session(model)
        if session is None or not session.try_step(x, mask, positions):
            view = view_of(model)
            check_containers(model, view.called, runs_forward=True)
            first_call = FirstCall.read(view, x, mask, positions)
            if session is None or not session.can_serve(view, first_call):
                del session  # frees its memory before the new session allocates its own
                session = Session(view, self, first_call)
            session.start(model, first_call)
        logits = session.logits()
        # set last: a call that failed or is still running must not be continued; another thread may have set its own
        _take_session(model)
        memory_of(model).session = session
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


class FirstCall(NamedTuple):
    """The first call of a session.

    Attributes:
        x: (batch, seqlen) int64.
        mask, given_positions: the arguments that came with it, or None.
        valid: (batch, seqlen) bool, the columns that the mask does not hide.
        positions: (batch, seqlen) int64, for RoPE.
        masking: the columns that the mask hides: "none", "left" (padding on the left) or "columns" (any).
        valid_count: the number of valid columns of all rows.
        longest: the number of positions that RoPE needs.
    """

    x: Tensor
    mask: Tensor | None
    given_positions: Tensor | None
    valid: Tensor
    positions: Tensor
    masking: Literal["none", "left", "columns"]
    valid_count: int
    longest: int

    @classmethod
    def read(cls, view: ModelView, x: Tensor, mask: Tensor | None, positions: Tensor | None) -> "FirstCall":
        """Reads once from the device if there is a mask or positions; raises `Uncached` if no session serves them."""
        if not view.honours_attention_mask:
            mask = None
        mask = None if mask is None else mask.detach().clone()
        given = None if positions is None else positions.clone()
        positions = torch.arange(x.shape[1], device=x.device) if given is None else given
        positions = positions.expand(x.shape)
        valid, is_padding = torch.ones_like(x, dtype=torch.bool), torch.ones((), dtype=torch.bool, device=x.device)
        if mask is None and given is None:
            return cls(x, None, None, valid, positions, "none", x.numel(), x.shape[1])
        if mask is not None:
            valid, is_padding = _read_mask(mask, x.shape, added=view.family.shifted)
        left_padded = (valid.int().diff(dim=1) >= 0).all()
        flags = torch.stack((is_padding, left_padded, valid.sum(), positions.min(), positions.max()))
        is_padding, left_padded, valid_count, first, last = flags.tolist()
        if not is_padding:
            raise Uncached(Uncached.MASK)
        if first < 0 or last >= max(x.shape[1], view.max_positions):
            raise Uncached(Uncached.POSITIONS)
        masking = "none" if mask is None else "left" if left_padded else "columns"
        return cls(x, mask, given, valid, positions, masking, valid_count, max(x.shape[1], last + 1))


def _read_mask(mask, shape, *, added):
    """The columns that a mask does not hide, (batch, seqlen) bool, and whether hiding is all it does, () bool.

    Hidden queries may attend to anything, because nothing attends to them and they are not computed.

    Args:
        mask: (batch, seqlen), or (batch or 1, 1, seqlen or 1, seqlen).
        added: whether float masks are added to the scores; otherwise they are zeros and ones.
    """
    if added and mask.is_floating_point():
        keeps, drops = mask == 0, mask <= _MASKED_SCORE
    else:
        keeps, drops = mask == 1, mask == 0
    valid, only_drops = keeps, (keeps | drops).all()
    if mask.dim() == 4:
        keeps = keeps[:, 0].expand(-1, shape[1], -1)
        valid = keeps.diagonal(dim1=1, dim2=2)
        only_drops = only_drops & ((keeps == valid[:, None]) | ~valid[:, :, None]).all()
    valid = valid.expand(shape)
    return valid, only_drops & valid.any(1).all()


class Session:
    """The cache and the state of one generation by a foreign loop; the next one of the same shape reuses the memory.

    Attributes:
        longest, masking: as in `FirstCall`; the next session needs no more positions, and the same kind of mask.
        mask, given_positions, fingerprint: the first call's arguments and the model then; later steps must have the
            same.
        active, positions, sizes: as in `dkv.run.Run`.
        count, longest_row: ints, the active positions of all rows, and an upper bound for one row.
        home: the CUDA stream that allocated the memory; None on a CPU.
        stream, done: the CUDA stream of the last call, and an event behind it; None on a CPU.
    """

    # inference tensors cannot be updated later outside inference mode, so allocate normal ones
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, view: ModelView, patch: Patch, first_call: FirstCall) -> None:
        x, masking = first_call.x, first_call.masking
        self.view, self.policy, self.masking = view, patch.policy, masking
        self.runner, self.longest = ModelRunner(view, first_call.longest, patch.impl), first_call.longest
        self.block_length = patch.block_length or x.shape[1]
        self.state = State(
            *x.shape,
            mask_id=view.mask_id,
            shifted=view.family.shifted,
            ops=self.runner.ops,
            device=x.device,
            prompt_masks_wait=False,
        )
        leftpad = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device) if masking == "left" else None
        key_mask = torch.empty_like(first_call.valid) if masking == "columns" else None
        self.cache = view.new_cache(*x.shape, leftpad=leftpad, key_mask=key_mask)
        self.active, self.positions = torch.empty_like(first_call.valid), torch.empty_like(x)
        self.sizes = torch.zeros(len(x), len(Size), dtype=torch.int32, device=x.device)
        self.rooms = Rooms(len(x), Room(x.numel(), x.shape[1], 0))
        self.graphs = StepGraphs(x.device) if self.runner.can_be_recorded else None
        self.done = torch.cuda.Event() if x.is_cuda else None
        self.home = torch.cuda.current_stream(x.device) if x.is_cuda else None
        self.stream = None

    def settle(self) -> None:
        """Waits for the last call if several streams take part, so that the memory may be used here, or freed."""
        last = self.stream
        if last is not None and not self.home == last == torch.cuda.current_stream(last.device):
            self.done.synchronize()

    def can_serve(self, view: ModelView, first_call: FirstCall) -> bool:
        """Whether a new session can use this one's memory and recorded graphs."""
        same_kind = (self.state.x.shape, self.masking) == (first_call.x.shape, first_call.masking)
        return same_kind and self.longest >= first_call.longest and self.runner.is_current(view)

    def start(self, model: nn.Module, first_call: FirstCall) -> None:
        """Begins anew with a full step: everything valid is active."""
        self.fingerprint = Fingerprint(list(model.modules()), values=True)
        self.mask, self.given_positions = first_call.mask, first_call.given_positions
        # the latest of the rows' first masks: other rows may have masks inside their prompts or, like the unconditional
        # rows of guidance, in place of them
        masked = (first_call.x == self.view.mask_id) & first_call.valid
        first_generated = masked.int().argmax(1).amax()
        self.state.start(
            first_call.x,
            first_call.valid,
            first_generated=first_generated,
            block_length=self.block_length,
            gen_length=first_call.x.shape[1] - first_generated,
        )
        self._decide()
        self.positions.copy_(first_call.positions)
        if self.cache.leftpad is not None:
            self.cache.leftpad.copy_(self.state.first_column[:, 0])
        if self.cache.key_mask is not None:
            self.cache.key_mask.copy_(first_call.valid)
        # even in finished rows, which a policy would leave out
        self.active.copy_(first_call.valid)
        self.sizes[:, Size.ACTIVE] = first_call.valid.sum(1)
        self.count, self.longest_row = first_call.valid_count, first_call.x.shape[1]

    def try_step(self, x: Tensor, mask: Tensor | None, positions: Tensor | None) -> bool:
        """Takes the call as the next step if it is one, and returns whether it is. Reads once from the device."""
        state = self.state
        if x.shape != state.x.shape or x.device != state.x.device or not self.fingerprint.unchanged():
            return False
        same = ((x == state.x) | state.masked).all() & (x == state.mask_id).any()
        if self.view.honours_attention_mask:
            same = _and_equal(same, mask, self.mask)
        same = _and_equal(same, positions, self.given_positions)
        if same is None:
            return False
        # argmax of NaN logits gives token 0; other tokens may come from elsewhere, such as padding after an end of text
        zeros = state.masked & (x == 0) & (x != state.mask_id)
        unseen = reference.predictors(zeros, state.first_column, shifted=state.shifted) & ~self.active
        # if the call is not the next step this state is not used again, so it may be overwritten
        state.x.copy_(x)
        self._decide()
        flags = torch.stack((same.long(), unseen.sum()))
        same, unseen, *rows = torch.cat((flags, self.sizes[:, Size.ACTIVE])).tolist()
        self.count, self.longest_row = sum(rows), max(rows)
        if same and unseen:
            raise RuntimeError(
                f"the loop put token 0 in place of {unseen} masks whose logits were not computed, and are NaN: its "
                "block_length must be the one that replace_attention was given, and it must take tokens of the current "
                "block only."
            )
        return bool(same)

    def _decide(self):
        self.state.advance()
        write_active(self.policy, self.state, self.active, self.sizes)

    def logits(self) -> Tensor:
        """(batch, seqlen, vocab): logits of the recomputed positions, NaN elsewhere."""
        state, view = self.state, self.view
        room = Room(cpu.padded_rows(self.count) if state.x.device.type == "cpu" else self.count, self.longest_row, 0)
        if self.graphs is not None and self.rooms.records(room):
            room = self.rooms.of(room)
            hidden, slots = self.graphs.run(room, lambda: self._hidden(room))
        else:
            hidden, slots = self._hidden(room)
        values = view.logits(hidden[: self.count])
        if self.count < state.x.numel():
            logits = values.new_full((state.x.numel(), values.shape[-1]), float("nan"))
            values = logits.index_copy_(0, slots[: self.count], values)
        if self.done is not None:
            self.stream = torch.cuda.current_stream(state.x.device)
            self.done.record(self.stream)
        return values.reshape(*state.x.shape, -1)

    def _hidden(self, room):
        state = self.state
        packed, _ = self.runner.ops.pack_step(
            self.active,
            state.candidates,
            self.sizes,
            state.x,
            self.positions,
            state.counters,
            capacity=room.positions,
            candidate_capacity=0,
            per_row=room.per_row,
            shifted=state.shifted,
        )
        return self.runner(packed, self.cache, room.per_row), packed.slots


def _and_equal(flag, new, old):
    """flag & (new == old) on the device; None if their shapes, dtypes or devices already differ."""
    if new is None or old is None:
        return flag if new is None and old is None else None
    if flag is None or (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
        return None
    return flag & (new == old).all()
