"""A text for each of many prompts, on as many GPUs as there are; goes on where it was interrupted.

    torchrun --nproc_per_node 8 examples/many_prompts.py GSAI-ML/LLaDA-8B-Instruct prompts.jsonl texts/
    python examples/many_prompts.py GSAI-ML/LLaDA-8B-Instruct prompts.jsonl texts/    # one process, also on a CPU

Each line of prompts.jsonl is a JSON string, which is taken as it is, or a chat for an Instruct model:
[{"role": "user", "content": "..."}]. Process r of n takes the
lines r, r + n, r + 2n, ... and appends {"line": ..., "text": ...} to texts/r-of-n.jsonl when a text is ready. After an
interruption run the same command again, perhaps with another number of processes: lines that have a text are skipped.
A killed process may leave half a line at the end of its file.
The processes do not talk to each other.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import dkv


def main(model: str, prompts: str, folder: str, **options: Any) -> int:
    """Returns how many texts this process has written."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    own = out / f"{rank}-of-{world}.jsonl"
    own.touch()
    os.truncate(own, own.read_bytes().rfind(b"\n") + 1)  # what an interruption left of a line
    written = [text for file in out.glob("*.jsonl") for text in file.open(encoding="utf-8") if text.endswith("\n")]
    done = {json.loads(text)["line"] for text in written}
    with open(prompts, encoding="utf-8") as lines:
        mine = ((i, line) for i, line in enumerate(lines) if i % world == rank and i not in done and line.strip())
        todo = {i: json.loads(line) for i, line in mine}
    if not todo:
        return 0

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    texts = dkv.generate_texts(
        dkv.from_pretrained(model, device=device),
        tokenizer,
        list(todo.values()),
        ordered=False,
        show_progress=rank == 0,
        **options,
    )
    numbers = list(todo)
    with own.open("a", encoding="utf-8") as file:
        for i, text in texts:
            print(json.dumps({"line": numbers[i], "text": text}), file=file, flush=True)
    return len(todo)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "prompts", "folder"):
        parser.add_argument(name)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--gen-length", type=int, default=256)
    parser.add_argument("--block-length", type=int, default=32)
    parser.add_argument("--policy", default="Decode", help="the name of a policy, such as DualCache")
    print(f"{main(**vars(parser.parse_args()))} texts written")
