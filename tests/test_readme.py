"""The README's examples run as printed, on a tiny checkpoint that lies where they look for the real one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import tiny
from tokenizers import Tokenizer, models, pre_tokenizers

from dkv.models import from_config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def tiny_checkpoint(folder):
    """A LLaDA of 256 tokens with a tokenizer of letters, in the official layout."""
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    from_config(tiny.llada_config(), device="cpu").save_pretrained(folder)
    vocabulary = {chr(i): i for i in range(250)} | {"<unk>": 250, "<end>": tiny.EOS_ID, "<mask>": tiny.MASK_ID}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"unk_token": "<unk>", "pad_token": "<end>", "eos_token": "<end>", "mask_token": "<mask>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def test_examples_run_as_printed(tmp_path):
    tiny_checkpoint(tmp_path / "GSAI-ML" / "LLaDA-8B-Instruct")
    first, *blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert first == "dkv.replace_attention(model)\n" and len(blocks) == 5
    (tmp_path / "readme.py").write_text("\n".join(blocks))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "readme.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    assert "GenerateStats(steps=128" in run.stdout and "torch.Size([3, 64])" in run.stdout


def test_links_lead_somewhere():
    """To files that exist, and to headings of the page."""
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", README) if not link.startswith(("http://", "https://"))]
    headings = {
        re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.+)", README, re.M)
    }
    assert links
    for link in links:
        path, _, heading = link.partition("#")
        assert (ROOT / path).exists() and (path or heading in headings), link
