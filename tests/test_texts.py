"""`dkv.generate_texts`: texts are those of `dkv.generate` prompt by prompt, windows, what is refused and when."""

import itertools
import json

import official
import pytest
import tiny
import torch
from utils import example

import dkv
import dkv.texts
from dkv.texts import generate_texts

BOS_ID = 253
PROMPTS = ["add 17 and 25", "why", "say it again, please", "no"]
CHAT = [{"role": "user", "content": "hi"}]


class Letters:
    """A tokenizer of one token a character, with nothing but the calls that every tokenizer has."""

    def __init__(self, bos="<begin>", adds_bos=False):
        self.bos_token, self.bos_token_id, self.adds_bos = bos, BOS_ID if bos else None, adds_bos

    def encode(self, text, add_special_tokens=True):
        ids = [BOS_ID] * (add_special_tokens and self.adds_bos)
        if self.bos_token and text.startswith(self.bos_token):
            ids, text = [*ids, BOS_ID], text.removeprefix(self.bos_token)
        return ids + [ord(character) for character in text]

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(i) if i < 252 else "" if skip_special_tokens else "<special>" for i in ids)

    def apply_chat_template(self, chat, tokenize=True, add_generation_prompt=False):
        assert not tokenize and add_generation_prompt
        return (self.bos_token or "") + "".join(f"[{m['role']}]{m['content']}" for m in chat) + ">"


def alone(model, ids, **options):
    """The text of one prompt, up to its end of text."""
    options = {"gen_length": 12} | options
    ids = dkv.generate(model, torch.tensor([ids], dtype=torch.long), **options).sequences[0, len(ids) :].tolist()
    return Letters().decode(ids[: ids.index(tiny.EOS_ID)] if tiny.EOS_ID in ids else ids, skip_special_tokens=True)


