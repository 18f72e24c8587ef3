"""`dkv.stream` and `generate(callback=)`: what each step left, which consumers may read, keep, or walk away from."""

import weakref

import pytest
import torch
from tiny import EOS_ID as EOS
from tiny import FAMILIES, model, prompts
from tiny import MASK_ID as MASK

import dkv
from dkv.memory import memory_of
from dkv.run import Run

LENGTHS = {"gen_length": 12, "block_length": 6}
SETTINGS = {
    "plain": {"policy": dkv.Decode(3)},
    "threshold": {"threshold": 0.02},
    "noise": {"temperature": 0.7},
    "early stop": {"eos_early_stop": True, "eos_token_id": list(range(0, 250, 2))},
    "guidance": {"cfg_scale": 1.5},
}


def first_masks(sequences, generated):
    """The generated columns before the first mask, row by row."""
    rows = sequences[:, sequences.shape[1] - generated :].tolist()
    return [row.index(MASK) if MASK in row else generated for row in rows]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_stream_shows_every_step_of_generate(family, settings, device):
    """The same sequences after every step, all of them kept; a prefix never changes again."""
    options, (ids, real) = SETTINGS[settings] | LENGTHS, prompts(9, 5, device=device)
    called = []
    torch.manual_seed(0)
    whole = dkv.generate(model(family, device), ids, real, output_history=True, callback=called.append, **options)
    torch.manual_seed(0)
    outputs = []

    def consumer():
        outputs.append((yield from dkv.stream(model(family, device), ids, real, **options)))

    steps = list(consumer())
    assert torch.equal(outputs[0].sequences, whole.sequences) and outputs[0].stats == whole.stats
    for found in (steps, called):
        assert [step.step for step in found] == list(range(whole.stats.steps))
        assert torch.equal(torch.stack([step.sequences for step in found]), whole.history)
    assert torch.equal(steps[-1].sequences, whole.sequences)
    for step in steps:
        assert step.prefix.tolist() == first_masks(step.sequences, 12)
        for row, length in enumerate(step.prefix.tolist()):
            final = slice(0, 9 + length)
            assert torch.equal(step.sequences[row, final], whole.sequences[row, final])


def test_masks_inside_the_prompt_are_not_in_the_way(device):
    """prefix is about the generated columns; without any it is 0."""
    ids = prompts(6, device=device)[0]
    ids[0, 2] = MASK
    steps = list(dkv.stream(model("llada", device), ids, gen_length=3, block_length=1, remasking="random"))
    assert [step.prefix.item() for step in steps] == [first_masks(step.sequences, 3)[0] for step in steps]
    assert [step.prefix.tolist() for step in dkv.stream(model("llada", device), ids, gen_length=0)] == [[0]]


@pytest.mark.parametrize("leave", ["close", "break", "drop", "unused", "throw"])
def test_a_stream_that_is_left_gives_its_memory_back(leave, device):
    llm, (ids, real) = model("llada", device), prompts(9, 5, device=device)
    want = dkv.generate(llm, ids, real, **LENGTHS).sequences
    kept = weakref.ref(memory_of(llm).run)
    steps = dkv.stream(llm, ids, real, **LENGTHS)
    assert memory_of(llm).run is None, "the stream has it"
    if leave == "close":
        next(steps)
        steps.close()
    elif leave == "break":
        for step in steps:
            if step.step == 2:
                break
    elif leave == "drop":
        next(steps)
    elif leave == "throw":
        with pytest.raises(KeyError):
            steps.throw(KeyError("the consumer's"))
    del steps
    assert memory_of(llm).run is kept()
    assert torch.equal(dkv.generate(llm, ids, real, **LENGTHS).sequences, want)


def test_streams_in_turn_do_not_meet(device):
    """Two at once on one model, and a whole generation in between."""
    llm, inputs = model("dream", device), [prompts(9, 5, device=device), prompts(6, 12, seed=1, device=device)]
    alone = [dkv.generate(llm, *each, **LENGTHS).sequences for each in inputs]
    streams = [dkv.stream(llm, *each, **LENGTHS) for each in inputs]
    for _ in range(12):
        last = [next(steps) for steps in streams]
        dkv.generate(llm, inputs[0][0] + 1, gen_length=2)
    assert all(torch.equal(step.sequences, want) for step, want in zip(last, alone, strict=True))
    assert [next(steps, None) for steps in streams] == [None, None]


def test_what_does_not_fit_is_refused_at_the_call(device):
    llm, ids = model("llada", device), prompts(4, device=device)[0]
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_new_tokens'; pass gen_length"):
        dkv.stream(llm, ids, max_new_tokens=4)
    for name in ("show_progress", "output_history", "callback"):
        with pytest.raises(TypeError, match=f"{name} is an option of dkv.generate alone; leave it out"):
            dkv.stream(llm, ids, **{name: None})
    with pytest.raises(ValueError, match="steps must be at least 1"):
        dkv.stream(llm, ids, steps=0)
    with pytest.raises(TypeError, match="callback must be a function"):
        dkv.generate(llm, ids, callback=True)


def test_an_error_of_the_callback_is_the_callers(device):
    llm, ids = model("llada", device), prompts(4, device=device)[0]
    dkv.generate(llm, ids, gen_length=4)
    kept = weakref.ref(memory_of(llm).run)
    with pytest.raises(ZeroDivisionError):
        dkv.generate(llm, ids, gen_length=4, callback=lambda step: 1 / 0)
    assert memory_of(llm).run is kept()


def test_a_callback_may_generate(device):
    """On the same model, within a step of another run."""
    llm, ids = model("llada", device), prompts(4, device=device)[0]
    want = dkv.generate(llm, ids, gen_length=4).sequences
    inner = []
    outer = dkv.generate(
        llm, ids, gen_length=4, callback=lambda step: inner.append(dkv.generate(llm, ids, gen_length=4).sequences)
    )
    assert len(inner) == 4 and all(torch.equal(each, want) for each in (*inner, outer.sequences))


class Stream:
    """A CUDA stream, of which the waits are written down."""

    def __init__(self):
        self.waits = []

    def wait_stream(self, other):
        self.waits.append(other)

    def synchronize(self):
        self.waits.append("host")


def test_a_stream_follows_its_consumer_to_another_cuda_stream(monkeypatch):
    """The next step waits for the last one where it ran; the memory is free once the last stream has ended."""
    first, second = Stream(), Stream()
    start = Run.start

    def start_on_first(run, *args, **kwargs):
        start(run, *args, **kwargs)
        run.stream = first

    monkeypatch.setattr(Run, "start", start_on_first)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: second)
    steps = dkv.stream(model("llada"), prompts(4)[0], gen_length=3)
    next(steps)
    next(steps)
    steps.close()
    assert (first.waits, second.waits) == ([], [first, "host"])


def test_stats_count_tokens_before_the_ends_of_texts(device):
    """Masks of the prompt count, and what stands behind an end of text does not; the time is of this run."""
    llm, (ids, _) = model("llada", device), prompts(6, 6, device=device)
    ids[1, 2] = MASK
    ids[0, 1] = EOS
    found = dkv.generate(llm, ids, gen_length=8)
    assert found.stats.tokens == 17 and found.stats.seconds > 0
    assert found.stats.tokens_per_second == found.stats.tokens / found.stats.seconds
    end = int(found.sequences[0, 9])
    after = (found.sequences[:, 6:] == end).int().cumsum(1).gt(0).sum().item()
    assert after >= 5
    assert dkv.generate(llm, ids, gen_length=8, eos_token_id=end).stats.tokens == 17 - after
    assert dkv.GenerateStats().tokens_per_second == 0
