"""A text for each of many prompts, on as many GPUs as there are; goes on where it was interrupted.

    torchrun --nproc_per_node 8 examples/many_prompts.py GSAI-ML/LLaDA-8B-Instruct prompts.jsonl texts/
    python examples/many_prompts.py GSAI-ML/LLaDA-8B-Instruct prompts.jsonl texts/    # one process, also on a CPU

Each line of prompts.jsonl is a JSON string, or a chat: [{"role": "user", "content": "..."}]. Process r of n takes the
lines r, r + n, r + 2n, ... and appends {"line": ..., "text": ...} to texts/r-of-n.jsonl when a text is ready. After an
interruption run the same command again, perhaps with another number of processes: lines that have a text are skipped.
The processes do not talk to each other.
"""

import json
import os
import sys
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
        todo = {i: json.loads(line) for i, line in enumerate(lines) if i % world == rank and i not in done}
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
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    count = main(*sys.argv[1:], batch_size=16, gen_length=256, block_length=32, policy=dkv.Decode(8))
    print(f"{count} texts written")
