"""Native models: their module tree, forward pass, loading and saving, all in the official checkpoint layout."""

import contextlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dkv.models.folder import CONFIG, INDEX, WEIGHTS, read_tensors, some
from dkv.models.layout import NORMS
from dkv.models.view import ModelView


def _rotate(x, cos, sin):
    """Half-split RoPE in float32 at least, rounded once; differentiable, unlike that of dkv.kernels."""
    x1, x2 = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


class Output(NamedTuple):
    """The output of a native model: logits (batch, seqlen, vocab) in the model's dtype."""

    logits: Tensor


class RMSNorm(nn.Module):
    """RMSNorm in float32 (in float64 for float64 inputs), rounded to the input's dtype, then scaled."""

    def __init__(self, size: int, eps: float, device: torch.device | str | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, device=device))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class NativeModel(nn.Module):
    """Base class of `LLaDA` and `Dream`: the tree of modules has the paths of the official code.

    The forward pass is plain and differentiable, and applies no dropout, not even in training.

    A subclass has a `layout`, and the functions `describes`, `read_model_config` and `find` of its family.

    Attributes:
        config: the fields of config.json. A field that is changed later counts from the next forward pass on, as it
            does for `dkv.generate` and `dkv.replace_attention`.
        model_config: the `ModelConfig` that the model was built from.
    """

    _kept = None  # (modules, parameters and config that the last view was read from; that view)

    def __init__(self, config: SimpleNamespace, owner: str = "config"):
        """Builds the modules without memory (on the meta device).

        Args:
            config: a namespace of config.json's fields.
            owner: named by errors about them.
        """
        super().__init__()
        self.config, self.model_config = config, self.read_model_config(config, owner)
        model_config, layout = self.model_config, self.layout
        self._place(layout.embed, nn.Embedding(model_config.vocab_size, model_config.hidden_size, device="meta"))
        self._place(layout.layers, nn.ModuleList(nn.Module() for _ in range(model_config.layers)))
        for index in range(model_config.layers):
            for role, path in layout.layer.items():
                if role in NORMS:
                    module = RMSNorm(model_config.hidden_size, model_config.eps, device="meta")
                else:
                    module = nn.Linear(*model_config.features(role), bias=role in model_config.biased, device="meta")
                self._place(f"{layout.layers}.{index}.{path}", module)
        self._place(layout.final_norm, RMSNorm(model_config.hidden_size, model_config.eps, device="meta"))
        if not model_config.tied:
            head = nn.Linear(model_config.hidden_size, model_config.vocab_size, bias=False, device="meta")
            self._place(layout.head, head)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are without the view, which they read from their own modules."""
        return {name: value for name, value in vars(self).items() if name != "_kept"}

    def _place(self, path, module):
        parent, _, name = path.rpartition(".")
        owner = self
        for step in filter(None, parent.split(".")):
            if not hasattr(owner, step):
                setattr(owner, step, nn.Module())
            owner = getattr(owner, step)
        setattr(owner, name, module)

    @property
    def device(self) -> torch.device:
        return self.get_submodule(self.layout.embed).weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.get_submodule(self.layout.embed).weight.dtype

    def _embedded(self, input_ids, inputs_embeds):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass input_ids or inputs_embeds, and not both.")
        return self.get_submodule(self.layout.embed)(input_ids) if inputs_embeds is None else inputs_embeds

    @staticmethod
    def _check_no_cache(past_key_values, use_cache):
        if past_key_values is not None or use_cache:
            raise ValueError(
                "a native model's forward pass has no cache: past_key_values must be None and use_cache False; "
                "use dkv.generate or dkv.replace_attention."
            )

    def _view(self) -> ModelView:
        """`find(self)`, kept until the modules, the config, or anything that `find` reads of a parameter changes."""
        if torch.compiler.is_compiling():
            return self.find(self)
        modules = [*self.modules()][1:]  # without the model, or it would keep itself alive
        parameters = [p for module in modules for p in module._parameters.values() if p is not None]
        tensors = [(id(p), p.shape, p.device) for p in parameters]  # tied weights have equal ids
        # the config as text: its values may be changed in place, and need not be comparable
        read_from, kept = (modules, tensors, repr(vars(self.config))), self._kept
        if kept is None or kept[0] != read_from:
            kept = self._kept = read_from, self.find(self)
        return kept[1]

    def _run(self, x, positions=None, attn_mask=None):
        """x (batch, seqlen, hidden_size); positions (batch or 1, seqlen), None: columns; attn_mask: as SDPA's."""
        view = self._view()
        if positions is None:
            cos, sin = (table[None, : x.shape[1], None] for table in view.rope_tables(x.shape[1], x.device))
        else:
            angles = view.rope_angles(positions)[:, :, None]
            cos, sin = angles.cos(), angles.sin()
        groups = view.nheads // view.nheads_k
        for layer in view.layers:
            h = layer.attn_norm(x)
            q, k, v = (project(h).unflatten(-1, (-1, view.headdim)) for project in (layer.q, layer.k, layer.v))
            # in float32 as LLaDA does; Dream's own code rotates in the model's dtype, where half precision rounds more
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
            if groups > 1:
                k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
            attended = _attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask)
            x = x + layer.o(attended.transpose(1, 2).flatten(2))
            h = layer.mlp_norm(x)
            x = x + layer.down(F.silu(layer.gate(h)) * layer.up(h))
        return Output(view.logits(view.final_norm(x)))

    @classmethod
    def random(
        cls, config: SimpleNamespace, *, seed: int, dtype: torch.dtype | None, device: torch.device
    ) -> "NativeModel":
        """Linear and embedding weights are normal with standard deviation 0.02, biases 0, norms 1."""
        model = cls(config)
        generator = torch.Generator(device).manual_seed(seed)
        for name, parameter in list(model.named_parameters()):
            tensor = torch.empty(parameter.shape, dtype=dtype, device=device)
            if tensor.dim() == 2:
                tensor.normal_(std=0.02, generator=generator)
            else:
                tensor.fill_(0 if name.endswith("bias") else 1)
            model._set_parameter(name, tensor)
        return model.eval()

    @classmethod
    def load(
        cls, folder: Path, config: SimpleNamespace, owner: str, *, dtype: torch.dtype | None, device: torch.device
    ) -> "NativeModel":
        """Reads every tensor once, straight to its device and dtype; dtype None: that of the first tensor.

        config and owner are what `dkv.models.folder.read_config` returned for the folder.
        """
        layout, model_config = cls.layout, cls.read_model_config(config, owner)
        stored = read_tensors(folder)
        if model_config.layers > len(stored):  # building that many could take for ever
            raise ValueError(
                f"{owner}: {layout.layers_field} is {model_config.layers}, but the weights have {len(stored)} tensors "
                "only."
            )
        model = cls(config, owner)
        embedding, head = f"{layout.embed}.weight", f"{layout.head}.weight"
        # some files of tied models hold the head too
        unused = {head} & stored.keys() if model_config.tied else set()
        _check_tensors(folder, stored, {name: tuple(p.shape) for name, p in model.named_parameters()}, unused)
        if unused and not _are_equal(stored, embedding, head):
            raise ValueError(
                f"{owner}: {layout.tied_field} is true, but {head} in {stored[head].file.name} is not the embedding."
            )
        for file in sorted({tensor.file for tensor in stored.values()}):
            with _opened(file, str(device)) as tensors:
                for name in sorted(set(tensors.keys()) - unused):
                    tensor = tensors.get_tensor(name)
                    dtype = dtype or tensor.dtype
                    model._set_parameter(name, tensor.to(dtype))
        return model.eval()

    def _set_parameter(self, name, tensor):
        module, _, name = name.rpartition(".")
        setattr(self.get_submodule(module), name, nn.Parameter(tensor))

    def save_pretrained(self, folder: str | os.PathLike[str], *, max_shard_bytes: int = 5 * 2**30) -> None:
        """Writes config.json and the weights in the official layout.

        Weights that were in the folder are replaced. Tokenizer files, generation_config.json and the modeling files
        that `trust_remote_code` runs are not written: copy them from the original checkpoint.

        Args:
            folder: made if it does not exist.
            max_shard_bytes: the maximum size of a file of weights; only a single tensor may exceed it.
        """
        if not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes must be a positive int, got {max_shard_bytes!r}.")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        shards = [{}]
        size = total = 0
        seen = set()
        for name, parameter in self.named_parameters(remove_duplicate=False):
            nbytes = parameter.numel() * parameter.element_size()
            if shards[-1] and size + nbytes > max_shard_bytes:
                shards.append({})
                size = 0
            # a file cannot hold the same memory twice
            shards[-1][name] = parameter.detach().clone() if parameter in seen else parameter.detach()
            seen.add(parameter)
            size, total = size + nbytes, total + nbytes
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        files = dict(zip(names if len(shards) > 1 else [WEIGHTS], shards, strict=True))
        for name, tensors in files.items():
            tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
            # renamed once complete: the parameters may be memory-mapped from the file of this name
            save_file(tensors, folder / f"{name}.part", metadata={"format": "pt"})
        for stale in (*folder.glob("model-*-of-*.safetensors"), folder / WEIGHTS, folder / INDEX):
            stale.unlink(missing_ok=True)
        for name in files:
            os.replace(folder / f"{name}.part", folder / name)
        if len(shards) > 1:
            weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
            _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        fields = {name: value for name, value in vars(self.config).items() if name != "dtype"}
        _write_json(folder / CONFIG, fields | {"torch_dtype": str(self.dtype).removeprefix("torch.")})