@pytest.fixture
def calls(monkeypatch):
    """(input_ids, attention_mask, options) of each batch, whose generated tokens are "x", BOS, end of text, "y"."""
    calls = []

    def generate(model, input_ids, attention_mask, **options):
        calls.append((input_ids, attention_mask, options))
        tail = torch.tensor([[ord("x"), BOS_ID, tiny.EOS_ID, ord("y")]]).expand(len(input_ids), -1)
        return dkv.GenerateOutput(torch.cat((input_ids, tail), dim=1), stats=None)

    monkeypatch.setattr(dkv.texts, "generate", generate)
    return calls


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_texts_are_those_of_each_prompt_alone(family):
    model, letters = tiny.model(family), Letters()
    options = {"policy": dkv.Decode(3), "gen_length": 8}
    wanted = [alone(model, letters.encode(prompt), **options) for prompt in PROMPTS]
    wanted.append(alone(model, [BOS_ID, *letters.encode("[user]hi>")], **options))
    prompts = [*PROMPTS, CHAT]
    assert list(generate_texts(model, letters, prompts, batch_size=3, **options)) == wanted
    pairs = list(generate_texts(model, letters, prompts, batch_size=3, ordered=False, **options))
    assert sorted(pairs) == list(enumerate(wanted)) and pairs[0] == (2, wanted[2])  # longest first
    # a text ends before what ends it, stopped early or not
    end = wanted[0][4]
    assert [text.split(end)[0] for text in wanted] != wanted
    for early in ({}, {"eos_early_stop": False}):
        cut = generate_texts(model, letters, PROMPTS, eos_token_id=[tiny.EOS_ID, ord(end)], **early, **options)
        assert list(cut) == [text.split(end)[0] for text in wanted[:-1]]
    assert not hasattr(model, "_dkv")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_real_tokenizers(family, tmp_path):
    """A fast one, and a slow one of remote code."""
    from transformers import AutoTokenizer

    official.FOLDERS[family](tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    model = dkv.from_pretrained(tmp_path, device="cpu")
    texts = generate_texts(model, tokenizer, ["why", CHAT], gen_length=12)
    for prompt, text in zip(("why", "[user]hi>"), texts, strict=True):
        ids = torch.tensor([[ord(character) for character in prompt]])
        ids = dkv.generate(model, ids, gen_length=12).sequences[0, len(prompt) :].tolist()
        ids = ids[: ids.index(tiny.EOS_ID)] if tiny.EOS_ID in ids else ids
        assert text == tokenizer.decode(ids, skip_special_tokens=True)


def test_windows_are_sorted_and_nothing_behind_them_is_read(calls, monkeypatch):
    monkeypatch.setattr(dkv.texts, "WINDOW", 3)
    read = itertools.count()
    prompts = ("a" * (1 + next(read) % 6) for _ in itertools.count())  # endless
    texts = generate_texts(tiny.model("llada"), Letters(), prompts, batch_size=2, ordered=False)
    assert next(read) == 0
    assert [index for index, _ in itertools.islice(texts, 6)] == [4, 3, 2, 1, 0, 5]
    assert next(read) == 7
    assert next(texts) == (9, "x")  # of the second window
    del calls[3:]
    assert [tuple(ids.shape) for ids, _, _ in calls] == [(2, 6), (2, 4), (2, 2)]
    for ids, mask, options in calls:
        assert torch.equal(mask.sum(1), torch.tensor([ids.shape[1], ids.shape[1] - 1]))
        assert ids[1, 0] == tiny.EOS_ID and not mask[1, 0]  # the pad token
        assert options["eos_early_stop"] is True
    # in order, a text comes as soon as it and those before it are there
    calls.clear()
    texts = generate_texts(tiny.model("llada"), Letters(), ["a", "bbb", "ccc", "d"], batch_size=2)
    assert next(texts) == "x" and len(calls) == 2
    texts = generate_texts(tiny.model("llada"), Letters(), ["aaa", "bbb", "c", "d"], batch_size=2)
    assert next(texts) == "x" and len(calls) == 3


def test_empty_prompts(calls):
    model = tiny.model("llada")
    assert list(generate_texts(model, Letters(), ["", "abc"])) == ["x", "x"]
    assert [ids[mask.bool()].tolist() for ids, mask, _ in calls] == [[97, 98, 99, BOS_ID]]
    calls.clear()
    assert list(generate_texts(model, Letters(bos=None), ["", "abc", ""])) == ["x"] * 3
    assert [tuple(ids.shape) for ids, _, _ in calls] == [(1, 3), (2, 0)]


def test_an_unconditional_text():
    model = tiny.model("llada")
    assert list(generate_texts(model, Letters(bos=None), [""], gen_length=12)) == [alone(model, [])]


def test_the_bos_is_not_doubled(calls):
    letters = Letters(adds_bos=True)
    list(generate_texts(tiny.model("llada"), letters, ["abcd", "<begin>abc", [{"role": "", "content": ""}]]))
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(calls[0][0], calls[0][1], strict=True)]
    assert [row.count(BOS_ID) for row in rows] == [1, 1, 1] and all(row[0] == BOS_ID for row in rows)


def test_a_generator_repeats_the_texts():
    def texts(seed):
        generator = torch.Generator().manual_seed(seed)
        options = {"gen_length": 12, "temperature": 1.0, "generator": generator}
        return list(generate_texts(tiny.model("dream"), Letters(), PROMPTS, **options))

    assert texts(0) == texts(0) != texts(1)


