"""`KVCache`: K and V of a batch by position: index [b, j] is for column j of row b. K is rotated."""

import torch
from torch import Tensor


class KVCache:
    """K and V of every layer, allocated once and written in place.

    Attributes:
        k, v: for each layer (batch, seqlen, nheads_k, headdim); in memory, each head is contiguous.
        leftpad: (batch,) int32, the first valid column of each row. None: the first column.
        key_mask: (batch, seqlen) bool, the valid columns if they are not contiguous, or None.
        nbytes: bytes of all layers.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        seqlen: int,
        nheads_k: int,
        headdim: int,
        *,
        leftpad: Tensor | None,
        key_mask: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
    ):
        storage = torch.empty((layers, 2, batch, nheads_k, seqlen, headdim), dtype=dtype, device=device)
        self.k = [layer[0].transpose(1, 2) for layer in storage]
        self.v = [layer[1].transpose(1, 2) for layer in storage]
        self.leftpad = None if leftpad is None else leftpad.int()
        self.key_mask = key_mask
        self.nbytes = storage.numel() * storage.element_size()