def _attention(q, k, v, attn_mask):
    """(batch, nheads, seqlen, headdim); zeros on every backend for a query to which a bool mask leaves no key."""
    if attn_mask is None or attn_mask.dtype != torch.bool:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
    empty = ~attn_mask.any(-1, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask | empty).masked_fill(empty, 0)


def _write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n")


def _check_tensors(folder, stored, expected, unused):
    """Raises ValueError unless the files hold the expected tensors (name -> shape) and, at most, the unused ones."""
    problems = {
        "missing": sorted(expected.keys() - stored.keys()),
        "unexpected": sorted(stored.keys() - expected.keys() - unused),
        "wrongly shaped": [
            f"{name} {stored[name].shape} instead of {shape}"
            for name, shape in expected.items()
            if name in stored and stored[name].shape != shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {some(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"the weights in {folder} do not fit its {CONFIG}; {listed}.")


@contextlib.contextmanager
def _opened(file, device="cpu"):
    """`safe_open`, but its errors name the file."""
    try:
        with safe_open(file, framework="pt", device=device) as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file}: {error}.") from error


def _are_equal(stored, *names):
    """Whether two stored tensors (rows, columns) are equal; reads them in pieces of 64 MiB."""
    first, second = (stored[name] for name in names)
    if first.shape != second.shape:
        return False
    with _opened(first.file) as a, _opened(second.file) as b:
        a, b = (file.get_slice(name) for file, name in zip((a, b), names, strict=True))
        rows, columns = first.shape
        step = max(1, 2**26 // (8 * columns))
        return all(torch.equal(a[i : i + step].double(), b[i : i + step].double()) for i in range(0, rows, step))
