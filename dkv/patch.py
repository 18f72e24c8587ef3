"""`replace_attention`: the delayed cache under a user's own denoising loop, on the live model, with undo."""

import functools
import inspect
import types
import warnings
from collections import Counter as Tally
from dataclasses import dataclass

import torch
from torch import nn

from dkv.active import write_active
from dkv.cuda_graphs import StepGraphs
from dkv.guard import Fingerprint, check_containers
from dkv.inputs import one_of, whole
from dkv.kernels.checks import IMPLS, Impl
from dkv.kernels.cpu import padded_rows
from dkv.kernels.reference import predictors
from dkv.kernels.rows import Size
from dkv.memory import memory_of, separate
from dkv.model_runner import ModelRunner
from dkv.models import check_not_wrapped, view_of
from dkv.policy import Decode, NoCache, Policy, checked_policy
from dkv.rooms import Room, Rooms
from dkv.state import State

# what a session serves; any other argument asks for more than logits, or brings what a cache cannot know
_SERVED = ("input_ids", "attention_mask", "position_ids", "return_dict")
# what an argument that is None takes from the config
_FROM_CONFIG = ("output_attentions", "output_hidden_states")
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# a score this low has no weight beside any other; the lowest of float32 and bfloat16 and -inf lie below
_MASKED_SCORE = torch.finfo(torch.float16).min


class Uncached(Exception):
    """A call that runs the model's own forward; the message is the reason, one of a few."""

    MASK = "attention_mask does more than hide columns"
    POSITIONS = "position_ids are not (batch, seqlen) integers in the model's range"


def replace_attention(
    model: nn.Module, policy: Policy | None = None, *, block_length: int | None = None, impl: Impl = "auto"
) -> nn.Module:
    """Puts a delayed K/V cache under the model: its own loop, or yours, runs unchanged and recomputes less.

    Mutates `model` in place, on the instance only: `model(x, ...)` keeps its signature and return type. Each call is
    compared with the one before: the same shape and attention mask, and nothing changed but masks that became tokens,
    is a cached step; anything else, a changed weight too, is a full step and a new session. Logits of positions that
    were not recomputed are NaN. Steps run in the model's dtype, under autocast too.

    Calls that no cache can serve run the model's own forward and end the session: in training mode; in grad mode; for
    more than logits; with an attention mask that does more than hide columns, or positions that the model was not
    made for. Each reason but training is told once, by a UserWarning. With `NoCache` every call runs the model's own
    forward: its logits, bit for bit, as likelihoods need them, at its own speed.

    Under torch.compile a patched model runs as it does without; with fullgraph=True that is an error.

    Args:
        model: a LLaDA or Dream of `dkv.from_pretrained` or of Hugging Face's remote code, or a finetune of those.
        policy: see `dkv.Policy`; None: `dkv.Decode()`. `Greedy` needs `dkv.generate`.
        block_length: the block length of the loop, counted from the first mask of the row where that is last. None: one
            block.
        impl: "auto", "triton" or "reference", see `dkv.kernels`.

    Returns:
        model.

    Raises:
        ValueError: an unsupported model, a policy that cannot run under a foreign loop. Calls raise it for hooks that
            would be passed over, and RuntimeError after a loop has taken tokens from logits that are NaN.

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
            f"{policy!r} must know what a step will decode, which a foreign loop does not say; use generate."
        )
    if policy.needs_blocks and block_length is None:
        raise ValueError(f"{policy!r} is about blocks: pass the block_length of your loop.")
    block_length = None if block_length is None else whole("block_length", block_length, least=1)
    one_of("impl", impl, IMPLS)
    restore_attention(model)
    before = {name: model.__dict__[name] for name in ("forward", "extra_repr") if name in model.__dict__}
    model._dkv = Patch(view, policy, block_length, impl, before, inspect.signature(model.forward))
    # the model is an argument, so that a copy of the model, or what is unpickled, is a patched model of its own
    model.forward = functools.partial(_forward, model)
    model.forward.__signature__ = model._dkv.signature
    model.extra_repr = functools.partial(_extra_repr, model)
    return model


def restore_attention(model: nn.Module) -> nn.Module:
    """Undoes `replace_attention` completely, and gives merged weights memory of their own again. Returns model.

    Raises:
        ValueError: model.forward was replaced since, or the model only wraps a patched one.
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
    """Frees the memory that a model's session and its last `generate` keep; if patched, its next call is a full step.

    Raises:
        ValueError: an unsupported model, or one that only wraps another.
    """
    _patch_of(model)
    view_of(model)
    _forget(model)


