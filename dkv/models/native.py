"""Native models: LLaDA and Dream as transformers models, in the official checkpoint layout and without remote code.

`dkv.models` imports this module, and with it transformers, when it makes or registers a native model, not before.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from huggingface_hub import HfApi, try_to_load_from_cache
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel

from dkv.config import GenerateConfig
from dkv.inputs import renamed
from dkv.layers import Modules, after_attention
from dkv.models import dream, llada
from dkv.models.folder import CONFIG, GENERATION_CONFIG, INDEX, WEIGHTS, read_generation_config
from dkv.models.layout import NORMS
from dkv.models.view import Layer, ModelView

if TYPE_CHECKING:
    from dkv.generation import GenerateOutput

# names of transformers' diffusion models, and of Dream's generation_config.json -> those of `dkv.generate`
OPTIONS = {"max_new_tokens": "gen_length", "max_denoising_steps": "steps", "alg": "remasking"}
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*")


class NativeConfig(PretrainedConfig):
    """The config of a native model: the fields of an official config.json, with defaults where transformers' differ.

    transformers' names of the sizes work too (hidden_size, num_hidden_layers, ...), and so do `config.get(name)` and
    `name in config`.
    """

    family: ClassVar[ModuleType]
    use_cache = False  # transformers 5 does not read it, but takes the keyword if it is there

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "NativeConfig":
        """As transformers'; ValueError for a model of this model_type that has another structure."""
        values = {"model_type": cls.model_type} | config_dict
        if not cls.family.describes(SimpleNamespace(**values)):
            got, name = values["model_type"], cls.family.FAMILY.name
            if got != cls.model_type:
                raise ValueError(f"{cls.__name__} needs model_type {cls.model_type!r}, got {got!r}; use AutoModel.")
            raise ValueError(
                f"{cls.__name__} is for {name}, but the config of {values.get('architectures')} has another structure. "
                f"dkv.register() made its model_type {got!r} mean {name}: load other models of that type in a process "
                "that does not call it."
            )
        return super().from_dict(config_dict, **kwargs)

    def get(self, name: str, default: Any = None) -> Any:
        """The field, or the default."""
        return getattr(self, name, default)

    def __contains__(self, name: str) -> bool:
        return hasattr(self, name)


class LLaDAConfig(NativeConfig):
    """The config of a LLaDA."""

    family, model_type, attribute_map = llada, "llada", llada.ATTRIBUTE_MAP

    def __init__(self, weight_tying: bool = True, **fields: Any):
        super().__init__(weight_tying=weight_tying, **fields)


class DreamConfig(NativeConfig):
    """The config of a Dream."""

    family, model_type, attribute_map = dream, "Dream", dream.ATTRIBUTE_MAP

    def __init__(self, tie_word_embeddings: bool = False, **fields: Any):
        if fields.get("rope_scaling", "") is None:  # the default, but transformers 5 warns of the name
            del fields["rope_scaling"]
        super().__init__(tie_word_embeddings=tie_word_embeddings, **fields)


