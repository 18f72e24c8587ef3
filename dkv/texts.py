"""`dkv.generate_texts`: prompts in, texts out, in batches of similar length."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import fields
from itertools import groupby, islice
from typing import Any, Literal, TypeVar, overload

import torch
from torch import nn

from dkv.config import GenerateConfig
from dkv.generation import generate, resolved, run_key
from dkv.inputs import check_names, eos_ids_of, switch, whole
from dkv.models import view_of
from dkv.models.view import ModelView

__all__ = ["generate_texts"]

Prompt = str | Sequence[Mapping[str, Any]]
T = TypeVar("T")

WINDOW = 64  # batches whose prompts are read and sorted together
_OF_ONE_BATCH = ("attention_mask", "order", "output_history", "callback")


@overload
def generate_texts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Iterable[Prompt],
    *,
    batch_size: int = 8,
    ordered: Literal[True] = True,
    show_progress: bool = False,
    **options: Any,
) -> Iterator[str]: ...
@overload
def generate_texts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Iterable[Prompt],
    *,
    batch_size: int = 8,
    ordered: Literal[False],
    show_progress: bool = False,
    **options: Any,
) -> Iterator[tuple[int, str]]: ...
def generate_texts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Iterable[Prompt],
    *,
    batch_size: int = 8,
    ordered: bool = True,
    show_progress: bool = False,
    **options: Any,
) -> Iterator[str] | Iterator[tuple[int, str]]:
    """Generates a text for each prompt, in batches of similar length.

    Nothing is computed before the first text is asked for. Prompts are read in windows of 64 batches. A window is
    computed longest prompts first, and nothing behind it is read before all its texts have been taken.

    Like `dkv.generate`, it mutates the model at its first batch, and keeps the memory of a batch for the next.

    Args:
        model: as in `dkv.generate`, in eval mode.
        tokenizer: the model's, of transformers.
        prompts: strings, which are taken as they are, or chats, which the tokenizer's chat template turns into a prompt
            for the next answer: lists of messages {"role": ..., "content": ...}. Any iterable, also an endless one. An
            empty string becomes the tokenizer's BOS; without a BOS it is no prompt, and its text is unconditional.
        batch_size: prompts per batch.
        ordered: True: texts in the order of the prompts; the first may come at the end of the window. False: pairs
            (index of the prompt, text), as soon as they are ready.
        show_progress: show a bar that counts prompts, and the tokens before ends of text per second.
        options: those of `dkv.generate`, except order, output_history and callback. eos_early_stop is on unless given.

    Returns:
        An iterator over the texts. A text ends before its first end of text or end of turn (or eos_token_id), and holds
        no special tokens.

    Raises:
        ValueError, TypeError: at the call: unsuitable options, an unsupported model, prompts that are no iterable of
            prompts. When a window is read, before any of its texts: a prompt that is neither a string nor a chat, or
            that is too long.

    Example:
        >>> for text in dkv.generate_texts(model, tokenizer, ["Why?", "How?"], gen_length=128, block_length=32):
        ...     print(text)
    """
    whole("batch_size", batch_size, minimum=1)
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
        hint = "pass [prompt] for a single one" if isinstance(prompts, str | Mapping) else "pass a list, for example"
        raise TypeError(f"prompts must be an iterable of strings or chats, got {type(prompts).__name__}; {hint}.")
    if not hasattr(tokenizer, "decode"):
        raise TypeError(
            f"tokenizer must be a tokenizer, got {type(tokenizer).__name__}; pass AutoTokenizer.from_pretrained(...)."
        )
    for name in _OF_ONE_BATCH:
        if name in options:
            raise TypeError(f"{name} is about one batch of dkv.generate; leave it out of generate_texts.")
    generator = options.pop("generator", None)
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise TypeError(f"generator must be a torch.Generator or None, got {generator!r}.")
    check_names(options, [option.name for option in fields(GenerateConfig)])
    config = GenerateConfig(**({"eos_early_stop": True} | options))
    if config.gen_length == 0:
        raise ValueError("gen_length must be at least 1, got 0; call dkv.generate to fill in masks only.")
    view = view_of(model)
    check_for_model(config, view)
    room = view.max_positions - config.gen_length
    if room < 0:
        raise ValueError(f"gen_length must fit the model's {view.max_positions} positions, got {config.gen_length}.")
    total = len(prompts) if isinstance(prompts, Sized) else None
    show = {"total": total, "disable": not switch("show_progress", show_progress)}
    read = (_tokens(tokenizer, i, prompt, room) for i, prompt in enumerate(prompts))
    texts = _texts(model, tokenizer, read, batch_size, config, generator, show)
    return _in_order(texts) if switch("ordered", ordered) else texts


def _texts(model, tokenizer, prompts, batch_size, config, generator, show):
    """(index, text) of each of the prompts, which are lists of ids."""
    from tqdm.auto import tqdm

    start, tokens, first = time.perf_counter(), 0, 0
    with tqdm(desc="generate_texts", unit="prompt", **show) as progress:
        for window in batches(prompts, WINDOW * batch_size):
            for batch in continuations(model, window, batch_size, config, generator):
                tokens += sum(len(ids) for _, ids in batch)
                progress.set_postfix_str(f"{tokens / (time.perf_counter() - start):.1f} tokens/s", refresh=False)
                progress.update(len(batch))
                yield from ((first + i, tokenizer.decode(ids, skip_special_tokens=True)) for i, ids in batch)
            first += len(window)


def _in_order(texts):
    ready, due = {}, 0
    for i, text in texts:
        ready[i] = text
        while due in ready:
            yield ready.pop(due)
            due += 1


def _tokens(tokenizer, i, prompt, room):
    """The ids of prompt i, at most `room`."""
    if isinstance(prompt, str):
        ids = encode(tokenizer, prompt)
    elif isinstance(prompt, list | tuple) and prompt and all(map(_is_message, prompt)):
        text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        ids = encode(tokenizer, text, add_special_tokens=False)  # the template has written them
    else:
        hint = "; pass a chat as a list of its messages" if _is_message(prompt) else ""
        raise TypeError(
            f"prompt {i} must be a string or a list of messages with 'role' and 'content', got {prompt!r:.80}{hint}."
        )
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if len(ids) > room:
        raise ValueError(
            f"a prompt may have {room} tokens, the model's positions less gen_length, but prompt {i} has {len(ids)}; "
            "shorten the prompt or gen_length."
        )
    return ids


def _is_message(value):
    return isinstance(value, Mapping) and {"role", "content"} <= value.keys()


def encode(tokenizer: Any, text: str, add_special_tokens: bool | None = None) -> list[int]:
    """The ids of a text; None: a text that begins with the BOS gets no special tokens, so no second BOS."""
    if add_special_tokens is None:
        bos = tokenizer.bos_token
        add_special_tokens = not (bos and text.startswith(bos))
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)


def check_for_model(config: GenerateConfig, view: ModelView) -> None:
    """The checks of a config that need a model; ValueError."""
    run_key(resolved(config, view), view, batch=1, seqlen=1, has_prompt_masks=False)


def continuations(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    config: GenerateConfig,
    generator: torch.Generator | None = None,
) -> Iterator[list[tuple[int, list[int]]]]:
    """Batches of (index of the prompt, generated ids before the first end of text), longest prompts first.

    Every batch is padded on the left. An empty prompt is allowed.
    """
    view = view_of(model)
    ends, device = set(eos_ids_of(config.eos_token_id, view)), view.weight.device
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    # a row of nothing but padding is not allowed: empty prompts are batches of their own
    for _, group in groupby(order, key=lambda i: bool(prompts[i])):
        for batch in batches(group, batch_size):
            width = len(prompts[batch[0]])
            input_ids = torch.full((len(batch), width), view.pad_token_id, device="cpu")
            attention_mask = torch.zeros_like(input_ids)
            for row, i in enumerate(batch):
                column = width - len(prompts[i])
                input_ids[row, column:] = torch.tensor(prompts[i], device="cpu")
                attention_mask[row, column:] = 1
            output = generate(
                model, input_ids.to(device), attention_mask.to(device), generator=generator, **vars(config)
            )
            rows = output.sequences[:, width:].tolist()
            texts = [row[: next((n for n, token in enumerate(row) if token in ends), None)] for row in rows]
            yield [*zip(batch, texts, strict=True)]


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one perhaps shorter; reads only what it yields."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch
