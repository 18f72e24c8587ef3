"""`dkv.memory`: merged weights save, move and are freed as before, and the memory of a run is that of one run only."""

import copy
import gc
import sys
import threading
import weakref

import pytest
import tiny
import torch
from safetensors.torch import load_file, load_model, save_model
from torch import nn

import dkv
from dkv.generation import prepare
from dkv.guard import Fingerprint
from dkv.linear import MergedLinear, is_plain
from dkv.memory import memory_of
from dkv.models import view_of

FAMILIES = ["llada", "dream"]
MASK = tiny.MASK_ID


def prompt(value=0, columns=6):
    return (torch.arange(columns)[None] + value) % 200


def generated(llm, **options):
    return dkv.generate(llm, prompt().to(llm.device), **{"gen_length": 4, "policy": dkv.Decode(2)} | options).sequences


def patched_call(llm):
    dkv.replace_attention(llm)
    with torch.no_grad():
        llm(torch.cat((prompt(), torch.full((1, 4), MASK)), dim=1).to(llm.device))


USES = {"generate": generated, "replace_attention": patched_call}


@pytest.fixture(params=FAMILIES)
def llm(request):
    """A model of the test's own."""
    return tiny.tiny_model(request.param)


def by_state_dict(llm, folder):
    return llm.state_dict()


def by_save_pretrained(llm, folder):
    llm.save_pretrained(folder, max_shard_size=2**16)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def by_safetensors(llm, folder):
    save_model(llm, str(folder / "model.safetensors"))
    other = tiny.tiny_model(view_of(llm).family.name.lower(), seed=1)
    assert load_model(other, folder / "model.safetensors") == (set(), [])
    return other.state_dict()


def by_hub(llm, folder):
    hub = pytest.importorskip("huggingface_hub")
    hub.save_torch_model(llm, folder)
    return load_file(folder / "model.safetensors")


def by_accelerate(llm, folder):
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True).save_model(llm, folder)
    return load_file(folder / "model.safetensors")


def by_accelerate_state(llm, folder):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(llm)
    accelerator.save_state(folder)
    with torch.no_grad():
        saved = [parameter.clone() for parameter in llm.parameters()]
        for parameter in llm.parameters():
            parameter.zero_()
    accelerator.load_state(folder)
    assert prepared is llm and all(map(torch.equal, llm.parameters(), saved))
    return llm.state_dict()


def by_torch(llm, folder):
    torch.save(llm.state_dict(), folder / "weights.pt")
    # each tensor with its own memory and no more
    needed = sum(tensor.nbytes for tensor in llm.state_dict().values())
    assert (folder / "weights.pt").stat().st_size < 1.2 * needed
    return torch.load(folder / "weights.pt")


def by_torch_whole(llm, folder):
    torch.save(llm, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False).state_dict()


def by_checkpoint(llm, folder):
    from torch.distributed import checkpoint

    checkpoint.save({"model": llm.state_dict()}, checkpoint_id=folder, no_dist=True)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in llm.state_dict().items()}
    checkpoint.load({"model": loaded}, checkpoint_id=folder, no_dist=True)
    return loaded


def by_deepcopy(llm, folder):
    return copy.deepcopy(llm).state_dict()


