"""`replace_attention`: the delayed cache under a user's own denoising loop, on the live model, with undo."""

import inspect
import types

import torch

from dkv.decoder import find_decoder
from dkv.engine import active_positions
from dkv.kernels.checks import IMPLS
from dkv.policy import Decode, Policy
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
    is a cached step; anything else is a full step and a new session. Logits of positions that were not recomputed are
    NaN. Calls under grad mode or in training mode, and calls that ask for more than logits, run the original forward
    and end the session. Use `NoCache` for likelihoods.

    Args:
        model: a LLaDA or Dream of `dkv.from_pretrained` or of Hugging Face's remote code, or a finetune of those.
        policy: see `dkv.Policy`; None: `dkv.Decode()`. `Greedy` needs `dkv.generate`.
        block_length: the block length of the loop, counted from a row's first mask. None: one block.
        impl: "auto", "triton" or "reference", see `dkv.kernels`.

    Returns:
        model.

    Raises:
        ValueError: an unsupported model, or a policy that cannot run under a foreign loop.

    Example:
        >>> dkv.replace_attention(model, dkv.Decode(8), block_length=32)
        >>> out = generate(model, prompt, gen_length=128, block_length=32)  # LLaDA's own generate.py
    """
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
    model._dkv = Patch(policy, block_length, impl, before, inspect.signature(model.forward))
    # bound methods, so that a deep copy of the model is a patched model of its own
    model.forward = types.MethodType(_forward, model)
    model.extra_repr = types.MethodType(_extra_repr, model)
    return model


def restore_attention(model):
    """Undoes `replace_attention` completely; a model that is not patched is left as it is. Returns model."""
    patch = model.__dict__.get("_dkv")
    if patch is not None:
        for name in ("forward", "extra_repr", "_dkv"):
            model.__dict__.pop(name)
        model.__dict__.update(patch.before)
    return model


def reset(model):
    """Ends the session of a patched model and frees its cache; the next call is a full step."""
    patch = model.__dict__.get("_dkv")
    if patch is None:
        raise ValueError(f"{type(model).__name__} has no session: call dkv.replace_attention on it first.")
    patch.session = None


class Patch:
    """What `replace_attention` keeps on the model: the settings, what it covered, and the running session."""

    def __init__(self, policy, block_length, impl, before, signature):
        self.policy, self.block_length, self.impl = policy, block_length, impl
        self.before, self.signature = before, signature
        self.session = None

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
    session = None
    if not (model.training or torch.is_grad_enabled() or _needs_original(arguments)):
        session = _session(patch, model, arguments)
    patch.session = session
    if session is None:
        return patch.original_forward(model)(*args, **kwargs)
    output = session.decoder.make_output(session.logits(patch))
    return (output.logits,) if arguments.get("return_dict") is False else output


def _needs_original(arguments):
    x = arguments.get("input_ids")
    wants_more = any(isinstance(v := arguments.get(name), torch.Tensor) or v for name in _NEEDS_ORIGINAL)
    return wants_more or bool(arguments.get("loss_kwargs")) or x is None or x.dim() != 2 or 0 in x.shape


def _session(patch, model, arguments):
    """The session that goes on with this call, a new one, or None where the mask is of a kind no cache can serve."""
    x, mask = arguments["input_ids"], arguments.get("attention_mask")
    mask = mask if isinstance(mask, torch.Tensor) else None
    positions = arguments.get("position_ids")
    if patch.session is not None and patch.session.goes_on(x, mask, positions):
        patch.session.state.advance(x.clone())
        return patch.session
    patch.session = None  # frees its cache before the next one is allocated
    return Session.start(find_decoder(model), patch, x, mask, positions)


class Session:
    """The cache of one generation and the state its steps are at."""

    def __init__(self, decoder, state, cache, mask, positions, given_positions):
        self.decoder, self.state, self.cache = decoder, state, cache
        self.mask, self.positions, self.given_positions = mask, positions, given_positions

    @classmethod
    def start(cls, decoder, patch, x, mask, positions):
        if not decoder.honours_attention_mask:
            mask = None
        mask = None if mask is None else mask.detach().clone()
        real, left_padded = torch.ones_like(x, dtype=torch.bool), True
        if mask is not None:
            real = mask.diagonal(dim1=-2, dim2=-1).reshape(x.shape).bool() if mask.dim() == 4 else mask.bool()
            served = torch.ones((), dtype=torch.bool, device=x.device)
            if mask.dim() == 4:
                served = (mask[:, 0] == real[:, None, :] & real[:, :, None]).all()
            flags = torch.stack((served, (real.int().diff(dim=1) >= 0).all(), real.any(1).all()))
            served, left_padded, no_empty_row = flags.tolist()
            if not (served and no_empty_row):
                return None
        columns = torch.arange(x.shape[1], device=x.device).expand(x.shape)
        masked = (x == decoder.mask_id) & real
        state = State(
            x.clone(),
            mask_id=decoder.mask_id,
            real=real,
            first_generated=masked.int().argmax(1, keepdim=True),
            block_length=patch.block_length,
            shifted=decoder.family.shifted,
        )
        leftpad = state.first_column[:, 0] if mask is not None and left_padded else None
        cache = decoder.new_cache(*x.shape, leftpad=leftpad, key_mask=None if left_padded else real)
        given = None if positions is None else positions.clone()
        return cls(decoder, state, cache, mask, columns if given is None else given.expand(x.shape), given)

    def goes_on(self, x, mask, positions):
        """Whether the call is the next step: the only host read of a cached step."""
        state, weight = self.state, self.decoder.weight
        if x.shape != state.x.shape or x.device != state.x.device:
            return False
        if weight.dtype != self.cache.k[0].dtype or weight.device != x.device:
            return False
        same = ((x == state.x) | state.masked).all() & (x == state.mask_id).any()
        if self.decoder.honours_attention_mask:
            same = _and_equal(same, mask, self.mask)
        same = _and_equal(same, positions, self.given_positions)
        return same is not None and bool(same)

    def logits(self, patch):
        """(batch, seqlen, vocab): logits of the recomputed positions, NaN elsewhere."""
        state, decoder = self.state, self.decoder
        if state.step == 0:
            active = state.real
        else:
            active = active_positions(patch.policy, state, state.in_block)
        hidden = decoder.step(state.x, active, self.positions, self.cache, patch.impl)
        values = decoder.logits(decoder.final_norm(hidden))
        logits = values.new_full((*state.x.shape, values.shape[-1]), float("nan"))
        logits[active] = values
        return logits


def _and_equal(flag, new, old):
    """The flag on the device, and `new` equal to `old`; None where their shapes already differ."""
    if new is None or old is None:
        return flag if new is None and old is None else None
    if flag is None or new.shape != old.shape or new.device != old.device:
        return None
    return flag & (new == old).all()