def _forget(model):
    _take_session(model)
    memory_of(model).take("run")


def _take_session(model):
    """The session, if there is one, which is then nobody else's: not another thread's, nor the next call's if this one
    fails."""
    session = memory_of(model).take("session")
    if session is not None:
        session.settle()
    return session


def _patch_of(model):
    """The `Patch` of a model, None without."""
    check_not_wrapped(model)
    patch = model.__dict__.get("_dkv")
    if patch is None and hasattr(model, "_dkv"):
        raise ValueError("the model is compiled: pass the patched one, model._orig_mod.")
    return patch


class Patch:
    """What `replace_attention` keeps on the model: the settings, and what it covered.

    Attributes:
        uncached: reason -> calls that ran the model's own forward for it.
    """

    def __init__(self, view, policy, block_length, impl, before, signature):
        self.policy, self.block_length, self.impl = policy, block_length, impl
        self.before, self.signature = before, signature
        self.make_output, self.honours_mask = view.make_output, view.honours_attention_mask
        self.shifted = view.family.shifted
        self.uncached = Tally()

    def original_forward(self, model):
        return self.before.get("forward") or types.MethodType(type(model).forward, model)

    def check(self, model, arguments):
        """Raises `Uncached` for a call whose kind or shapes no session serves; reads nothing from the device."""
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
        if not (isinstance(x, torch.Tensor) and x.dim() == 2 and x.numel() and x.dtype in (torch.int32, torch.int64)):
            raise Uncached("input_ids is not a non-empty (batch, seqlen) tensor of int32 or int64")
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        if self.honours_mask and not self._may_be_padding(mask, x):
            raise Uncached(Uncached.MASK)
        if positions is not None and not (
            isinstance(positions, torch.Tensor)
            and positions.dtype in _INTEGERS
            and positions.device == x.device
            and positions.shape in (x.shape, (1, x.shape[1]))
        ):
            raise Uncached(Uncached.POSITIONS)

    def _may_be_padding(self, mask, x):
        if mask is None or (self.shifted and isinstance(mask, str) and mask == "full"):
            return True
        if not isinstance(mask, torch.Tensor) or mask.device != x.device:
            return False
        # LLaDA's files read zeros and ones of any dtype; Dream's hand the mask to attention, which adds one of floats
        batch, seqlen = x.shape
        if mask.dim() == 2:
            return mask.shape == x.shape and not (self.shifted and mask.is_floating_point())
        shapes = [(rows, 1, queries, seqlen) for rows in (1, batch) for queries in (1, seqlen)]
        return self.shifted and mask.shape in shapes and (mask.dtype == torch.bool or mask.is_floating_point())

    def logits(self, model, arguments):
        """Logits by the session that goes on, or by a new one; `Uncached` where none can."""
        x, mask, positions = map(arguments.get, ("input_ids", "attention_mask", "position_ids"))
        mask = mask if isinstance(mask, torch.Tensor) else None
        session = _take_session(model)
        if session is None or not session.try_step(x, mask, positions):
            view = view_of(model)
            check_containers(model, view.called, runs_forward=True)
            first_call = FirstCall.read(view, x, mask, positions)
            if session is None or not session.can_serve(view, first_call):
                del session  # frees its memory before the next one's is allocated
                session = Session(view, self, first_call)
            session.start(model, first_call)
        logits = session.logits()
        # only now: what failed, or is not done yet, is nothing to go on from; that of another thread may be there
        _take_session(model)
        memory_of(model).session = session
        return logits

    def output(self, model, arguments, logits):
        """The logits as the model's own forward returns them."""
        return_dict = arguments.get("return_dict")
        if return_dict is None and "return_dict" in self.signature.parameters:
            config = model.config
            return_dict = getattr(config, "return_dict", True) and not getattr(config, "torchscript", False)
        asks_for_tuple = return_dict is not None and not return_dict
        return self.make_output(logits, return_dict=False) if asks_for_tuple else self.make_output(logits)


def _is_off(value, default):
    """Whether an argument says no more than leaving it out would."""
    if value is None:
        return not default
    return value is default or (isinstance(value, bool | int | float | str) and value == (default or 0))


