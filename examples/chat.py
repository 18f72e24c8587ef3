"""Chat with a LLaDA or Dream in a terminal, and watch its answer form.

    python examples/chat.py GSAI-ML/LLaDA-8B-Instruct --policy DualCache --block-length 32
    python examples/chat.py Dream-org/Dream-v0-Instruct-7B --steps 64 < questions.txt

A diffusion model commits tokens anywhere in its answer: "░" is a place that is still masked. If the output is no
terminal, the answer appears from left to right, as far as it is final. An empty line starts over, Ctrl-C leaves an
answer, Ctrl-D ends.
"""

import argparse
import sys
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from transformers import AutoTokenizer

import dkv


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a repository of the hub or a folder")
    parser.add_argument("--gen-length", type=int, default=128)
    parser.add_argument("--block-length", type=int, help="without it there is one block")
    parser.add_argument("--steps", type=int, help="fewer than gen-length: several tokens a step")
    parser.add_argument("--policy", default="Decode", help="the name of a policy, such as DualCache")
    parser.add_argument("--temperature", type=float, default=0.0)
    options = vars(parser.parse_args(arguments))
    name = options.pop("model")
    model = dkv.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)  # Dream's tokenizer is code of its own
    show = redraw if sys.stdout.isatty() else append
    messages = []
    while (question := read()) is not None:
        if not question:
            messages = []
            continue
        messages.append({"role": "user", "content": question})
        try:
            answer = show(answers(model, tokenizer, messages, options))
            messages.append({"role": "assistant", "content": answer})
        except KeyboardInterrupt:
            messages.pop()


def read() -> str | None:
    """A line of the user; None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def answers(
    model: Any, tokenizer: Any, messages: list[dict[str, str]], options: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    """The answer after each step: the text of its final part, and all of it with a "░" for each mask."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    start = prompt["input_ids"].shape[1]
    for step in dkv.stream(model, prompt.to(model.device), eos_early_stop=True, **options):
        # reading is what waits for the GPU
        tokens, final = step.sequences[0, start:].tolist(), int(step.prefix)
        parts = []
        for is_mask, run in groupby(tokens, key=lambda token: token == model.config.mask_token_id):
            run = list(run)
            parts.append("░" * len(run) if is_mask else tokenizer.decode(run, skip_special_tokens=True))
        yield tokenizer.decode(tokens[:final], skip_special_tokens=True), "".join(parts)


def redraw(steps: Iterator[tuple[str, str]]) -> str:
    """Draws each step over the last one, on the terminal's second screen; prints and returns the final text."""
    final = ""
    print("\x1b[?1049h", end="")
    try:
        for step in steps:
            final, text = step
            print(f"\x1b[H\x1b[J{text}", end="", flush=True)
    finally:
        print("\x1b[?1049l", end="")
    print(final)
    return final


def append(steps: Iterator[tuple[str, str]]) -> str:
    """Prints what has become final; returns the final text."""
    shown = ""
    for final, _ in steps:
        # a character may need tokens that are not there yet
        if final.startswith(shown) and not final.endswith("\N{REPLACEMENT CHARACTER}"):
            print(final[len(shown) :], end="", flush=True)
            shown = final
    print(final[len(shown) :])
    return final


if __name__ == "__main__":
    main()
