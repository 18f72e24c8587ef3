"""`FirstCall`: what a session must know of its first call, and whether the cache can serve such calls at all."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dkv.models.view import ModelView

# a score this low has no weight beside any other; the lowest float32 and bfloat16 and -inf are below it
_MASKED_SCORE = torch.finfo(torch.float16).min


class Uncached(Exception):
    """Raised for a call that must run the model's own forward; the message is the reason."""

    MASK = "attention_mask does more than hide columns"
    POSITIONS = "position_ids are not (batch, seqlen) integers in the model's range"


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