def test_progress_counts_prompts_and_tokens(calls, capsys):
    list(generate_texts(tiny.model("llada"), Letters(), PROMPTS, show_progress=True))
    assert "4/4" in (shown := capsys.readouterr().err) and "tokens/s" in shown


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"ordered": 1}, TypeError, "ordered must be True or False"),
        ({"show_progress": "no"}, TypeError, "show_progress must be True or False"),
        ({"max_new_tokens": 8}, TypeError, "pass gen_length"),
        ({"attention_mask": None}, TypeError, "attention_mask is about one batch"),
        ({"order": None}, TypeError, "order is about one batch of dkv.generate"),
        ({"output_history": True}, TypeError, "output_history is about one batch"),
        ({"callback": print}, TypeError, "callback is about one batch"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator or None, got 3"),
        ({"gen_length": 0}, ValueError, "gen_length must be at least 1, got 0"),
        ({"temperature": -1}, ValueError, "temperature must be at least 0"),
        ({"policy": "Greedy"}, ValueError, "use remasking='random'"),
        ({"policy": dkv.Decode(shift="un")}, ValueError, "shift .* must be None for LLaDA"),
        ({"mask_id": 256}, ValueError, "mask_id must be in the vocabulary"),
        ({"eos_token_id": 256}, ValueError, "eos_token_id must be in the vocabulary"),
        ({"model": torch.nn.Linear(1, 1)}, ValueError, "Linear is not supported"),
        ({"tokenizer": "folder"}, TypeError, r"must be a tokenizer, got str; pass AutoTokenizer"),
        ({"prompts": "why"}, TypeError, r"iterable of strings or chats, got str; pass \[prompt\]"),
        ({"prompts": CHAT[0]}, TypeError, r"got dict; pass \[prompt\]"),
        ({"prompts": None}, TypeError, "got NoneType; pass a list"),
    ],
)
def test_refused_at_the_call(options, error, message):
    def prompts():
        pytest.fail("a prompt was read")
        yield

    arguments = {"model": tiny.model("llada"), "tokenizer": Letters(), "prompts": prompts()} | options
    with pytest.raises(error, match=message):
        generate_texts(**arguments)


@pytest.mark.parametrize(
    "prompts, error, message",
    [
        (["a", "b" * 500], ValueError, "a prompt may have 384 tokens, .* but prompt 1 has 500; shorten"),
        (["a", 7], TypeError, "prompt 1 must be a string or a list of messages .* got 7"),
        (CHAT, TypeError, "prompt 0 must be .* pass a chat as a list of its messages"),
        (["a", []], TypeError, r"prompt 1 must be .* got \[\]"),
        ([[{"role": "user"}]], TypeError, "'role' and 'content'"),
    ],
)
def test_a_bad_prompt_is_named(calls, prompts, error, message):
    texts = generate_texts(tiny.model("llada"), Letters(), prompts)
    with pytest.raises(error, match=message):
        next(texts)
    assert not calls


def test_training_mode_is_left_and_refused():
    model = tiny.tiny_model("llada").train()
    with pytest.raises(ValueError, match="model.eval"):
        next(generate_texts(model, Letters(), ["a"]))
    assert model.training


def test_many_prompts_are_shared_by_processes_and_resumed(tmp_path, monkeypatch):
    model, prompts, out = tmp_path / "model", tmp_path / "prompts.jsonl", tmp_path / "texts"
    model.mkdir()
    official.llada_folder(model)
    lines = [*PROMPTS, CHAT]
    prompts.write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    def run(rank, world):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        return example("many_prompts").main(str(model), str(prompts), str(out), gen_length=4)

    assert (run(0, 2), run(1, 2)) == (3, 2)
    first, second = (out / f"{rank}-of-2.jsonl" for rank in (0, 1))
    found = [json.loads(line) for file in (first, second) for line in file.read_text().splitlines()]
    assert {each["line"] for each in found[:3]} == {0, 2, 4} and {each["line"] for each in found[3:]} == {1, 3}
    native = dkv.from_pretrained(model, device="cpu")
    for each in found[:2] + found[3:]:
        prompt = lines[each["line"]] if each["line"] < 4 else "[user]hi>"
        assert each["text"] == alone(native, [ord(character) for character in prompt], gen_length=4)
    # interrupted in the middle of a line, and resumed by another number of processes
    first.write_text(first.read_text()[:-5])
    assert (run(0, 2), run(1, 2), run(0, 1)) == (1, 0, 0)
    again = [json.loads(line) for file in (first, second) for line in file.read_text().splitlines()]
    assert again == found
