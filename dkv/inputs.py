"""Checks of what `dkv.generate` is given: each error says what must hold, and what was got."""

import torch


def left_padded(input_ids, attention_mask, decoder):
    """The prompts with their padding on the left, and (batch, prompt_length) bool: what is not padding."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        got = getattr(input_ids, "dtype", type(input_ids).__name__)
        raise TypeError(f"input_ids must be an int64 tensor, got {got}.")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must have shape (batch, prompt_length), not empty, got {tuple(input_ids.shape)}.")
    if input_ids.device != decoder.weight.device:
        raise ValueError(f"input_ids must be on the model's device, {decoder.weight.device}, got {input_ids.device}.")
    lowest, highest = int(input_ids.min()), int(input_ids.max())
    if lowest < 0 or highest >= decoder.vocab_size:
        raise ValueError(f"input_ids must be in 0 .. {decoder.vocab_size - 1}, got {lowest} .. {highest}.")
    input_ids = input_ids.long()
    if attention_mask is None:
        return input_ids, torch.ones_like(input_ids, dtype=torch.bool)
    if not isinstance(attention_mask, torch.Tensor):
        raise TypeError(f"attention_mask must be a tensor or None, got {type(attention_mask).__name__}.")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, "
            f"got {tuple(attention_mask.shape)}."
        )
    if attention_mask.device != input_ids.device:
        raise ValueError(f"attention_mask must be on {input_ids.device} like input_ids, got {attention_mask.device}.")
    real = attention_mask.bool()
    if not torch.equal(real.to(attention_mask.dtype), attention_mask):
        raise ValueError("attention_mask must hold 0 and 1 (or False and True) only.")
    lengths = real.sum(1)
    if not bool((lengths > 0).all()):
        raise ValueError(
            f"every row needs a token, but rows {(lengths == 0).nonzero()[:, 0].tolist()} are all padding."
        )
    starts = (real & (real.cumsum(1) == 1)).int().argmax(1)
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    contiguous = (columns >= starts[:, None]) & (columns < (starts + lengths)[:, None])
    padding_on_one_side = (starts == 0) | (starts + lengths == input_ids.shape[1])
    good = (contiguous == real).all(1) & padding_on_one_side
    if not bool(good.all()):
        raise ValueError(
            "attention_mask must have its zeros on one side of each row, "
            f"but rows {(~good).nonzero()[:, 0].tolist()} have zeros inside or on both sides."
        )
    # move the padding of right-padded rows to the left, whatever ids it has
    source = (columns + starts[:, None] + lengths[:, None]) % input_ids.shape[1]
    return input_ids.gather(1, source), real.gather(1, source)


def checked_order(order, sampler, input_ids, gen_length, has_prompt_masks):
    """`order` on the device of input_ids, (batch, gen_length) int64, or None."""
    if order is None:
        return None
    if sampler.remasking != "random":
        raise ValueError(f"order is for remasking='random', got remasking={sampler.remasking!r}.")
    if not isinstance(order, torch.Tensor) or order.shape != (input_ids.shape[0], gen_length):
        got = tuple(order.shape) if isinstance(order, torch.Tensor) else type(order).__name__
        raise ValueError(
            f"order must be a tensor of shape (batch, gen_length) = ({input_ids.shape[0]}, {gen_length}), got {got}."
        )
    order = order.to(input_ids.device).long()
    if not torch.equal(order.sort(1).values, torch.arange(gen_length, device=order.device).expand_as(order)):
        raise ValueError(f"each row of order must be a permutation of 0 .. {gen_length - 1}.")
    if has_prompt_masks:
        raise ValueError("order cannot be given with mask tokens inside the prompt: it names generated positions only.")
    return order


def eos_ids_of(eos_token_id, decoder):
    """The list of ids that end a text; None: the family's end of text and end of turn."""
    if eos_token_id is None:
        return [i for i in (*decoder.eos_ids, decoder.family.end_of_turn_id) if i < decoder.vocab_size]
    ids = eos_token_id if isinstance(eos_token_id, list | tuple) else [eos_token_id]
    if not ids:
        raise ValueError("eos_token_id must be an int or a list of at least one, got an empty list; None: the model's.")
    return [token_id("eos_token_id", i, decoder) for i in ids]


def token_id(name, value, decoder):
    """`value`, an id of the vocabulary."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}.")
    if not 0 <= value < decoder.vocab_size:
        raise ValueError(f"{name} must be in the vocabulary, 0 .. {decoder.vocab_size - 1}, got {value}.")
    return value


def count(name, value):
    """`value`, an int of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
    return value


def fraction(name, value, closed=True):
    """Checks 0 < value <= 1; not closed: < 1."""
    if not 0 < value <= 1 or (not closed and value == 1):
        raise ValueError(f"{name} must be above 0 and {'at most' if closed else 'below'} 1, got {value}.")
