"""Tiny checkpoints as the hub has them: config.json with auto_map, weights, tokenizer, and code that must not run."""

import json

import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
CONFIGURATION = """
from transformers import PretrainedConfig


class {name}Config(PretrainedConfig):
    model_type = "{model_type}"
"""
MODELING = 'raise RuntimeError("the code of the folder ran")'
# Dream's tokenizer is remote code, so this one is too
DREAM_TOKENIZER = '''
from transformers import PreTrainedTokenizer


class DreamTokenizer(PreTrainedTokenizer):
    """One token a character."""

    model_input_names = ["input_ids", "attention_mask"]
    vocab_size = 256

    def get_vocab(self):
        return {chr(i): i for i in range(254)} | {"<end>": 254, "<mask>": 255}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.get_vocab().get(token, 0)

    def _convert_id_to_token(self, index):
        return chr(index)

    def save_vocabulary(self, *args, **kwargs):
        return ()
'''


def llada_folder(folder):
    """A LLaDA of 256 tokens with a fast tokenizer of letters."""
    from transformers import PreTrainedTokenizerFast

    _model_files(folder, "LLaDA", tiny.llada_config())
    vocabulary = {chr(i): i for i in range(250)} | {"<unk>": 250, "<end>": tiny.EOS_ID, "<mask>": tiny.MASK_ID}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    special = {"unk_token": "<unk>", "pad_token": "<end>", "eos_token": "<end>", "mask_token": "<mask>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def dream_folder(folder):
    """A Dream of 256 tokens with a tokenizer of letters in remote code."""
    _model_files(folder, "Dream", tiny.dream_config())
    special = {"pad_token": "<end>", "eos_token": "<end>", "mask_token": "<mask>"}
    config = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config | special | {"chat_template": TEMPLATE}))
    (folder / "tokenization_dream.py").write_text(DREAM_TOKENIZER)


FOLDERS = {"llada": llada_folder, "dream": dream_folder}


def _model_files(folder, name, config):
    family = name.lower()
    code = {"AutoConfig": f"configuration_{family}.{name}Config", "AutoModel": f"modeling_{family}.{name}Model"}
    tiny.tiny_model(family, **config | {"auto_map": code}).save_pretrained(folder)
    text = CONFIGURATION.format(name=name, model_type=config["model_type"])
    (folder / f"configuration_{family}.py").write_text(text)
    (folder / f"modeling_{family}.py").write_text(MODELING)