class RMSNorm(nn.Module):
    """RMSNorm in float32 (in float64 for float64 inputs), rounded to the input's dtype, then scaled."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class DecoderLayer(nn.Module):
    """The modules of a layer at their official paths."""

    def forward(self, x: Tensor, layer: Layer, way: Modules) -> Tensor:
        """Runs the layer on x (batch, seqlen, hidden_size); layer: its modules by their roles."""
        attended = way.attend(layer, layer.attn_norm(x))
        x, _ = after_attention(way, layer, attended, x, next_norm=None)
        return x


class NativeModel(PreTrainedModel, GenerationMixin):
    """Base class of `LLaDA` and `Dream`: the tree of modules has the paths of the official code.

    The forward pass is plain and differentiable, and applies no dropout, not even in training. `dkv.generate` and
    `dkv.replace_attention` run the same modules on fused kernels.

    Args:
        config: of the class `config_class`. Token ids and rope_theta count from the next call on if they are changed;
            sizes and eps are those of the modules.

    Attributes:
        model_config: the `dkv.models.layout.ModelConfig` that the model was built from.
    """

    family: ClassVar[ModuleType]

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["DecoderLayer"]

    _kept = None  # (modules, parameters and config that the last view was read from; that view)
    _source = None  # the folder that the model was loaded from

    def __init__(self, config: NativeConfig):
        super().__init__(config)
        layout = self.family.LAYOUT
        self.model_config = model_config = self.family.read_model_config(config, "config")
        self._place(layout.embed, nn.Embedding(model_config.vocab_size, model_config.hidden_size))
        self._place(layout.layers, nn.ModuleList(DecoderLayer() for _ in range(model_config.layers)))
        for index in range(model_config.layers):
            for role, path in layout.layer.items():
                if role in NORMS:
                    module = RMSNorm(model_config.hidden_size, model_config.eps)
                else:
                    module = nn.Linear(*model_config.features(role), bias=role in model_config.biased)
                self._place(f"{layout.layers}.{index}.{path}", module)
        self._place(layout.final_norm, RMSNorm(model_config.hidden_size, model_config.eps))
        self._place(layout.head, nn.Linear(model_config.hidden_size, model_config.vocab_size, bias=False))
        self.gradient_checkpointing = False
        self.post_init()

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

    def _embedded(self, input_ids, inputs_embeds):
        if (input_ids is None) == (inputs_embeds is None):
            got = "neither" if input_ids is None else "both"
            raise ValueError(f"one of input_ids or inputs_embeds must be given, got {got}; pass one.")
        given = input_ids if inputs_embeds is None else inputs_embeds
        if not isinstance(given, Tensor) or given.dim() != (2 if inputs_embeds is None else 3):
            got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(
                "input_ids must be a tensor of shape (batch, seqlen), or inputs_embeds one of shape (batch, seqlen, "
                f"hidden_size), got {got}; pass one, such as input_ids[None]."
            )
        return self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds

    def get_input_embeddings(self) -> nn.Module:
        return self.get_submodule(self.family.LAYOUT.embed)

    def set_input_embeddings(self, value: nn.Module) -> None:
        self._place(self.family.LAYOUT.embed, value)

    def get_output_embeddings(self) -> nn.Module:
        return self.get_submodule(self.family.LAYOUT.head)

    def set_output_embeddings(self, value: nn.Module) -> None:
        self._place(self.family.LAYOUT.head, value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As transformers'; an embedding_size in the config follows, because it goes before vocab_size."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        if getattr(self.config, "embedding_size", None) is not None:
            self.config.embedding_size = embedding.weight.shape[0]
        return embedding

    def _init_weights(self, module):
        for parameter in module.parameters(recurse=False):
            if not getattr(parameter, "_is_hf_initialized", False):  # loaded weights stay
                initialise(parameter, is_bias=parameter is getattr(module, "bias", None))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Literal["full"] | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        past_key_values: None = None,
        use_cache: Literal[False] | None = None,
        output_attentions: Literal[False] | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Logits of every position; those of a Dream's column j predict the token of column j + 1.

        Args:
            input_ids: (batch, seqlen) int64; or inputs_embeds (batch, seqlen, hidden_size).
            attention_mask: (batch, seqlen), 0 where a key is padding; more is possible, see `sdpa_mask` of
                `dkv.models.llada` and `dkv.models.dream`.
            position_ids: (batch or 1, seqlen), the RoPE positions, any numbers. None: 0, 1, 2, ... from the first
                column on, padding or not.
            labels: (batch, seqlen) int64, the tokens to predict, -100 where there is none. The loss is the mean of
                their cross entropies; putting masks into input_ids, and weights, are the caller's. Whoever computes a
                loss from the logits, as Trainer's label smoothing does, must shift a Dream's first.
            past_key_values, use_cache, output_attentions: must be None or False.
            output_hidden_states, return_dict: None: the config's.

        Returns:
            transformers' output: loss, logits (batch, seqlen, vocab), and hidden_states, (batch, seqlen, hidden_size)
            for the input of each layer and after the final norm.
        """
        if past_key_values is not None or use_cache:
            raise ValueError(
                "a native model's forward pass has no cache: past_key_values must be None and use_cache False; "
                "use model.generate, dkv.generate or dkv.replace_attention."
            )
        config = self.config
        if getattr(config, "output_attentions", False) if output_attentions is None else output_attentions:
            raise ValueError(
                "output_attentions must be False, got True: the weights are never in memory; leave it out and unset "
                "config.output_attentions."
            )
        wants_hidden = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if return_dict is None:
            return_dict = config.return_dict and not getattr(config, "torchscript", False)
        x = self._embedded(input_ids, inputs_embeds)
        view, mask = self._view(), None if attention_mask is None else self.family.sdpa_mask(attention_mask, x)
        way, hidden_states = Modules(view, self._angles(view, x, position_ids), mask), ()
        for module, layer in zip(self.get_submodule(self.family.LAYOUT.layers), view.layers, strict=True):
            hidden_states += (x,) if wants_hidden else ()
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(module.__call__, x, layer, way)
            else:
                x = module(x, layer, way)
        x = view.final_norm(x)
        logits = self.get_output_embeddings()(x)
        return self.family.make_output(
            logits,
            return_dict,
            loss=None if labels is None else _loss(logits, labels, self.family.FAMILY.shifted),
            hidden_states=(*hidden_states, x) if wants_hidden else None,
        )

    def _view(self) -> ModelView:
        """The view, kept until the modules, the config, or anything that `find` reads of a parameter changes."""
        if torch.compiler.is_compiling():
            return self.family.find(self)
        modules = [*self.modules()][1:]  # without the model, or it would keep itself alive
        parameters = [p for module in modules for p in module._parameters.values() if p is not None]
        tensors = [(id(p), p.shape, p.device) for p in parameters]  # tied weights have equal ids
        # the config as text: its values may be changed in place, and need not be comparable
        read_from, kept = (modules, tensors, repr(vars(self.config))), self._kept
        if kept is None or kept[0] != read_from:
            kept = self._kept = read_from, self.family.find(self)
        return kept[1]

    def _angles(self, view, x, position_ids):
        batch, seqlen = x.shape[:2]
        if position_ids is None:
            cos, sin = (table[None, :seqlen] for table in view.rope_tables(seqlen, x.device))
            return cos, sin
        if position_ids.shape not in ((batch, seqlen), (1, seqlen)):
            raise ValueError(
                f"position_ids must have shape (batch, seqlen) = {(batch, seqlen)}, got {tuple(position_ids.shape)}."
            )
        angles = view.rope_angles(position_ids)
        return angles.cos(), angles.sin()

    def generate(
        self,
        input_ids: Tensor | Mapping[str, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        *,
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> "GenerateOutput":
        """`dkv.generate` of this model, with the same result and options, among them gen_length, steps, block_length,
        policy, temperature and threshold.

        Names of transformers and of Dream work too: inputs (input_ids), max_new_tokens (gen_length),
        max_denoising_steps (steps), alg (remasking), do_sample.

        Args:
            generation_config: defaults of the options, other than token ids; a policy by its name. None:
                `model.generation_config`, which is saved with the model. As in transformers, temperature (1.0 if it has
                none), top_p and top_k count with do_sample=True only. Values that transformers has by default count as
                none, such as a top_k of 50.

        Example:
            >>> output = model.generate(**batch, max_new_tokens=128, block_length=32)
        """
        from dkv.generation import generate  # here, because dkv.generation is above dkv.models

        config = self.generation_config if generation_config is None else generation_config
        if not isinstance(config, GenerationConfig):
            got = type(config).__name__
            raise TypeError(f"generation_config must be a transformers.GenerationConfig, got {got}; pass **options.")
        if not isinstance(getattr(config, "policy", ""), str):
            raise TypeError(
                f"generation_config.policy must be a name, because it is saved as JSON, got {config.policy!r}; pass "
                "policy=... to generate."
            )
        known = {option.name for option in fields(GenerateConfig)} - {"eos_token_id", "mask_id"}
        saved = {name: value for name, value in config.to_diff_dict().items() if OPTIONS.get(name, name) in known}
        asked = options.pop("do_sample", None)
        if config.do_sample if asked is None else asked:
            saved.setdefault("temperature", 1.0)
            if saved.get("top_k") == 50:  # transformers 4 leaves out its defaults, transformers 5 has none
                del saved["top_k"]
        else:
            saved = {name: value for name, value in saved.items() if name not in ("temperature", "top_p", "top_k")}
        if asked is False and options.get("temperature"):
            raise ValueError(
                f"temperature must be 0 with do_sample=False, got {options['temperature']}; leave out one."
            )
        saved = renamed({name: value for name, value in saved.items() if value is not None}, OPTIONS)
        input_ids = options.pop("inputs", None) if input_ids is None else input_ids
        return generate(self, input_ids, attention_mask, **saved | renamed(options, OPTIONS))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> Any:
        """transformers' `from_pretrained`."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        given = model.generation_config if options.get("generation_config") is not None else None
        model.set_source(_folder_of(pretrained_model_name_or_path, **options))
        model.generation_config = given or model.generation_config
        return loaded

    def set_source(self, folder: Path | None) -> None:
        """Says where the model was loaded from; reads the options of generation_config.json there."""
        if folder is not None:
            self._source = folder.resolve()
            self.generation_config = generation_config_of(folder) or self.generation_config

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **options: Any
    ) -> None:
        """transformers' `save_pretrained`, for a folder that loads by itself.

        Files of the tokenizer, unless save_directory has one, and code of the hub are copied from where the model was
        loaded. A tokenizer that was never downloaded is not there. Old weights are replaced once the new ones are
        complete, because the parameters may be memory-mapped from them. With push_to_hub=True, all files that were
        written are uploaded. Mutates the config: tie_word_embeddings becomes what the modules are.
        """
        if not is_main_process:  # that one writes everything
            return
        folder, architectures = Path(save_directory), self.config.architectures
        is_pushed, repository = options.pop("push_to_hub", False), options.pop("repo_id", folder.name)
        head = self.get_output_embeddings()
        self.config.tie_word_embeddings = getattr(head, "weight", None) is self.get_input_embeddings().weight
        # otherwise transformers would not load the options that only dkv has
        self.generation_config._from_model_config = False
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as part:
            super().save_pretrained(part, **options)
            self.config.architectures = architectures or self.config.architectures  # the official name stays
            written = sorted(os.listdir(part))
            if CONFIG in written:  # not for an adapter
                self.config.save_pretrained(part)
            if any(name.startswith(("model", "pytorch_model")) for name in written) and not options.get("variant"):
                for stale in (*folder.glob("model-*-of-*.safetensors"), folder / WEIGHTS, folder / INDEX):
                    stale.unlink(missing_ok=True)
            for name in written:
                os.replace(Path(part, name), folder / name)
        if self._source is not None:
            has_tokenizer = any(file for pattern in TOKENIZER for file in folder.glob(pattern))
            for pattern in (*(() if has_tokenizer else TOKENIZER), "*.py"):
                for file in self._source.glob(pattern):
                    if file.is_file() and not (folder / file.name).exists():
                        shutil.copyfile(file, folder / file.name)
                        written.append(file.name)
        if is_pushed:
            hub = HfApi(token=options.get("token"))
            repository = hub.create_repo(repository, private=options.get("private"), exist_ok=True).repo_id
            commit = {name: options[name] for name in ("commit_message", "revision", "create_pr") if name in options}
            hub.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=written, **commit)


class LLaDA(NativeModel):
    """A LLaDA of the official checkpoint layout."""

    family, config_class = llada, LLaDAConfig
    _tied_weights_keys = {f"{llada.LAYOUT.head}.weight": f"{llada.LAYOUT.embed}.weight"}


class Dream(NativeModel):
    """A Dream of the official checkpoint layout."""

    family, config_class = dream, DreamConfig
    _tied_weights_keys = {f"{dream.LAYOUT.head}.weight": f"{dream.LAYOUT.embed}.weight"}


NATIVE = {llada: LLaDA, dream: Dream}


def initialise(tensor: Tensor, *, is_bias: bool, generator: torch.Generator | None = None) -> Tensor:
    """Fills a parameter in place and returns it: matrices are normal, norms 1, biases 0."""
    if tensor.dim() == 2:
        return nn.init.normal_(tensor, std=0.02, generator=generator)
    return nn.init.constant_(tensor, 0 if is_bias else 1)


def _loss(logits, labels, shifted):
    if shifted:
        logits = torch.cat((logits[:, :1], logits[:, :-1]), dim=1)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def generation_config_of(folder: Path) -> GenerationConfig | None:
    """The options that generation_config.json of a folder has, or None."""
    values = read_generation_config(folder)
    if not values:
        return None
    # otherwise transformers drops the options that only dkv has
    config = config_from(str(folder / GENERATION_CONFIG), GenerationConfig, values | {"_from_model_config": False})
    config._original_object_hash = hash(config)  # so that transformers saves it as it was read
    return config


def config_from(owner: str, make: type, values: dict[str, Any]) -> Any:
    """make(**values), a config of transformers; its errors name the owner of the values."""
    try:
        return make(**values)
    except Exception as error:  # of any class: the values may be anything
        raise ValueError(f"{owner}: transformers must be able to read it, got {error}; correct it.") from error


def _folder_of(name, *, subfolder="", cache_dir=None, revision=None, **_):
    """The absolute folder that transformers read, or None."""
    if name is None:
        return None
    if Path(name).is_dir():
        return Path(name, subfolder).resolve()
    config = try_to_load_from_cache(str(name), f"{subfolder}/{CONFIG}".lstrip("/"), cache_dir, revision)
    return Path(config).parent if isinstance(config, str) else None
