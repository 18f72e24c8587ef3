"""Checks of the arguments of `dkv.generate`: each error says what must hold and what was got."""

import math
import operator
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dkv.models.view import ModelView

LARGE = 1e20  # times any logit it stays far below 1e30, which stands for infinity in the kernels

HINTS = {  # keywords of other libraries, and what to do instead
    "max_new_tokens": "pass gen_length",
    "max_tokens": "pass gen_length",
    "max_gen_toks": "pass gen_length",
    "max_length": "pass gen_length, which counts the new tokens only",
    "max_denoising_steps": "pass steps",
    "diffusion_steps": "pass steps",
    "num_steps": "pass steps",
    "num_inference_steps": "pass steps",
    "block_size": "pass block_length",
    "alg": "pass remasking",
    "cfg": "pass cfg_scale",
    "guidance_scale": "pass cfg_scale=guidance_scale - 1; a cfg_scale of 0 is no guidance",
    "do_sample": "pass a temperature above 0 to sample, or 0 for the most likely tokens",
    "num_return_sequences": "repeat the rows of input_ids and attention_mask, and pass a temperature above 0",
    "seed": "pass generator=torch.Generator().manual_seed(seed)",
    "mask_token_id": "pass mask_id",
    "pad_token_id": "leave it out; attention_mask says what is padding",
    "use_cache": "pass policy='NoCache' for False; the default policy has a cache",
    "dual_cache": "pass policy='DualCache' for True, policy='PrefixCache' for False",
    "cache_type": "pass policy='Decode', 'Greedy', 'Prefill' or 'PrefillDecode'",
    "cache_steps": "pass it as the refresh_interval of a policy: policy=dkv.Decode(cache_steps)",
    "refresh_interval": "pass it in the policy: policy=dkv.Decode(refresh_interval)",
    "generation_logits_hook_func": "leave it out; a loop of your own under dkv.replace_attention can do that",
    "generation_tokens_hook_func": "leave it out; a loop of your own under dkv.replace_attention can do that",
    "stop_strings": "leave it out; cut the text yourself",
    "shift_type": "pass it as the shift of a policy: policy=dkv.Decode(shift=shift_type)",
    "streamer": "loop over dkv.stream, or pass callback",
    "return_dict_in_generate": "leave it out; the result always is a GenerateOutput",
}


def stacklevel() -> int:
    """For `warnings.warn` in the calling function: the first frame that is neither of dkv nor of torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("dkv", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def check_names(names: Iterable[str], allowed: Collection[str]) -> None:
    """Raises TypeError for the first of the keywords of `generate` that is not allowed."""
    for name in names:
        if name not in allowed:
            hint = HINTS.get(name, "correct its name or leave it out")
            raise TypeError(f"got an unexpected keyword argument {name!r}; {hint}.")


def renamed(options: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The options by our names; names: other name -> ours."""
    for name, own in names.items():
        if name in options and own in options:
            raise TypeError(f"{name} is another name of {own}, got both; pass one of them.")
    return {names.get(name, name): value for name, value in options.items()}


