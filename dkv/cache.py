"""The position-indexed K/V cache of one batch: slot j of row b holds K (rotated) and V of column j of row b."""

import torch


class KVCache:
    """K and V of every layer, allocated once and written in place.

    Attributes:
        k, v: for each layer (batch, seqlen, nheads_k, headdim), in a layout with one contiguous stream per head.
        leftpad: (batch,) int32, the first valid column of each row, or None: the first.
        key_mask: (batch, seqlen) bool, the valid columns where they are not contiguous, or None.
        nbytes: int, bytes of all layers.
    """

    def __init__(self, layers, batch, seqlen, nheads_k, headdim, *, leftpad, key_mask, dtype, device):
        storage = torch.empty((layers, 2, batch, nheads_k, seqlen, headdim), dtype=dtype, device=device)
        self.k = [layer[0].transpose(1, 2) for layer in storage]
        self.v = [layer[1].transpose(1, 2) for layer in storage]
        self.leftpad = None if leftpad is None else leftpad.int()
        self.key_mask = key_mask
        self.nbytes = storage.numel() * storage.element_size()
