"""Folders of checkpoints: a hostile one is a ValueError that names the file, a legal one loads."""

import functools
import json
import pickle
import random
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load, save
from tiny import CONFIGS, Lookalike, tiny_model
from torch import nn

import dkv
from dkv.inputs import eos_ids_of
from dkv.models import from_config, from_pretrained, loader, view_of

CONFIG, GENERATION, WEIGHTS, INDEX = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
SMALL = {
    "llada": {"d_model": 16, "n_heads": 2, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 24, "embedding_size": 32},
    "dream": {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    | {"intermediate_size": 24},
}
IDS = {"vocab_size": 32, "mask_token_id": 31, "eos_token_id": 30, "pad_token_id": 30}


@functools.cache
def _good(family, sharded):
    with tempfile.TemporaryDirectory() as folder:
        model = from_config(CONFIGS[family](**SMALL[family], **IDS))
        model.save_pretrained(folder, max_shard_size=4000 if sharded else 2**30)
        (Path(folder) / GENERATION).unlink()  # it may be there; tests that are about it write their own
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def good(family="llada", sharded=False):
    """A folder that loads, file name -> bytes; its copy is the caller's."""
    return dict(_good(family, sharded))


def config_of(files):
    return json.loads(files[CONFIG])


def edit(files, name, **changes):
    """Fields of a JSON file changed, or left out (...)."""
    content = json.loads(files.get(name, b"{}")) | changes
    files[name] = json.dumps({key: value for key, value in content.items() if value is not ...}).encode()


def header_of(file):
    """(header, data) of a safetensors file."""
    length = int.from_bytes(file[:8], "little")
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def joined(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


# Each function (files, rng) spoils the files and returns the strings that the error must contain: a file, a field.

NO_SIZE = ["16", "", 1.5, 16.0, True, False, -1, 0, 2**30, 2**31, 2**63, 10**30, [16], {}, float("nan"), float("inf")]
NO_SWITCH = ["false", "true", "", 1.0, 0.0, 1, 0, -1, float("nan"), [], [False], {}, {"a": 1}]
NO_NUMBER = [0, -1, -0.5, "1e4", "", True, float("nan"), float("inf"), 10**400, [], [1.0], {}]
FIELDS = {
    "llada": {
        "sizes": "d_model n_heads n_kv_heads n_layers mlp_hidden_size embedding_size vocab_size max_sequence_length",
        "switches": "weight_tying include_qkv_bias multi_query_attention rope alibi include_bias bias_for_layer_norm "
        "attention_layer_norm input_emb_norm scale_logits layer_norm_with_affine",
        "names": "block_type layer_norm_type activation_type",
        "layers": "n_layers",
        "tied": "weight_tying",
    },
    "dream": {
        "sizes": "hidden_size num_attention_heads num_key_value_heads num_hidden_layers intermediate_size vocab_size "
        "max_position_embeddings",
        "switches": "tie_word_embeddings use_sliding_window use_mrope",
        "names": "hidden_act",
        "layers": "num_hidden_layers",
        "tied": "tie_word_embeddings",
    },
}


def fields(files, kind):
    return FIELDS[config_of(files)["model_type"].lower()][kind].split()


def an_invalid_size(files, rng):
    name = rng.choice(fields(files, "sizes"))
    edit(files, CONFIG, **{name: rng.choice(NO_SIZE)})
    return CONFIG, name


def a_size_of_another_model(files, rng):
    name = rng.choice(fields(files, "sizes")[:-2])
    edit(files, CONFIG, **{name: config_of(files)[name] * rng.choice([2, 3, 64, 10**6])})
    return (CONFIG,)


def layers_that_are_not_there(files, rng):
    count = rng.choice([1, 3, 1000, 10**6, 10**7, 2**30 - 1, 2**31, 2**63, 10**30])
    (name,) = fields(files, "layers")
    edit(files, CONFIG, **{name: count})
    return (CONFIG, name) if count > 100 else (CONFIG,)


def a_switch_that_is_none(files, rng):
    name = rng.choice(fields(files, "switches"))
    edit(files, CONFIG, **{name: rng.choice(NO_SWITCH)})
    return CONFIG, name


def a_tied_model_with_a_head_of_its_own(files, rng):
    (name,) = fields(files, "tied")
    edit(files, CONFIG, **{name: rng.choice([True, None])})
    return CONFIG, name


def a_number_that_cannot_be(files, rng):
    name = rng.choice(["rope_theta", "rms_norm_eps"])
    edit(files, CONFIG, **{name: rng.choice(NO_NUMBER)})
    return CONFIG, name


def a_name_that_is_none(files, rng):
    name = rng.choice([*fields(files, "names"), "model_type", "architectures", "torch_dtype"])
    edit(
        files, CONFIG, **{name: rng.choice(["", "nn", 5, True, [5], {}, [None], [["silu"]], float("nan"), {"a": "b"}])}
    )
    return CONFIG, name


def a_rope_that_is_none(files, rng):
    rope = rng.choice(["linear", "", 0, False, [], [1], {"type": "yarn"}, {"rope_type": []}, {"full": {}}])
    name = rng.choice(["rope_scaling", "rope_parameters"])
    edit(files, CONFIG, **{name: rope})
    return CONFIG, name


def an_id_that_is_none(files, rng):
    name, values = rng.choice(
        [
            ("mask_token_id", [True, False, -1, 32, 2**63, "31", 31.0, [31], {}, None, ...]),
            ("eos_token_id", [True, -1, 32, "30", 30.0, [], [True], ["30"], [30, 32], [30, -1], [[30]], {}, None, ...]),
            ("pad_token_id", [True, False, -2, -1.0, 32, "30", [30], [], {}]),
        ]
    )
    edit(files, CONFIG, **{name: rng.choice(values)})
    return CONFIG, name


def a_required_field_that_is_missing(files, rng):
    name = rng.choice([*fields(files, "sizes")[:2], *fields(files, "layers")])
    edit(files, CONFIG, **{name: ...})
    return (CONFIG, name) if name != "d_model" else (CONFIG,)  # by which LLaDA is told from others


def an_id_of_generation_config_that_is_none(files, rng):
    name = rng.choice(["mask_token_id", "eos_token_id", "pad_token_id"])
    value = rng.choice([True, "30", 1.5, [], {}, [True], [[30]], -2, 32, 2**63])
    if value in (-2, 32, 2**63):  # of the right kind: read where config.json has none
        edit(files, CONFIG, **{name: rng.choice([None, ...])})
    edit(files, GENERATION, **{name: value})
    return GENERATION, name


def a_file_that_is_no_json(files, rng):
    name = rng.choice([name for name in (CONFIG, GENERATION, INDEX) if name in files or name == GENERATION])
    text = files.get(name, b'{"eos_token_id": 30}')
    files[name] = rng.choice(
        [
            *(b"", b" ", b"[]", b'"text"', b"5", b"null", b"true", b"NaN", b"{", b"{}}", b"\xff\xfe\x00", b"\x00" * 64),
            *(b"[" * 100_000, b'{"a":' * 100_000, b'{"a": ' + b"7" * 5000 + b"}", text + b"}", text[: len(text) // 2]),
            *(pickle.dumps({"a": 1}), text.decode().encode("utf-16"), text.replace(b'"', b"'"), text + b" " * 10**7),
            text.replace(b"{", b'{"a": "\xe9", '),
        ]
    )
    return (name,)


def a_name_that_is_there_twice(files, rng):
    name = rng.choice([name for name in files if name != GENERATION])
    header, data = header_of(files[name]) if name.endswith(".safetensors") else (json.loads(files[name]), None)
    twice = rng.choice(sorted(header))
    text = b'{"%s": %s, ' % (twice.encode(), json.dumps(header[twice]).encode()) + json.dumps(header).encode()[1:]
    files[name] = text if data is None else joined(text, data)
    return name, "is there twice"


def a_file_that_is_missing(files, rng):
    name = rng.choice([name for name in files if name != INDEX])
    del files[name]
    return (name,)


def no_weight_map(files, rng):
    files.update(good(config_of(files)["model_type"].lower(), sharded=True))
    edit(files, INDEX, weight_map=rng.choice([..., None, [], "model.safetensors", 5, True, [["a", "b"]]]))
    return INDEX, "weight_map"


def a_weight_map_that_leaves_the_folder(files, rng):
    """The weights that it names would fit."""
    outside = "../good"
    files.pop(WEIGHTS, None)
    whole = good(config_of(files)["model_type"].lower())
    names = [name for name in header_of(whole[WEIGHTS])[0] if name != "__metadata__"]
    bad = rng.choice(
        [f"{outside}/{WEIGHTS}", f"a/../{outside}/{WEIGHTS}", f"./{outside}/{WEIGHTS}", f"..\\good\\{WEIGHTS}"]
        + [
            f"{{folder}}/good/{WEIGHTS}",
            "C:x.safetensors",
            "sub/x.safetensors",
            ".",
            "..",
            "",
            "x",
            "/dev/zero",
            "config.json",
        ]
        + [5, None, True, [WEIGHTS], {}]
    )
    edit(files, INDEX, weight_map=dict.fromkeys(names, bad))
    return INDEX, "weight_map"


def a_weight_map_of_odd_names(files, rng):
    odd = rng.choice(
        ["\0.safetensors", "x" * 300 + ".safetensors", "\ud800.safetensors", "none.safetensors", ".safetensors"]
    )
    edit(files, INDEX, weight_map={"a": odd})
    return (".safetensors",)


def shards_of(files):
    return sorted(name for name in files if name.startswith("model-"))


def a_weight_map_that_disagrees(files, rng):
    files.update(good(config_of(files)["model_type"].lower(), sharded=True))
    weight_map = json.loads(files[INDEX])["weight_map"]
    name = rng.choice(sorted(weight_map))
    match rng.randrange(3):
        case 0:
            weight_map[name] = rng.choice([shard for shard in shards_of(files) if shard != weight_map[name]])
        case 1:
            del weight_map[name]
            weight_map["other"] = shards_of(files)[0]
        case 2:
            weight_map["other"] = rng.choice(shards_of(files))
    edit(files, INDEX, weight_map=weight_map)
    return INDEX, "weight_map"


def a_tensor_in_two_shards(files, rng):
    files.update(good(config_of(files)["model_type"].lower(), sharded=True))
    one, other = rng.sample(shards_of(files), 2)
    tensors = load(files[one])
    name = rng.choice(sorted(tensors))
    copy = rng.choice([tensors[name].clone(), tensors[name] + 1, torch.zeros(3)])
    files[other] = save(load(files[other]) | {name: copy})
    return max(one, other), name


def weights_of(files, rng):
    return rng.choice([name for name in files if name.endswith(".safetensors")])


def a_file_that_is_no_safetensors(files, rng):
    name = weights_of(files, rng)
    file, size = files[name], len(files[name])
    length = rng.choice([0, 1, 7, size - 8, size, 10**7 + 1, 10**8, 2**31, 2**63, 2**64 - 1, rng.randrange(2, 300)])
    files[name] = rng.choice(
        [
            *(b"", b"{}", b"\x00" * 8, b"\x00" * 1000, b"weights\n" * 50, pickle.dumps({"a": list(range(99))})),
            *(file[: rng.randrange(size)], file + b"\x00" * rng.randrange(1, 9), file[1:], b"PK\x03\x04" + file),
            length.to_bytes(8, "little") + file[8:],
        ]
    )
    return (name,)


def a_header_that_is_no_json(files, rng):
    name = weights_of(files, rng)
    header, data = header_of(files[name])
    text = json.dumps(header).encode()
    changed = rng.choice(
        [
            *(b"[]", b"{}", b"5", b"{" + b" " * 99, b'{"a":' * 50_000, b"\xef\xbb\xbf" + text, b" " + text, text[:-1]),
            *(text.replace(b'"dtype"', b'"d\xfftype"'), text.decode().encode("utf-16"), text + b"]"),
        ]
    )
    files[name] = joined(changed, data)
    return (name,)


def an_entry_that_cannot_be(files, rng):
    name = weights_of(files, rng)
    header, data = header_of(files[name])
    tensor = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[tensor]
    (start, end), shape = entry["data_offsets"], entry["shape"]
    field, value = rng.choice(
        [
            (
                "dtype",
                rng.choice(["I8", "U8", "I64", "BOOL", "F8_E4M3", "F4", "f32", "F64", "F16", "", 5, None, ["F32"], {}]),
            ),
            (
                "shape",
                rng.choice([None, 5, "16", [], [-1], [1.0], ["16"], [True], {}, [*shape, 2], [2**64, 2**64], [1] * 99]),
            ),
            ("shape", [2**4000] * 8),
            (
                "data_offsets",
                rng.choice([None, [], [start], [start, end, end], {}, "0", [end, start], [-1, end], [start, end + 4]]),
            ),
            (
                "data_offsets",
                rng.choice([[start + 4, end + 4], [float(start), end], [0, 2**63], [True, end], [2**64, 2**65]]),
            ),
            ("", rng.choice([None, 5, [], "F32", {}, {"dtype": "F32"}])),
            ("__metadata__", rng.choice([None, 5, [], "pt", {"format": 5}, {"format": None}, {"a": {"b": "c"}}])),
        ]
    )
    if field == "__metadata__":
        header[field] = value
    elif field:
        entry[field] = value
    else:
        header[tensor] = value
    files[name] = joined(header, data)
    return name, field if field == "__metadata__" else tensor


def entries_that_overlap(files, rng):
    """Two tensors share their bytes, and bytes between others belong to none."""
    family = config_of(files)["model_type"].lower()
    files.clear()
    files.update(good(family))
    header, data = header_of(files[WEIGHTS])
    by_size = {}
    for key, entry in header.items():
        if key != "__metadata__":
            by_size.setdefault(entry["data_offsets"][1] - entry["data_offsets"][0], []).append(entry)
    same = rng.choice([entries for entries in by_size.values() if len(entries) > 1])
    one, other = rng.sample(same, 2)
    one["data_offsets"] = list(other["data_offsets"])
    files[WEIGHTS] = joined(header, data)
    return WEIGHTS, "data_offsets"


def tensors_of_another_model(files, rng):
    name = weights_of(files, rng)
    tensors = load(files[name])
    chosen = rng.choice(sorted(tensors))
    tensor = tensors.pop(chosen)
    changed = rng.choice([None, "renamed", "turned", "flat"])
    if changed is not None:
        tensor = {"renamed": tensor, "turned": tensor[None], "flat": tensor.flatten()[:-1].clone()}[changed]
        tensors["other" if changed == "renamed" else chosen] = tensor
    files[name] = save(tensors)
    return (INDEX if INDEX in files and changed in (None, "renamed") else CONFIG, chosen)


KINDS = [
    an_invalid_size,
    a_size_of_another_model,
    layers_that_are_not_there,
    a_switch_that_is_none,
    a_tied_model_with_a_head_of_its_own,
    a_number_that_cannot_be,
    a_name_that_is_none,
    a_rope_that_is_none,
    an_id_that_is_none,
    a_required_field_that_is_missing,
    an_id_of_generation_config_that_is_none,
    a_file_that_is_no_json,
    a_name_that_is_there_twice,
    a_file_that_is_missing,
    no_weight_map,
    a_weight_map_that_leaves_the_folder,
    a_weight_map_of_odd_names,
    a_weight_map_that_disagrees,
    a_tensor_in_two_shards,
    a_file_that_is_no_safetensors,
    a_header_that_is_no_json,
    an_entry_that_cannot_be,
    entries_that_overlap,
    tensors_of_another_model,
]

_EVENTS = None  # a list while a folder is loaded


@functools.cache
def _listen():
    """Records what Python opens, unpickles, starts and connects to; an audit hook cannot be removed."""

    def hook(event, args):
        if _EVENTS is not None and event.partition(".")[0] in ("open", "pickle", "subprocess", "os", "socket", "exec"):
            _EVENTS.append((event, args))

    sys.addaudithook(hook)


@pytest.fixture
def events(monkeypatch):
    """The audit events (event, args) of a test, and the weights that it opens."""
    _listen()
    happened = []
    safe_open = loader.safe_open

    def noted(file, *args, **kwargs):
        happened.append(("open", (file,)))
        return safe_open(file, *args, **kwargs)

    monkeypatch.setattr(loader, "safe_open", noted)
    monkeypatch.setattr(sys.modules[__name__], "_EVENTS", happened)
    return happened


def check_hostile(seeds, tmp_path, events):
    for family in FIELDS:
        write(tmp_path / f"{family}-good", good(family))
    failures, noticed = [], 0
    for seed in seeds:
        rng = random.Random(seed)
        kind = KINDS[seed % len(KINDS)]
        family = "dream" if kind is a_rope_that_is_none else rng.choice(sorted(FIELDS))
        files = good(family, rng.random() < 0.5)
        named = kind(files, rng)
        parent = tmp_path / f"{seed}"
        parent.mkdir()
        (parent / "good").symlink_to(tmp_path / f"{family}-good")
        if INDEX in files:
            files[INDEX] = files[INDEX].replace(b"{folder}", str(parent).encode())
        folder = write(parent / "model", files)
        events.clear()
        try:
            from_pretrained(folder, device="cpu")
            outcome = "accepted"
        except Exception as error:
            message = str(error).replace(str(parent), "")
            outcome = f"{type(error).__name__}: {message[:300]}"
            if type(error) is ValueError and len(message) < 2000 and all(name in message for name in named):
                outcome = None
        happened = list(events)
        strange = [(event, args) for event, args in happened if event != "open"]
        opened = [Path(args[0]).resolve() for event, args in happened if event == "open"]
        strange += [path for path in opened if path.parent != folder.resolve()]
        noticed += len(opened)
        if outcome or strange:
            failures.append(f"{seed} {kind.__name__} {family} {named}: {outcome} {strange}")
    assert not failures, "\n".join(failures)
    assert noticed > len(seeds)


def test_a_hostile_folder_is_an_error_that_names_the_file(tmp_path, events):
    check_hostile(range(5 * len(KINDS)), tmp_path, events)


@pytest.mark.full
@pytest.mark.parametrize("part", range(10))
def test_many_hostile_folders_are_errors_that_name_the_file(part, tmp_path, events):
    check_hostile(range(1000 + 250 * part, 1250 + 250 * part), tmp_path, events)


def loaded(tmp_path, files, **options):
    return view_of(from_pretrained(write(tmp_path / "legal", files), device="cpu", **options))


def ids_of(view):
    return view.mask_id, view.eos_ids, view.pad_token_id


@pytest.mark.parametrize("family", FIELDS)
@pytest.mark.parametrize(
    "config, generation, want",
    [
        ({}, None, (31, (30,), 30)),
        ({"pad_token_id": 5}, None, (31, (30,), 5)),
        ({"eos_token_id": [30, 7], "pad_token_id": None}, None, (31, (30, 7), 30)),
        ({"eos_token_id": [30, 7], "pad_token_id": -1}, None, (31, (30, 7), 30)),
        ({"eos_token_id": [30], "pad_token_id": 7}, None, (31, (30,), 7)),
        # what config.json lacks, and that alone
        ({}, {"eos_token_id": 1, "pad_token_id": 2, "mask_token_id": 3}, (31, (30,), 30)),
        ({"eos_token_id": None}, {"eos_token_id": [7, 8], "pad_token_id": 2}, (31, (7, 8), 30)),
        (
            {"eos_token_id": ..., "pad_token_id": ..., "mask_token_id": ...},
            {"eos_token_id": 7, "mask_token_id": 3},
            (3, (7,), 7),
        ),
        ({"pad_token_id": None}, {"pad_token_id": 2, "eos_token_id": None, "mask_token_id": None}, (31, (30,), 2)),
        ({}, {}, (31, (30,), 30)),
    ],
)
def test_token_ids_are_read_from_config_json_first(family, config, generation, want, tmp_path):
    files = good(family)
    edit(files, CONFIG, **config)
    if generation is not None:
        edit(files, GENERATION, **generation)
    view = loaded(tmp_path, files)
    assert ids_of(view) == want and view.eos_token_id == want[1][0]
    model = from_pretrained(tmp_path / "legal", device="cpu")
    model.save_pretrained(tmp_path / "again")
    assert ids_of(view_of(from_pretrained(tmp_path / "again", device="cpu"))) == want


def test_each_of_several_tokens_ends_a_text():
    prompt, options = torch.arange(1, 9)[None], {"gen_length": 12, "block_length": 1, "policy": dkv.NoCache()}
    model = tiny_model("llada")
    text = dkv.generate(model, prompt, **options).sequences[0, 8:].tolist()
    last = text[3]
    several = tiny_model("llada", eos_token_id=[250, last], pad_token_id=None)
    assert eos_ids_of(None, view_of(several)) == [250, last]
    stopped = dkv.generate(several, prompt, eos_early_stop=True, **options).sequences[0, 8:].tolist()
    end = text.index(last) + 1
    assert stopped == text[:end] + [250] * (12 - end)
    assert not {250, last} & set(
        dkv.generate(several, prompt, logits_eos_inf=True, **options).sequences[0, 8:].tolist()
    )


def rearranged(file):
    """The same tensors in another order, with other white space and without metadata."""
    header, data = header_of(file)
    header.pop("__metadata__", None)
    moved = b""
    for entry in reversed(header.values()):
        (start, end), size = entry["data_offsets"], len(moved)
        moved, entry["data_offsets"] = moved + data[start:end], [size, size + end - start]
    return joined(json.dumps(header, indent=3).encode() + b" " * 13, moved)


def marked(files):
    """JSON files as Windows may write them."""
    return {name: b"\xef\xbb\xbf" + file if name.endswith(".json") else file for name, file in files.items()}


def with_nulls(files):
    """Fields whose null means their default, and a field that nothing reads."""
    edit(
        files,
        CONFIG,
        n_kv_heads=None,
        multi_query_attention=None,
        clip_qkv=None,
        rope_scaling=None,
        unread=float("nan"),
    )
    return files


LEGAL = {
    "as it is": lambda files: files,
    "byte order marks": marked,
    "rearranged": lambda files: {
        name: rearranged(file) if name.endswith("s") else file for name, file in files.items()
    },
    "nulls": with_nulls,
    "other files": lambda files: (
        files | {"pytorch_model.bin": pickle.dumps(print), "modeling.py": b"1 / 0", "a.txt": b""}
    ),
}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", LEGAL)
def test_a_legal_folder_loads_and_nothing_else_is_opened(name, sharded, tmp_path, events):
    want = load(good()[WEIGHTS])
    folder = write(tmp_path / "legal", LEGAL[name](good(sharded=sharded)))
    events.clear()
    got = from_pretrained(folder, device="cpu").state_dict()
    names = {Path(args[0]).name for event, args in events if event == "open"}
    assert names == good(sharded=sharded).keys() and all(event == "open" for event, _ in events)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    """Each file of a snapshot is a link to a blob beside it."""
    blobs = write(tmp_path / "blobs", good(sharded=True))
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
    got, want = from_pretrained(snapshot, device="cpu").state_dict(), load(good()[WEIGHTS])
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("device", ["x", "meta", 1.5, -7, "cuda:99"])
def test_a_device_that_cannot_be_is_refused(device, tmp_path):
    message = "device must be one that PyTorch can use here"
    with pytest.raises(ValueError, match=message):
        from_pretrained(write(tmp_path / "good", good()), device=device)
    with pytest.raises(ValueError, match=message):
        from_config(CONFIGS["llada"](), device=device)


@pytest.mark.parametrize("config", [None, [], "llada", 5, {1: 2}])
def test_a_config_that_cannot_be_is_refused(config):
    with pytest.raises(ValueError, match="config must be a dict or namespace"):
        from_config(config)


def test_sizes_whose_product_overflows_are_refused():
    sizes = {"mlp_hidden_size": None, "mlp_ratio": 2**29, "d_model": 2**20}
    with pytest.raises(ValueError, match=r"config: mlp_ratio \* d_model must be a positive int"):
        from_config(CONFIGS["llada"](**sizes))


def resized_llada(rows):
    """A LLaDA of 256 tokens whose embedding was resized as Hugging Face does it, without config and head."""
    model = Lookalike(tiny_model("llada"))
    weight = model.model.transformer.wte.weight.data
    model.model.transformer.wte = nn.Embedding(rows, 64)
    model.model.transformer.wte.weight.data = torch.cat((weight, weight[: rows - 256] + weight[50 : rows - 206]))
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_p": 0.9},
        {"cfg_scale": 1.0},
        {"logits_eos_inf": True, "eos_token_id": [254, 280]},
        {"confidence_eos_eot_inf": True, "eos_token_id": [254, 280]},
        {"eos_early_stop": True, "eos_token_id": 299},
    ],
)
def test_the_mask_may_be_an_id_that_the_head_does_not_have(options, device):
    """Rows added to the embedding are ids that can be read but not predicted."""
    model, prompt = resized_llada(300).to(device), torch.tensor([[1, 2, 255, 299, 4]], device=device)

    def generated(**more):
        generator = torch.Generator().manual_seed(0)
        return dkv.generate(model, prompt, gen_length=8, generator=generator, **options, **more).sequences

    got = generated(mask_id=290)
    assert got.shape == (1, 13) and torch.equal(got[:, :5], prompt) and bool((got[:, 5:] < 256).all())
    model.config.mask_token_id = 290
    assert view_of(model).mask_id == 290 and torch.equal(generated(), got)
    with pytest.raises(ValueError, match="mask_id must be in the vocabulary, 0 .. 299, got 300"):
        generated(mask_id=300)
    model.config.mask_token_id = 300
    with pytest.raises(ValueError, match="Lookalike: mask_token_id must be an int in 0 .. 299, got 300"):
        view_of(model)


def test_a_head_that_predicts_more_than_the_embedding_has_is_refused():
    model = Lookalike(tiny_model("llada"))
    model.model.transformer.ff_out = nn.Linear(64, 300, bias=False)
    with pytest.raises(ValueError, match="transformer.ff_out predicts 300 ids, but model.transformer.wte has 256 rows"):
        view_of(model)


@pytest.mark.parametrize("family", FIELDS)
@pytest.mark.parametrize("kind, values", [("sizes", NO_SIZE), ("switches", NO_SWITCH)])
def test_a_wrong_field_of_a_live_model_is_named(family, kind, values):
    # the vocabulary of a live model is that of its embedding
    names = set(FIELDS[family][kind].split()) - {"embedding_size", "vocab_size"}
    model = Lookalike(tiny_model(family))
    for name in sorted(names):
        for value in values:
            model.config = SimpleNamespace(**CONFIGS[family](**{name: value}))
            with pytest.raises(ValueError, match=f"^Lookalike: .*{name}"):
                view_of(model)