WAYS = [
    by_state_dict,
    by_save_pretrained,
    by_safetensors,
    by_hub,
    by_accelerate,
    by_accelerate_state,
    by_torch,
    by_torch_whole,
    by_checkpoint,
    by_deepcopy,
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("way", WAYS)
def test_a_model_saves_as_before(llm, use, way, tmp_path):
    before = {name: tensor.clone() for name, tensor in llm.state_dict().items()}
    parameters = dict(llm.named_parameters())
    USES[use](llm)
    saved = way(llm, tmp_path)
    assert saved.keys() == before.keys() and all(torch.equal(saved[name], before[name]) for name in before)
    assert all(parameter is parameters[name] for name, parameter in llm.named_parameters())
    assert generated(llm).shape == (1, 10)


def test_weights_are_merged_and_held_once(llm):
    """Q, K and V lie next to each other, as gate and up do; each parameter has a storage of its own size."""
    storages = [weakref.ref(parameter.untyped_storage()) for parameter in llm.parameters()]
    generated(llm)
    for layer in view_of(llm).layers:
        for modules in ((layer.q, layer.k, layer.v), (layer.gate, layer.up)):
            for one, next_one in zip(modules, modules[1:], strict=False):
                assert one.weight.data_ptr() + one.weight.nbytes == next_one.weight.data_ptr()
    sizes = [(p.untyped_storage().nbytes(), p.nbytes) for p in llm.parameters()]
    assert all(held == needed for held, needed in sizes)
    gc.collect()
    merged = 5 + 3 * any(layer.q.bias is not None for layer in view_of(llm).layers)
    assert sum(storage() is None for storage in storages) == 3 * merged, "the old memory of what is merged is gone"


MOVES = {
    "half": lambda llm: llm.half(),
    "dtype": lambda llm: llm.to(torch.bfloat16),
    "meta": lambda llm: llm.to("meta"),
    "data": lambda llm: [setattr(p, "data", p.data.clone()) for p in llm.parameters()],
    "assign": lambda llm: llm.load_state_dict({k: v.clone() for k, v in llm.state_dict().items()}, assign=True),
    "collected": lambda llm: None,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("move", MOVES)
def test_nothing_of_the_old_weights_stays_alive(use, move):
    for family in FAMILIES:
        llm = tiny.tiny_model(family)
        USES[use](llm)
        old = [weakref.ref(parameter.untyped_storage()) for parameter in llm.parameters()]
        merged = [weakref.ref(MergedLinear((layer.q, layer.k, layer.v)).weight) for layer in view_of(llm).layers]
        assert all(reference() is not None for reference in (*old, *merged))
        MOVES[move](llm)
        if move == "collected":
            llm = None
        gc.collect()
        assert all(reference() is None for reference in (*old, *merged))
        if llm is not None and move in ("data", "assign"):
            assert torch.equal(generated(llm), generated(tiny.tiny_model(family)))


def test_a_part_that_is_replaced_is_merged_anew(llm):
    generated(llm)
    layer = view_of(llm).layers[1]
    with torch.no_grad():
        layer.k.weight.data = 3 * layer.k.weight.data
    assert torch.equal(generated(llm), generated(copy.deepcopy(llm)))
    assert layer.q.weight.data_ptr() + layer.q.weight.nbytes == layer.k.weight.data_ptr()
    dkv.restore_attention(llm)
    assert layer.q.weight.data_ptr() + layer.q.weight.nbytes != layer.k.weight.data_ptr(), "and separated"


@pytest.mark.parametrize("swap", ["parameter", "data"])
def test_a_new_weight_at_the_address_of_the_old_one_is_seen(llm, swap):
    """Whatever was cached with the old one is invalid."""
    weight = view_of(llm).layers[0].o
    memory = weight.weight.detach().numpy().copy()
    weight.weight = torch.nn.Parameter(torch.from_numpy(memory))
    dkv.replace_attention(llm, dkv.Decode(None))
    x = torch.cat((prompt(), torch.full((1, 8), MASK)), dim=1)
    before = weight.weight.data_ptr(), weight.weight._version
    with torch.no_grad():
        for column in range(6, 10):
            logits = llm(x).logits
            x = x.clone()
            x[:, column] = 5
    assert logits.isnan().any(), "a cached step"
    memory *= 2
    if swap == "data":
        weight.weight.data = torch.from_numpy(memory)
    else:
        weight.weight = torch.nn.Parameter(torch.from_numpy(memory))
    assert (weight.weight.data_ptr(), weight.weight._version) == before
    with torch.no_grad():
        assert not llm(x).logits.isnan().any()


def test_modules_that_two_models_share_are_merged_once(llm):
    other = tiny.tiny_model(view_of(llm).family.name.lower(), seed=1)
    for name, child in llm.named_children():
        setattr(other, name, child)
    want = generated(llm)
    addresses = [parameter.data_ptr() for parameter in llm.parameters()]
    assert torch.equal(generated(other), want) and torch.equal(generated(llm), want)
    assert addresses == [parameter.data_ptr() for parameter in other.parameters()], "merged once"


def in_threads(works):
    """Runs functions at once, in threads that switch as often as Python can; raises the first error of any."""
    errors = []

    def guarded(work):
        try:
            work()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]


def check_threads(llm, calls, threads=4):
    want = [dkv.generate(llm, prompt(i), gen_length=4, output_history=True) for i in range(threads)]

    def work(i):
        for call in range(calls):
            got = dkv.generate(llm, prompt(i), gen_length=4, output_history=call % 2 == 0)
            assert torch.equal(got.sequences, want[i].sequences)
            if got.history is not None:
                assert torch.equal(got.history, want[i].history)
                assert torch.equal(got.decoded_step, want[i].decoded_step)
            if i == 0 and call % 5 == 0:
                memory_of(llm).take("run")

    in_threads([lambda i=i: work(i) for i in range(threads)])


def test_threads_that_generate_with_one_model_get_their_own_tokens(llm):
    check_threads(llm, calls=4)


@pytest.mark.full
def test_threads_that_generate_with_one_model_often_get_their_own_tokens(llm):
    check_threads(llm, calls=300, threads=8)


def check_first_use(family, models, threads=3):
    want = [dkv.generate(tiny.tiny_model(family), prompt(i), gen_length=3).sequences for i in range(threads)]
    for _ in range(models):
        llm, found = tiny.tiny_model(family), [None] * threads

        def work(i, llm=llm, found=found):
            found[i] = dkv.generate(llm, prompt(i), gen_length=3).sequences

        in_threads([lambda i=i, work=work: work(i) for i in range(threads)])
        assert all(map(torch.equal, found, want))


@pytest.mark.parametrize("family", FAMILIES)
def test_threads_may_use_a_model_for_the_first_time_at_once(family):
    check_first_use(family, models=6)


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_threads_may_use_many_models_for_the_first_time_at_once(family):
    check_first_use(family, models=300)


def test_a_thread_that_comes_while_the_output_is_copied_does_not_change_it(llm, monkeypatch):
    """The next run gets the memory only once this one's output is copied."""
    want = generated(llm)
    first = prepare(llm, prompt(), gen_length=4, policy=dkv.Decode(2))
    copied = type(first).trimmed

    def copy_late(run, tensor):
        # another thread's run, from its start to its end, before this copy
        dkv.generate(llm, prompt(50), gen_length=4, policy=dkv.Decode(2))
        return copied(run, tensor)

    with first:
        while first.running():
            first.step()
        with monkeypatch.context() as patch:
            patch.setattr(first, "trimmed", lambda tensor: copy_late(first, tensor), raising=False)
            sequences, _ = first.finish()
    assert torch.equal(sequences, want)
    # and what was copied is not overwritten by whoever has the memory next
    dkv.generate(llm, prompt(50), gen_length=4, policy=dkv.Decode(2))
    assert torch.equal(sequences, want)


def test_threads_on_a_patched_model_get_the_right_logits(llm):
    """Also while one of them resets it."""
    x = [torch.cat((prompt(i), torch.full((1, 4), MASK)), dim=1) for i in range(3)]
    with torch.no_grad():
        want = [llm(each).logits for each in x]
    dkv.replace_attention(llm)

    def work(i):
        with torch.no_grad():
            for call in range(10):
                logits = llm(x[i]).logits
                computed = ~logits.isnan()
                assert torch.allclose(logits[computed], want[i][computed], atol=1e-4) and computed[x[i] == MASK].all()
                if i == 0 and call % 3 == 0:
                    dkv.reset(llm)

    in_threads([lambda i=i: work(i) for i in range(3)])


def test_float32_norms_of_a_model_in_half_precision_run_as_its_own_forward(llm):
    """As that does under autocast."""
    llm = llm.bfloat16()
    for parameter in llm.parameters():
        if parameter.dim() == 1 and parameter.shape == (64,):
            parameter.data = parameter.data.float()
    x = torch.cat((prompt(), torch.full((1, 4), MASK)), dim=1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want = llm(x).logits
        got = dkv.replace_attention(llm, dkv.Decode(2))(x).logits
        dkv.restore_attention(llm)
        assert generated(llm).shape == (1, 10)
    torch.testing.assert_close(got, want, atol=0.05, rtol=0.05)
    assert generated(llm).shape == (1, 10), "and without autocast"


def test_a_model_is_freed_with_its_last_reference(llm):
    """Without the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        generated(llm)
        storages = [weakref.ref(parameter.untyped_storage()) for parameter in llm.parameters()]
        kept = weakref.ref(memory_of(llm).run)
        names = [name for name, _ in llm.named_children()]
        for name in names:
            delattr(llm, name)
        del memory_of(llm).run
        assert kept() is None and all(storage() is None for storage in storages)
    finally:
        gc.enable()


@pytest.mark.parametrize("hooked", [False, True])
def test_a_model_that_ran_forward_is_freed(hooked):
    """With its last reference; in a cycle, through a hook that refers to the model, by the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        model = tiny.tiny_model("llada")
        if hooked:
            view_of(model).final_norm.register_forward_hook(lambda *args, model=model: None)
        model(prompt())
        model, reference = None, weakref.ref(model)
        assert (reference() is None) == (not hooked)
    finally:
        gc.enable()
    gc.collect()
    assert reference() is None


def test_a_weight_that_is_transposed_in_its_memory_is_seen(llm):
    q = view_of(llm).layers[0].q
    generated(llm)
    q.weight.data = q.weight.data.t()
    assert torch.equal(generated(llm), generated(copy.deepcopy(llm)))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_kernel_reads_a_weight_that_is_not_contiguous(family):
    llm = tiny.tiny_model(family)
    expected, view = generated(llm), view_of(llm)
    norm, head = view.final_norm, view.embed if view.head is None else view.head
    assert is_plain(head, (type(head),)) and is_plain(norm, (type(norm),)) and view.head_weight is head.weight
    head.weight = nn.Parameter(head.weight.detach().t().contiguous().t())
    norm.weight = nn.Parameter(norm.weight.detach().repeat_interleave(2)[::2])
    view = view_of(llm)
    assert view.head_weight is None and not is_plain(norm, (type(norm),))
    assert torch.equal(generated(llm), expected)


def test_parameters_that_share_memory_stay_where_they_are(llm):
    """Tied layers, parts of one storage, and memory that several processes share."""
    layers = view_of(llm).layers
    layers[1].k.weight = layers[0].k.weight
    layers[2].v.weight.data = layers[2].k.weight.data
    layers[0].gate.weight.share_memory_()
    addresses = [parameter.data_ptr() for parameter in (*layers[0].k.parameters(), *layers[2].v.parameters())]
    generated(llm)
    with torch.no_grad():
        layers[0].k.weight.mul_(3)
        layers[2].k.weight.mul_(2)
    assert torch.equal(generated(llm), generated(copy.deepcopy(llm)))
    assert torch.equal(layers[2].v.weight, layers[2].k.weight) and layers[1].k.weight is layers[0].k.weight
    assert layers[0].gate.weight.is_shared()
    assert addresses == [p.data_ptr() for p in (*layers[0].k.parameters(), *layers[2].v.parameters())]


def test_a_weight_may_consist_of_other_tensors(llm):
    """It may move, and a change of one of those is seen."""
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    o = view_of(llm).layers[0].o
    o.weight = torch.nn.Parameter(two_tensor.TwoTensor(o.weight.detach(), o.weight.detach().clone()))
    fingerprint = Fingerprint([o], values=True)
    assert fingerprint.unchanged()
    o.weight.a = 2 * o.weight.a
    assert not fingerprint.unchanged()
    generated(llm)
    llm.to(torch.float64)
    assert o.weight.dtype == torch.float64


def test_a_replaced_forward_of_any_class_is_called(llm):
    class Doubled:
        __slots__ = ("linear",)

        def __call__(self, x):
            return 2 * torch.nn.functional.linear(x, self.linear.weight, self.linear.bias)

    want, other = generated(llm), copy.deepcopy(llm)
    with torch.no_grad():
        view_of(other).layers[0].down.weight *= 2
    down = view_of(llm).layers[0].down
    doubled = Doubled()
    doubled.linear = down
    down.forward = doubled
    changed = generated(other)
    assert torch.equal(generated(llm), changed) and not torch.equal(changed, want)
    del down.forward
    assert torch.equal(generated(llm), want)


def test_an_unpatched_model_compiles_whole(llm):
    other, ids = tiny.tiny_model("llada"), prompt()
    with torch.no_grad():
        other(ids)
        mask = (torch.arange(ids.shape[1]) >= 2).expand(ids.shape)
        want = llm(ids, mask.long()).logits
        got = torch.compile(llm, backend="eager", fullgraph=True)(ids, mask.long()).logits
    torch.testing.assert_close(got, want)
