"""`replace_attention`: the delayed cache under a user's own denoising loop, on the live model, with undo."""

import functools
import inspect
import types
from dataclasses import dataclass

import torch

from dkv.decoder import find_decoder
from dkv.engine import write_active
from dkv.forward import Forward
from dkv.graphs import StepGraphs
from dkv.guard import Fingerprint, check_containers
from dkv.kernels.checks import IMPLS
from dkv.kernels.product import fast_rows
from dkv.kernels.reference import predictors
from dkv.kernels.rows import Size
from dkv.memory import memory_of, separate
from dkv.policy import Decode, Policy
from dkv.rooms import Room, Rooms
from dkv.state import State

# calls with any of these run the model's own forward: they ask for more than logits, or bring what a cache cannot know
_NEEDS_ORIGINAL = (
    "inputs_embeds",
    "labels",
    "past_key_values",
    "attention_bias",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "cache_position",
    "num_logits_to_keep",
)


def replace_attention(model, policy=None, *, block_length=None, impl="auto"):
    """Puts a delayed K/V cache under the model: its own loop, or yours, runs unchanged and recomputes less.

    Mutates `model` in place, on the instance only: `model(x, ...)` keeps its signature and return type. Each call is
    compared with the one before: the same shape and attention mask, and nothing changed but masks that became tokens,
    is a cached step; anything else, a changed weight too, is a full step and a new session. Logits of positions that
    were not recomputed are NaN. Calls under grad mode or in training mode, and calls that ask for more than logits, run
    the original forward and end the session. The others run in the model's dtype, under autocast too. Use `NoCache` for
    likelihoods.

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
        raise ValueError("the model is compiled: pass the one that torch.compile was given; compile no patched model.")
    decoder = find_decoder(model)
    policy = Decode() if policy is None else policy
    if not isinstance(policy, Policy):
        raise TypeError(f"policy must be a dkv.Policy such as dkv.Decode(8), got {policy!r}.")
    policy.check(decoder.family.shifted)
    if policy.needs_order:
        raise ValueError(
            f"{policy!r} must know what a step will decode, which a foreign loop does not say; use generate."
        )
    if policy.needs_blocks and block_length is None:
        raise ValueError(f"{policy!r} is about blocks: pass the block_length of your loop.")
    if block_length is not None and (not isinstance(block_length, int) or block_length < 1):
        raise ValueError(f"block_length must be a positive int or None, got {block_length!r}.")
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}.")
    restore_attention(model)
    before = {name: model.__dict__[name] for name in ("forward", "extra_repr") if name in model.__dict__}
    model._dkv = Patch(decoder, policy, block_length, impl, before, inspect.signature(model.forward))
    # the model is an argument, so that a copy of the model, or what is unpickled, is a patched model of its own
    model.forward = functools.partial(_forward, model)
    model.extra_repr = functools.partial(_extra_repr, model)
    return model


def restore_attention(model):
    """Undoes `replace_attention` completely, and gives merged weights memory of their own again. Returns model.

    Raises:
        ValueError: model.forward was replaced since.
    """
    patch = model.__dict__.get("_dkv")
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


def reset(model):
    """Frees the memory that a model's session and its last `generate` keep; if patched, its next call is a full step.

    Raises:
        ValueError: neither `replace_attention` nor `generate` was used on the model.
    """
    if not _forget(model) and "_dkv" not in model.__dict__:
        raise ValueError(
            f"{type(model).__name__} has nothing to reset: use dkv.replace_attention or dkv.generate on it first."
        )


def _forget(model):
    """Frees the memory of the model's session and of its last run; returns whether there was a run's."""
    _take_session(model)
    return memory_of(model).take("run") is not None


def _take_session(model):
    """The session, if there is one, which is then nobody else's: not another thread's, nor the next call's if this one
    fails."""
    session = memory_of(model).take("session")
    if session is not None:
        session.settle()
    return session


class Patch:
    """What `replace_attention` keeps on the model: the settings, and what it covered."""

    def __init__(self, decoder, policy, block_length, impl, before, signature):
        self.policy, self.block_length, self.impl = policy, block_length, impl
        self.before, self.signature = before, signature
        self.make_output, self.honours_mask = decoder.make_output, decoder.honours_attention_mask
        self.full_is_no_mask = decoder.family.shifted

    def original_forward(self, model):
        return self.before.get("forward") or types.MethodType(type(model).forward, model)


def _extra_repr(model):
    patch = model._dkv
    own = patch.before["extra_repr"]() if "extra_repr" in patch.before else type(model).extra_repr(model)
    blocks = "" if patch.block_length is None else f", block_length={patch.block_length}"
    return ", ".join(filter(None, (own, f"dkv={patch.policy!r}{blocks}")))


def _forward(model, *args, **kwargs):
    patch = model._dkv
    arguments = patch.signature.bind(*args, **kwargs).arguments
    logits = None
    if model.training or torch.is_grad_enabled() or _needs_original(patch, arguments):
        _take_session(model)
    else:
        with torch.autocast(arguments["input_ids"].device.type, enabled=False):
            logits = _logits(patch, model, arguments)
    if logits is None:
        return patch.original_forward(model)(*args, **kwargs)
    output = patch.make_output(logits)
    return (output.logits,) if arguments.get("return_dict") is False else output


def _needs_original(patch, arguments):
    x, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    wants_more = any(isinstance(v := arguments.get(name), torch.Tensor) or v for name in _NEEDS_ORIGINAL)
    if wants_more or arguments.get("loss_kwargs") or x is None or x.dim() != 2 or 0 in x.shape:
        return True
    if mask is None or not patch.honours_mask:
        return False
    if isinstance(mask, torch.Tensor):
        batch, seqlen = x.shape
        return mask.shape not in ((batch, seqlen), (batch, 1, seqlen, seqlen), (1, 1, seqlen, seqlen))
    return not (patch.full_is_no_mask and isinstance(mask, str) and mask == "full")


def _logits(patch, model, arguments):
    """Logits by the session that goes on or a new one; None where the mask is of a kind no cache can serve."""
    session = _session(patch, model, arguments)
    if session is None:
        return None
    logits = session.logits()
    # only now: what failed, or is not done yet, is nothing to go on from
    memory_of(model).session = session
    return logits


def _session(patch, model, arguments):
    """The session that goes on with this call, a new one, or None where the mask is of a kind no cache can serve."""
    x, mask = arguments["input_ids"], arguments.get("attention_mask")
    mask = mask if isinstance(mask, torch.Tensor) else None
    positions = arguments.get("position_ids")
    session = _take_session(model)
    if session is not None and session.goes_on(x, mask, positions):
        return session
    decoder = find_decoder(model)
    check_containers(model, decoder.called, runs_forward=True)
    beginning = Beginning.read(decoder, x, mask, positions)
    if beginning is None:
        return None
    if session is None or not session.fits(decoder, beginning):
        del session  # frees its memory before the next one's is allocated
        session = Session(decoder, patch, beginning)
    session.start(model, beginning)
    return session


@dataclass
class Beginning:
    """The first call of a session.

    Attributes:
        x: (batch, seqlen) int64; mask, given_positions: what came with it, or None.
        real: (batch, seqlen) bool, what the mask leaves; positions: (batch, seqlen) int64.
        masking: "none", "left" (padding on the left) or "columns" (anywhere).
        real_count: int, how many are real; longest: int, positions that RoPE needs.
    """

    x: torch.Tensor
    mask: torch.Tensor | None
    given_positions: torch.Tensor | None
    real: torch.Tensor
    positions: torch.Tensor
    masking: str
    real_count: int
    longest: int

    @classmethod
    def read(cls, decoder, x, mask, positions):
        if not decoder.honours_attention_mask:
            mask = None
        mask = None if mask is None else mask.detach().clone()
        given = None if positions is None else positions.clone()
        positions = torch.arange(x.shape[1], device=x.device) if given is None else given
        positions = positions.expand(x.shape)
        if mask is None and given is None:
            real = torch.ones_like(x, dtype=torch.bool)
            return cls(x, None, None, real, positions, "none", x.numel(), x.shape[1])
        real, served = torch.ones_like(x, dtype=torch.bool), torch.ones((), dtype=torch.bool, device=x.device)
        if mask is not None:
            real = mask.bool()
            if mask.dim() == 4:
                real = real.diagonal(dim1=-2, dim2=-1)[:, 0].expand(x.shape)
                served = (mask[:, 0] == real[:, None, :] & real[:, :, None]).all()
        left_padded = (real.int().diff(dim=1) >= 0).all()
        flags = torch.stack((served & real.any(1).all(), left_padded, real.sum(), positions.max()))
        served, left_padded, real_count, last = flags.tolist()
        if not served:
            return None
        masking = "none" if mask is None else "left" if left_padded else "columns"
        return cls(x, mask, given, real, positions, masking, real_count, max(x.shape[1], last + 1))


class Session:
    """The cache of one generation and the state its steps are at; the next one of the same shape uses its memory."""

    # outside of inference mode, so that the next session may be outside of it
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, decoder, patch, beginning):
        x, masking = beginning.x, beginning.masking
        self.decoder, self.policy, self.masking = decoder, patch.policy, masking
        self.forward, self.longest = Forward(decoder, beginning.longest, patch.impl), beginning.longest
        self.block_length = patch.block_length or x.shape[1]
        self.state = State(
            *x.shape,
            mask_id=decoder.mask_id,
            shifted=decoder.family.shifted,
            ops=self.forward.ops,
            device=x.device,
            prompt_masks_wait=False,
        )
        leftpad = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device) if masking == "left" else None
        key_mask = torch.empty_like(beginning.real) if masking == "columns" else None
        self.cache = decoder.new_cache(*x.shape, leftpad=leftpad, key_mask=key_mask)
        self.active, self.positions = torch.empty_like(beginning.real), torch.empty_like(x)
        self.sizes = torch.zeros(len(x), len(Size), dtype=torch.int32, device=x.device)
        self.rooms = Rooms(len(x), Room(x.numel(), x.shape[1], 0))
        self.graphs = StepGraphs(x.device) if self.forward.can_be_recorded else None
        self.done = torch.cuda.Event() if x.is_cuda else None
        self.stream = None

    def settle(self):
        """Waits for the last call if that was on another stream: only then may the memory be used here, or freed."""
        if self.stream is not None and self.stream != torch.cuda.current_stream(self.stream.device):
            self.done.synchronize()

    def fits(self, decoder, beginning):
        """Whether the memory, and what was recorded on it, serve a new session."""
        same_kind = (self.state.x.shape, self.masking) == (beginning.x.shape, beginning.masking)
        return same_kind and self.longest >= beginning.longest and self.forward.is_current(decoder)

    def start(self, model, beginning):
        """Begins anew: everything real is active."""
        self.fingerprint = Fingerprint(list(model.modules()), values=True)
        self.mask, self.given_positions = beginning.mask, beginning.given_positions
        first_generated = _first_generated(self.decoder, beginning)
        self.state.start(
            beginning.x,
            beginning.real,
            first_generated=first_generated,
            block_length=self.block_length,
            gen_length=beginning.x.shape[1] - first_generated,
        )
        self._decide()
        self.positions.copy_(beginning.positions)
        if self.cache.leftpad is not None:
            self.cache.leftpad.copy_(self.state.first_column[:, 0])
        if self.cache.key_mask is not None:
            self.cache.key_mask.copy_(beginning.real)
        # finished rows too
        self.active.copy_(beginning.real)
        self.sizes[:, Size.ACTIVE] = beginning.real.sum(1)
        self.count, self.longest_row = beginning.real_count, beginning.x.shape[1]

    def goes_on(self, x, mask, positions):
        """Whether the call is the next step; then decides what it recomputes. One host read, the only one of a step."""
        state = self.state
        if x.shape != state.x.shape or x.device != state.x.device or not self.fingerprint.holds():
            return False
        same = ((x == state.x) | state.masked).all() & (x == state.mask_id).any()
        if self.decoder.honours_attention_mask:
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
        state, decoder = self.state, self.decoder
        room = Room(fast_rows(self.count) if state.x.device.type == "cpu" else self.count, self.longest_row, 0)
        if self.graphs is not None and self.rooms.records(room):
            room = self.rooms.of(room)
            hidden, slots = self.graphs.run(room, lambda: self._hidden(room))
        else:
            hidden, slots = self._hidden(room)
        values = decoder.logits(hidden[: self.count])
        if self.count < state.x.numel():
            logits = values.new_full((state.x.numel(), values.shape[-1]), float("nan"))
            values = logits.index_copy_(0, slots[: self.count], values)
        if self.done is not None:
            self.stream = torch.cuda.current_stream(state.x.device)
            self.done.record(self.stream)
        return values.reshape(*state.x.shape, -1)

    def _hidden(self, room):
        state = self.state
        packed, _ = self.forward.ops.pack_step(
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
        return self.forward(packed, self.cache, room.per_row), packed.slots


def _first_generated(decoder, beginning):
    """(): the first mask of the row where that is last: other rows may have masks inside their prompts, or for prompts,
    as the unconditional rows of guidance do."""
    masked = (beginning.x == decoder.mask_id) & beginning.real
    return masked.int().argmax(1).amax()


def _and_equal(flag, new, old):
    """The flag on the device, and `new` equal to `old`; None where their shapes already differ."""
    if new is None or old is None:
        return flag if new is None and old is None else None
    if flag is None or new.shape != old.shape or new.device != old.device:
        return None
    return flag & (new == old).all()
