"""The examples do what they say."""

import importlib.util

import torch
from utils import ROOT


def test_custom_layer():
    """Its cached step equals plain PyTorch."""
    spec = importlib.util.spec_from_file_location("custom_layer", ROOT / "examples" / "custom_layer.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.main() < (1e-5 if not torch.cuda.is_available() else 1e-3)
