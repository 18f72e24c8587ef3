"""The examples run as scripts, and do what they say."""

import runpy
import shutil
import subprocess

import pytest
import torch
from utils import ROOT, example

EXAMPLES = ROOT / "examples"


# many_prompts.py takes a model and prompts: tests/test_texts.py runs it
@pytest.mark.parametrize("name", [path.name for path in sorted(EXAMPLES.glob("*.py")) if path.stem != "many_prompts"])
def test_runs_as_a_script(name, capsys):
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert capsys.readouterr().out


def test_custom_layer_equals_plain_pytorch():
    assert example("custom_layer").main() < (1e-5 if not torch.cuda.is_available() else 1e-3)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.sh")), ids=lambda path: path.name)
def test_shell_script_parses(path):
    subprocess.run(["bash", "-n", path], check=True)