def _extra_repr(model):
    patch = model._dkv
    own = patch.before["extra_repr"]() if "extra_repr" in patch.before else type(model).extra_repr(model)
    blocks = "" if patch.block_length is None else f", block_length={patch.block_length}"
    return ", ".join(filter(None, (own, f"dkv={patch.policy!r}{blocks}")))


@torch._disable_dynamo
def _forward(model, *args, **kwargs):
    patch = model._dkv
    original = patch.original_forward(model)
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
            stacklevel=6,  # the caller of model(...)
        )
    return output


@dataclass
class FirstCall:
    """The first call of a session.

    Attributes:
        x: (batch, seqlen) int64; mask, given_positions: what came with it, or None.
        valid: (batch, seqlen) bool, what the mask leaves; positions: (batch, seqlen) int64.
        masking: "none", "left" (padding on the left) or "columns" (anywhere).
        valid_count: int, how many are valid; longest: int, positions that RoPE needs.
    """

    x: torch.Tensor
    mask: torch.Tensor | None
    given_positions: torch.Tensor | None
    valid: torch.Tensor
    positions: torch.Tensor
    masking: str
    valid_count: int
    longest: int

    @classmethod
    def read(cls, view, x, mask, positions):
        """One host read where a mask or positions are given; `Uncached` for those that no session serves."""
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
    """What a mask leaves, (batch, seqlen) bool, and whether it does no more than that, () bool.

    Queries that are themselves left out may attend to anything: nobody attends to them, and they are not computed.

    Args:
        mask: (batch, seqlen), or (batch or 1, 1, seqlen or 1, seqlen).
        added: whether masks of floats are added to the scores, or are zero and one.
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
    """The cache of one generation and the state its steps are at; the next one of the same shape uses its memory."""

    # outside of inference mode, so that the next session may be outside of it
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, view, patch, first_call):
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

    def settle(self):
        """Waits for the last call if other streams take part: only then may the memory be used here, or freed."""
        if self.stream is not None:
            current = torch.cuda.current_stream(self.stream.device)
            if not self.home == self.stream == current:
                self.done.synchronize()

    def can_serve(self, view, first_call):
        """Whether the memory, and what was recorded on it, serve a new session."""
        same_kind = (self.state.x.shape, self.masking) == (first_call.x.shape, first_call.masking)
        return same_kind and self.longest >= first_call.longest and self.runner.is_current(view)

    def start(self, model, first_call):
        """Begins anew: everything valid is active."""
        self.fingerprint = Fingerprint(list(model.modules()), values=True)
        self.mask, self.given_positions = first_call.mask, first_call.given_positions
        first_generated = _first_generated(self.view, first_call)
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
        # finished rows too
        self.active.copy_(first_call.valid)
        self.sizes[:, Size.ACTIVE] = first_call.valid.sum(1)
        self.count, self.longest_row = first_call.valid_count, first_call.x.shape[1]

    def try_step(self, x, mask, positions):
        """Whether the call is the next step; then decides what it recomputes. One host read, the only one of a step."""
        state = self.state
        if x.shape != state.x.shape or x.device != state.x.device or not self.fingerprint.unchanged():
            return False
        same = ((x == state.x) | state.masked).all() & (x == state.mask_id).any()
        if self.view.honours_attention_mask:
            same = _and_equal(same, mask, self.mask)
        same = _and_equal(same, positions, self.given_positions)
        if same is None:
            return False
        # the largest of a row of NaN is the first; other tokens may come from elsewhere, such as the end of a text
        zeros = state.masked & (x == 0) & (x != state.mask_id)
        unseen = predictors(zeros, state.first_column, shifted=state.shifted) & ~self.active
        # where it does not go on, this state is of no use any more
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

    def logits(self):
        """(batch, seqlen, vocab): logits of the recomputed positions, NaN elsewhere."""
        state, view = self.state, self.view
        room = Room(padded_rows(self.count) if state.x.device.type == "cpu" else self.count, self.longest_row, 0)
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


def _first_generated(view, first_call):
    """(): the first mask of the row where that is last: other rows may have masks inside their prompts, or for prompts,
    as the unconditional rows of guidance do."""
    masked = (first_call.x == view.mask_id) & first_call.valid
    return masked.int().argmax(1).amax()


def _and_equal(flag, new, old):
    """The flag on the device, and `new` equal to `old`; None where their kinds already differ."""
    if new is None or old is None:
        return flag if new is None and old is None else None
    if flag is None or (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
        return None
    return flag & (new == old).all()
