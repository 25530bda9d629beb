"""Models from somebody who means harm, or from a broken disk: refused, at once, in one sentence.

Every file is made here from a good one. What comes out of it may only be ValueError or
FileNotFoundError, which name the file, without memory or time for what the file claims.
"""

import copy
import json
import random
import resource
import struct
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_jepa.checkpoints import (
    CONFIG,
    WEIGHTS,
    export_experiment,
    load_pretrained,
    save_pretrained,
    write_config,
)
from speechbrain_jepa.convert import convert
from speechbrain_jepa.features import Normalization
from speechbrain_jepa.jepa import JEPA
from speechbrain_jepa.losses import SmoothL1
from speechbrain_jepa.untrusted import checked_encoder, encoder_shapes
from speechbrain_jepa.vit import Encoder, PatchGrid, Predictor

DIM, HEADS = 24, 3
ODD = [
    *(None, True, False, 0, -1, 1, 7, 6000, 10**6, 2**31, 2**64, 10**400),
    *(0.5, 24.0, 1e-300, 1e300, "", "24", "x" * 5000, "\ud800", [], {}, [1], {"a": {}}),
]
RAW = ["NaN", "-Infinity", "1e999", "9" * 5000, "[" * 100_000, '{"a":' * 900 + "1" + "}" * 900, ""]
DTYPES = ["I32", "U8", "BOOL", "F64", "F16", "F8_E4M3", "X", 1, None]
SHAPES = [[], [0], [DIM], [2**62, 4], [-1], [0, 2**63 - 1], "24", None, [DIM] * 3]


def make_encoder():
    torch.manual_seed(0)
    return Encoder(PatchGrid(208), dim=DIM, depth=2, num_heads=HEADS)


@pytest.fixture
def folder(tmp_path):
    return save_pretrained(tmp_path / "p", make_encoder(), Normalization(-7.5, 4.25), {"a": 1})


@pytest.fixture
def experiment(tmp_path):
    """An experiment folder, and the path of the state dict in its checkpoint."""
    predictor = Predictor(PatchGrid(208), encoder_dim=DIM, dim=16, depth=1, num_heads=2)
    jepa = JEPA(make_encoder(), predictor, SmoothL1())
    folder = tmp_path / "experiment"
    write_config(folder / "encoder_config.json", jepa.context_encoder, Normalization(), {})
    checkpoint = Checkpointer(folder / "save", {"jepa": jepa}).save_checkpoint().path
    return folder, checkpoint / "jepa.ckpt"