def ids_and_mask(
    input_ids: Tensor | Mapping[str, Tensor], attention_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`input_ids` and `attention_mask`, both of which may come in a mapping in place of input_ids."""
    if not isinstance(input_ids, Mapping):
        return input_ids, attention_mask
    batch = input_ids
    if "input_ids" not in batch:
        raise ValueError(f"a mapping in place of input_ids must hold 'input_ids', got {list(batch)}.")
    for name in batch:
        if name not in ("input_ids", "attention_mask", "token_type_ids"):
            raise ValueError(
                "a mapping in place of input_ids must hold nothing but 'input_ids', 'attention_mask' and "
                f"'token_type_ids', got {name!r}; leave it out."
            )
    mask = batch.get("attention_mask")
    if mask is not None and attention_mask is not None:
        raise ValueError("attention_mask must be given once, got it in the mapping and as an argument; pass one.")
    return batch["input_ids"], attention_mask if mask is None else mask


def left_padded(input_ids: Tensor, attention_mask: Tensor | None, view: ModelView) -> tuple[Tensor, Tensor]:
    """The prompts with their padding on the left, and (batch, prompt_length) bool, False for padding."""
    if not isinstance(input_ids, Tensor):
        hint = 'pass torch.tensor([...]) with a row for each prompt, or return_tensors="pt" to the tokenizer'
        parts = input_ids if isinstance(input_ids, list | tuple) else [input_ids]
        if any(isinstance(part, str) for part in parts):
            hint = 'tokenize first: tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")'
        raise TypeError(f"input_ids must be an int64 tensor, got {type(input_ids).__name__}; {hint}.")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids must be an int64 tensor, got {input_ids.dtype}.")
    if input_ids.dim() != 2 or input_ids.shape[0] == 0:
        hint = "; pass input_ids[None]" if input_ids.dim() == 1 else ""
        raise ValueError(
            f"input_ids must have shape (batch, prompt_length), batch not 0, got {tuple(input_ids.shape)}{hint}."
        )
    if input_ids.device != view.weight.device:
        raise ValueError(f"input_ids must be on the model's device, {view.weight.device}, got {input_ids.device}.")
    input_ids = input_ids.long()
    if input_ids.shape[1] > 0:
        is_padded = (input_ids[:, :: max(input_ids.shape[1] - 1, 1)] == view.pad_token_id).any()
        lowest, highest, is_padded = torch.stack((input_ids.min(), input_ids.max(), is_padded.long())).tolist()
        if lowest < 0 or highest >= view.vocab_size:
            raise ValueError(f"input_ids must be in 0 .. {view.vocab_size - 1}, got {lowest} .. {highest}.")
        if is_padded and attention_mask is None:
            warnings.warn(
                f"input_ids begins or ends with the pad token, {view.pad_token_id}, in some row and there is no "
                "attention_mask, so these tokens count as prompt. Pass attention_mask: 0 for padding, 1 for prompt.",
                stacklevel=stacklevel(),
            )
    if attention_mask is None:
        return input_ids, torch.ones_like(input_ids, dtype=torch.bool)
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor or None, got {type(attention_mask).__name__}.")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, "
            f"got {tuple(attention_mask.shape)}."
        )
    if attention_mask.device != input_ids.device:
        raise ValueError(f"attention_mask must be on {input_ids.device} like input_ids, got {attention_mask.device}.")
    valid = attention_mask.bool()
    if not torch.equal(valid.to(attention_mask.dtype), attention_mask):
        raise ValueError("attention_mask must hold 0 and 1 (or False and True) only.")
    if input_ids.shape[1] == 0:
        return input_ids, valid
    lengths = valid.sum(1)
    if not bool((lengths > 0).all()):
        raise ValueError(
            f"every row needs a token, but rows {(lengths == 0).nonzero()[:, 0].tolist()} are all padding."
        )
    starts = (valid & (valid.cumsum(1) == 1)).int().argmax(1)
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    contiguous = (columns >= starts[:, None]) & (columns < (starts + lengths)[:, None])
    padding_on_one_side = (starts == 0) | (starts + lengths == input_ids.shape[1])
    good = (contiguous == valid).all(1) & padding_on_one_side
    if not bool(good.all()):
        raise ValueError(
            "attention_mask must have its zeros on one side of each row, "
            f"but rows {(~good).nonzero()[:, 0].tolist()} have zeros inside or on both sides."
        )
    # the padding of right-padded rows moves to the left; its ids do not matter
    source = (columns + starts[:, None] + lengths[:, None]) % input_ids.shape[1]
    return input_ids.gather(1, source), valid.gather(1, source)


def checked_order(
    order: Tensor | None, input_ids: Tensor, *, gen_length: int, remasking: str, has_prompt_masks: bool
) -> Tensor | None:
    """`order` on the device of input_ids, (batch, gen_length) int64, or None."""
    if order is None:
        return None
    if remasking != "random":
        raise ValueError(f"order is for remasking='random', got remasking={remasking!r}.")
    if not isinstance(order, Tensor) or order.shape != (input_ids.shape[0], gen_length):
        got = tuple(order.shape) if isinstance(order, Tensor) else type(order).__name__
        raise ValueError(
            f"order must be a tensor of shape (batch, gen_length) = ({input_ids.shape[0]}, {gen_length}), got {got}."
        )
    order = order.to(input_ids.device).long()
    if not torch.equal(order.sort(1).values, torch.arange(gen_length, device=order.device).expand_as(order)):
        raise ValueError(f"each row of order must be a permutation of 0 .. {gen_length - 1}.")
    if has_prompt_masks:
        raise ValueError("order cannot be given with mask tokens inside the prompt: it names generated positions only.")
    return order


def eos_ids_of(eos_token_id: Sequence[int] | None, view: ModelView) -> list[int]:
    """The ids that end a text; None means the end of text and the end of turn of the family."""
    if eos_token_id is None:
        return [i for i in (*view.eos_ids, view.family.end_of_turn_id) if i < view.vocab_size]
    return [in_vocabulary("eos_token_id", i, view) for i in eos_token_id]


def in_vocabulary(name: str, value: int, view: ModelView) -> int:
    """`value`, an id of the vocabulary."""
    if not 0 <= value < view.vocab_size:
        raise ValueError(f"{name} must be in the vocabulary, 0 .. {view.vocab_size - 1}, got {value}.")
    return value


def whole(name: str, value: Any, *, minimum: int | None = None, maximum: int | None = None) -> int:
    """`value` as an int, minimum <= value <= maximum; integer scalars of NumPy and PyTorch count, bools do not."""
    try:
        value = operator.index(None if _is_bool(value) else value)
    except (TypeError, RuntimeError):
        raise TypeError(f"{name} must be an int, got {value!r}.") from None
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}.")
    if maximum is not None and value > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {value}.")
    return value


def number(name: str, value: Any) -> float:
    """`value` as a float; any real number counts, bools and strings do not."""
    try:
        return float(None if _is_bool(value) or isinstance(value, str | bytes | bytearray) else value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, got {value!r}.") from None


def scale(name: str, value: Any, *, positive: bool = False) -> float:
    """`value` as a factor that float32 can compute with: 0 or None (unless positive), or 1 / LARGE .. LARGE."""
    value = number(name, 0 if value is None and not positive else value)
    if positive and not value > 0:
        raise ValueError(f"{name} must be positive, got {value}.")
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}.")
    if value != 0 and not 1 / LARGE <= value <= LARGE:
        raise ValueError(f"{name} must be {'' if positive else '0, or '}in {1 / LARGE} .. {LARGE}, got {value}.")
    return abs(value)  # no -0.0


def fraction(name: str, value: Any, *, closed: bool = True) -> float:
    """`value` as a float, 0 < value <= 1, or < 1 if not closed."""
    value = number(name, value)
    if not 0 < value <= 1 or (not closed and value == 1):
        raise ValueError(f"{name} must be above 0 and {'at most' if closed else 'below'} 1, got {value}.")
    return value


def switch(name: str, value: Any) -> bool:
    """`value` as a bool; numbers and strings do not count, because "false" would be true."""
    if not _is_bool(value):
        raise TypeError(f"{name} must be True or False, got {value!r}.")
    return bool(value)


def one_of(name: str, value: Any, allowed: Sequence[str]) -> str:
    """`value`, one of the allowed strings."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}.")
    return value


def token_id(name: str, value: Any) -> int:
    """`value` as an int that can be the id of a token."""
    value = whole(name, value)
    if value < 0:
        raise ValueError(f"{name} must be in the vocabulary, so at least 0, got {value}.")
    return value


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """One id or a list of ids as a tuple."""
    values = value if isinstance(value, list | tuple) else [value]
    if not values:
        raise ValueError(f"{name} must be an int or a list of at least one, got an empty list; None: the model's.")
    return tuple(token_id(name, v) for v in values)


def _is_bool(value):
    return isinstance(value, bool) or (
        str(getattr(value, "dtype", "")) in ("bool", "torch.bool") and math.prod(value.shape) == 1
    )
