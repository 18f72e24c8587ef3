"""The examples run as scripts, and do what they say."""

import io
import re
import runpy
import shutil
import subprocess

import official
import pytest
import torch
from utils import ROOT, example

import dkv

EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize("name", ["custom_layer.py", "minimal.py"])
def test_runs_as_a_script(name, capsys):
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert capsys.readouterr().out


def test_custom_layer_equals_plain_pytorch():
    assert example("custom_layer").main() < (1e-5 if not torch.cuda.is_available() else 1e-3)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.sh")), ids=lambda path: path.name)
def test_shell_script_parses(path):
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("terminal", [False, True])
def test_a_chat_has_turns(family, terminal, tmp_path, monkeypatch, capsys):
    """Each answer sees the turns before it, until an empty line; the text is that of `dkv.generate`."""
    official.FOLDERS[family](tmp_path)
    chat, options = example("chat"), {"gen_length": 12, "steps": 6}
    model = dkv.from_pretrained(tmp_path)
    tokenizer = chat.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)

    def answer(messages):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        found = dkv.generate(model, ids["input_ids"], ids["attention_mask"], eos_early_stop=True, **options).sequences
        return tokenizer.decode(found[0, -12:], skip_special_tokens=True)

    turns = [{"role": "user", "content": "why?"}]
    first = answer(turns)
    turns += [{"role": "assistant", "content": first}, {"role": "user", "content": "and?"}]
    second = answer(turns)
    monkeypatch.setattr(chat.sys, "stdin", io.StringIO("why?\nand?\n\nwhy?\n"))
    if terminal:
        monkeypatch.setattr(chat, "append", chat.redraw)
    chat.main([str(tmp_path), "--gen-length", "12", "--steps", "6"])
    output = capsys.readouterr().out
    assert output.count("░") > 3 if terminal else "░" not in output
    # without what the second screen showed
    assert re.sub(r"\x1b\[\?1049h.*?\x1b\[\?1049l", "", output, flags=re.DOTALL) == f"{first}\n{second}\n{first}\n"