def edit(path, change):
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def read_parts(path):
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_parts(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def peak():
    """Megabytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def refused(load, match):
    """`load` is refused with one sentence, within a second and 500 MB."""
    before, began = peak(), time.perf_counter()
    with pytest.raises(ValueError, match=match) as caught:
        load()
    assert time.perf_counter() - began < 1 and peak() - before < 500
    assert type(caught.value) is ValueError and len(str(caught.value)) < 2000


# --- configs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c["encoder"].update(dim=6000), r"model\.safetensors: .* is \(24,\), not"),
        (lambda c: c["encoder"].update(depth=1_000_000), r"config\.json.*encoder\.depth=1000000:"),
        (lambda c: c["encoder"].update(depth=1000), r"blocks\.10\S* is missing"),
        (lambda c: c["encoder"].update(mlp_ratio=1e9), r"encoder\.mlp_ratio=1000000000"),
        (lambda c: c["encoder"].update(mlp_ratio="4"), r"encoder\.mlp_ratio='4'"),
        (lambda c: c["encoder"].update(norm_eps=-1.0), r"encoder\.norm_eps=-1"),
        (lambda c: c["encoder"].update(num_heads=0), r"encoder\.num_heads=0: expected a whole"),
        (lambda c: c["encoder"].update(num_heads=True), r"encoder\.num_heads=True"),
        (lambda c: c["encoder"].update(num_heads=5), r"not a multiple of encoder\.num_heads=5"),
        (lambda c: c["encoder"].pop("num_heads"), r"config\.json.*encoder\.num_heads is missing"),
        (lambda c: c["encoder"].update(dim=10**400), r"encoder\.dim=1000.*\.\.\.: expected"),
        (lambda c: c["encoder"].update(grid=[]), r"encoder\.grid=\[\]"),
        (lambda c: c["encoder"]["grid"].pop("frames"), r"encoder\.grid\.frames is missing"),
        (
            lambda c: c["encoder"]["grid"].update(frames=2**20, patch_time=1),
            "positions of more than",
        ),
        (lambda c: c["encoder"]["grid"].update(patch_time=0), r"grid\.patch_time=0"),
        (lambda c: c["encoder"].update(class_token=1), r"encoder\.class_token=1: expected true"),
        (lambda c: c.update(normalization={}), r"config\.json.*normalization\.mean is missing"),
        (lambda c: c["normalization"].update(std=None), r"normalization\.std=None"),
        (lambda c: c["normalization"].update(std=1e-46), "norm_std=0"),
        (lambda c: c["normalization"].update(mean=10**400), r"normalization\.mean=1000"),
        (lambda c: c.update(training=3), "no 'training' section"),
    ],
)
def test_a_config_that_asks_for_too_much_or_too_little_is_refused_at_once(change, match, folder):
    edit(folder / CONFIG, change)
    refused(lambda: load_pretrained(folder), match)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[" * 100_000, r"config\.json is not JSON"),
        ('{"a":' * 900 + "1" + "}" * 900, r"config\.json is (nested|not JSON)"),
        ('{"format_version": 1, "a": NaN}', "NaN is no JSON number"),
        ("[1, 2]", "is a list, not the config"),
        ("9" * 5000, r"config\.json is"),
        ('{"a": "' + "x" * 2**21 + '"}', "more than 1048576 bytes"),
        ("\x00", "is not JSON"),
    ],
    ids=["brackets", "deep", "nan", "list", "digits", "long", "nul"],
)
def test_json_of_any_shape_is_one_sentence(text, match, folder):
    (folder / CONFIG).write_text(text)
    refused(lambda: load_pretrained(folder), match)


def test_every_mutated_config_is_loaded_or_refused(folder):
    good, chance = json.loads((folder / CONFIG).read_text()), random.Random(0)
    loaded = sum(survives(folder, CONFIG, lambda: mutated_config(good, chance)) for _ in range(300))
    assert 0 < loaded < 150  # both happen: those that only touched `training` are good


def mutated_config(good, chance):
    config, raw = copy.deepcopy(good), None
    for _ in range(chance.choice([1, 1, 2])):
        parent = config
        while inner := [part for part in parent.values() if isinstance(part, dict) and part]:
            if chance.random() < 0.3:
                break
            parent = chance.choice(inner)
        key = chance.choice(list(parent) or ["a"])
        match chance.randrange(4):
            case 0:
                parent.pop(key, None)
            case 1:
                parent[key], raw = "@", chance.choice(RAW)
            case 2:
                parent[chance.choice(["attention", "", "x" * 300])] = chance.choice(ODD)
            case 3:
                parent[key] = chance.choice(ODD)
    return json.dumps(config).replace('"@"', raw or "0").encode()


def survives(folder, name, mutant):
    """Whether a folder with this file is loaded; anything but a plain refusal fails the test."""
    (folder / name).write_bytes(mutant())
    before, began = peak(), time.perf_counter()
    try:
        load_pretrained(folder)
        return True
    except ValueError as error:
        assert type(error) is ValueError and len(str(error)) < 2000
        assert str(folder) in str(error)
        return False
    finally:
        assert time.perf_counter() - began < 1 and peak() - before < 500


# --- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value, folder):
    weights = load_file(folder / WEIGHTS)
    weights["blocks.1.norm2.bias"][3] = value
    save_file(weights, folder / WEIGHTS)
    refused(lambda: load_pretrained(folder), r"safetensors.*blocks\.1\.norm2\.bias holds NaN")


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    encoder = make_encoder()
    encoder.norm.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"norm\.bias holds NaN"):
        save_pretrained(tmp_path / "p", encoder, Normalization())
    assert list(tmp_path.iterdir()) == []


def test_weights_relabelled_as_whole_numbers_are_refused(folder):
    header, data = read_parts(folder / WEIGHTS)
    header["norm.weight"]["dtype"] = "I32"
    write_parts(folder / WEIGHTS, header, data)
    refused(lambda: load_pretrained(folder), r"safetensors: 'norm\.weight' is I32")


def test_half_precision_weights_are_loaded(folder):
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS)
    encoder, _, _ = load_pretrained(folder)
    assert encoder.norm.weight.dtype == torch.float32
    assert torch.equal(encoder.patch_embed.weight, weights["patch_embed.weight"].float())


def test_a_header_longer_than_any_is_refused(folder):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**63) + b"{}")
    refused(lambda: load_pretrained(folder), r"model\.safetensors is not a safetensors file")


def test_every_mutated_header_is_loaded_or_refused(folder):
    header, data = read_parts(folder / WEIGHTS)
    chance = random.Random(0)
    loaded = sum(
        survives(folder, WEIGHTS, lambda: mutated_weights(header, data, chance)) for _ in range(300)
    )
    assert loaded < 30


def mutated_weights(good, data, chance):
    header = copy.deepcopy(good)
    name = chance.choice([name for name in header if name != "__metadata__"])
    part = header[name]
    match chance.randrange(5):
        case 0:
            part["dtype"] = chance.choice(DTYPES)
        case 1:
            part["shape"] = chance.choice([*SHAPES, part["shape"][::-1]])
        case 2:
            part["data_offsets"] = chance.choice([[0, 0], [2**63, 2**63], [-1, 4], [4, 0], None])
        case 3:
            header[chance.choice(["x", "blocks.999999.norm1.weight", ""])] = header.pop(name)
        case 4:
            header[name] = chance.choice(ODD)
    text = json.dumps(header).encode()
    length = chance.choice([len(text)] * 8 + [len(text) - 1, 0, 2**64 - 1])
    return struct.pack("<Q", length) + text + data


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"class_token": True, "stored_positions": True},
        {"mlp_ratio": 2.3, "grid": {"frames": 96, "patch_frequency": 80, "patch_time": 2}},
    ],
)
def test_the_shapes_that_are_compared_are_those_of_an_encoder(change):
    settings = {"dim": 24, "depth": 3, "num_heads": 3, "mlp_ratio": 4.0, "norm_eps": 1e-6, **change}
    settings["grid"] = {"frames": 208, "patch_frequency": 16, "patch_time": 16, "bands": 80} | (
        change.get("grid", {})
    )
    grid, sizes = checked_encoder(settings)
    state = Encoder(grid, **sizes).state_dict()
    assert encoder_shapes(grid, sizes) == {name: tuple(x.shape) for name, x in state.items()}


# --- experiments --------------------------------------------------------------------------------


def sparse_claim(*shape):
    """A tensor of this shape with four bytes behind it."""
    return torch.zeros(1).expand(shape)


@pytest.mark.parametrize(
    ("contents", "match"),
    [
        ([], "not a state dict, but a list"),
        ({1: 2}, "is missing"),
        ({"context_encoder.norm.weight": "x"}, r"'norm\.weight' is no tensor of floating"),
        ({"context_encoder.norm.weight": torch.zeros(24, dtype=torch.int32)}, "no tensor of float"),
        ({"context_encoder.norm.weight": torch.zeros(24, device="meta")}, "no tensor of floating"),
        ({"context_encoder.norm.weight": torch.eye(24).to_sparse()}, "no tensor of floating"),
        ({"context_encoder.norm.weight": sparse_claim(60_000, 60_000)}, "cannot hold the 14400000"),
    ],
    ids=["list", "number", "text", "int32", "meta", "sparse", "expanded"],
)
def test_an_odd_state_dict_is_one_sentence(contents, match, experiment):
    folder, path = experiment
    torch.save(contents, path)
    refused(lambda: load_pretrained(folder), rf"jepa\.ckpt.*{match}")


@pytest.mark.parametrize(
    "text", ["unixtime: x", "unixtime: .nan", "2001-99-99", "[" * 3000, "unixtime: {", "\xff"]
)
def test_a_checkpoint_with_an_odd_yaml_counts_as_unfinished(text, experiment):
    folder, path = experiment
    (path.parent / "CKPT.yaml").write_text(text)
    with pytest.raises(FileNotFoundError, match="no complete checkpoint yet"):
        load_pretrained(folder)


def test_a_deep_config_is_not_exported(experiment, tmp_path):
    folder, _ = experiment
    nested = json.loads("[" * 300 + "]" * 300)
    edit(folder / "encoder_config.json", lambda config: config["training"].update(deep=nested))
    refused(lambda: export_experiment(folder, tmp_path / "out"), r"config\.json is nested")


# --- weights of others --------------------------------------------------------------------------


def m2d(dim=DIM):
    """The parameters of a small M2D encoder, which `convert` takes with --num_heads 3."""
    generator = torch.Generator().manual_seed(0)
    names = encoder_shapes(
        PatchGrid(96),
        {"dim": dim, "depth": 2, "num_heads": HEADS, "mlp_ratio": 4.0},
    )
    state = {name: torch.randn(shape, generator=generator) for name, shape in names.items()}
    state["patch_embed.proj.weight"] = state.pop("patch_embed.weight").unflatten(1, (1, 16, 16))
    state["patch_embed.proj.bias"] = state.pop("patch_embed.bias")
    return state | {
        "cls_token": torch.randn(1, 1, dim, generator=generator),
        "pos_embed": torch.randn(1, 31, dim, generator=generator),
    }


def converted(contents, tmp_path, **options):
    path = tmp_path / "checkpoint.pth"
    torch.save(contents, path)
    return convert(path, tmp_path / "out", "m2d", **{"num_heads": HEADS, **options})


def test_the_good_checkpoint_is_converted(tmp_path):
    assert converted(m2d(), tmp_path).encoder.dim == DIM


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {
                "patch_embed.proj.weight": sparse_claim(60_000, 1, 16, 16),
                "pos_embed": sparse_claim(1, 31, 60_000),
                "blocks.0.attn.qkv.weight": sparse_claim(180_000, 60_000),
                "blocks.0.mlp.fc1.bias": sparse_claim(240_000),
            },
            "cannot hold",
        ),
        ({"pos_embed": sparse_claim(1, 1 + 5 * 10**8, DIM)}, r"grid\.frames=1600000000"),
        ({"blocks.999999.norm1.bias": torch.zeros(DIM)}, r"encoder\.depth=1000000"),
        ({f"blocks.{'9' * 5000}.norm1.bias": torch.zeros(DIM)}, "unknown"),
        ({"blocks.0.attn.qkv.weight": torch.tensor(1.0)}, "no encoder of M2D found"),
        ({"blocks.0.mlp.fc1.bias": torch.tensor(1.0)}, "shapes do not fit"),
        ({"norm.bias": torch.zeros(DIM, dtype=torch.int64)}, "'norm.bias' is no tensor of float"),
        ({"norm.bias": torch.zeros(DIM, device="meta")}, "'norm.bias' is no tensor of float"),
        ({"norm.bias": torch.zeros(DIM).to_sparse()}, "'norm.bias' is a torch.sparse_coo tensor"),
        ({"patch_embed.proj.weight": torch.zeros(0, 1, 16, 16)}, "no encoder of M2D found"),
        ({"norm_stats": {"mean": 1}}, r"norm_stats=\{'mean': 1\}: mean and deviation"),
        ({"norm_stats": [1, None]}, r"normalization\.std=None"),
        ({"norm_stats": [1, 10**400]}, r"normalization\.std=1000"),
        ({"norm_stats": torch.tensor([-7.0, float("nan")])}, r"normalization\.std=nan"),
        ({1: 2, (3,): torch.zeros(1), "norm.bias": None}, r"norm\.bias missing"),
    ],
)
def test_an_odd_checkpoint_is_refused_with_its_name(change, match, tmp_path):
    refused(lambda: converted({**m2d(), **change}, tmp_path), rf"checkpoint\.pth.*{match}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("claim", [10**9, 5 * 10**10, 2**61])
def test_a_storage_that_is_not_in_the_file_is_refused(claim, tmp_path):
    """The old format says how many numbers come; here in eight bytes instead of four."""
    path = tmp_path / "checkpoint.pth"
    torch.save({"x": torch.zeros(70_000)}, path, _use_new_zipfile_serialization=False)
    number = b"J" + struct.pack("<i", 70_000)
    lie = b"\x8a\x08" + struct.pack("<q", claim)
    path.write_bytes(path.read_bytes().replace(number, lie))
    refused(lambda: convert(path, tmp_path / "out", "m2d"), r"checkpoint\.pth is not a checkpoint")


def test_no_heads_are_refused(tmp_path):
    for heads in (0, -1, 5):
        refused(lambda heads=heads: converted(m2d(), tmp_path, num_heads=heads), "num_heads=")
