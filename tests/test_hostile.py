"""Files that hide code: no .pt and no .pt2 gets to run what it carries, and what is no segmenter is
refused in one line."""

import contextlib
import io
import json
import os
import re
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import TRAINING, load
from torch import nn

META = {"classes": ["pet", "background", "border"], "size": 16, "ignore": None}
GRAPH, NOTE = "models/model.json", "meta.json"
WEIGHTS, CONSTANTS = "model_weights_config.json", "model_constants_config.json"
pytestmark = pytest.mark.filterwarnings("ignore")


class Code:
    """A pickle of this writes a file when it is loaded without care."""

    def __reduce__(self):
        return os.system, ("echo ran > ran",)


SHELL = "__import__('os').system('echo ran > ran')"  # the same as an expression


def pickled(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


@pytest.fixture
def unharmed(here):
    """No test may leave the file that the planted code writes."""
    yield
    assert not Path("ran").exists(), "planted code ran"


def test_the_planted_code_works(here):
    torch.save(Code(), "bad.pt")
    torch.load("bad.pt", weights_only=False)
    assert Path("ran").exists()


@pytest.mark.parametrize("name", TRAINING)
def test_a_checkpoint_with_code_is_refused(name, unharmed):
    torch.save({"script": f"{name}.py", "model": {}, "args": {}, "x": Code()}, "bad.pt")
    with pytest.raises(SystemExit, match=r"bad\.pt"):
        load(name).load_checkpoint(Path("bad.pt"), f"{name}.py")


# --- programs ------------------------------------------------------------------------------------


def export(net, path="bad.pt2", channels=3, free=True):
    shapes = ({0: torch.export.Dim("batch", min=1)},) if free else None
    program = torch.export.export(net, (torch.zeros(2, channels, 16, 16),), dynamic_shapes=shapes)
    torch.export.save(program, path, extra_files={"meta.json": json.dumps(META)})


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.pt2"
    export(nn.Conv2d(3, 3, 1), path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def files(exported, here):
    """{member: content} of a good program."""
    return dict(exported)


def member(files, end):
    (name,) = [name for name in files if name.endswith(end)]
    return name


def write(members, method=zipfile.ZIP_STORED):
    """bad.pt2 of (member, content) pairs."""
    with zipfile.ZipFile("bad.pt2", "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)


def beside(files, old, new, content):
    """One member more: in the place of old, under the name new."""
    files[member(files, old).replace(old, new)] = content


@contextlib.contextmanager
def opened(files, end):
    """One of the JSON files, to change it."""
    name = member(files, end)
    content = json.loads(files[name])
    yield content
    files[name] = json.dumps(content)


def change(files, end, key, value):
    with opened(files, end) as content:
        content[key] = value


def add_constant(files, path, use_pickle):
    entry = {"path_name": path, "is_param": False, "use_pickle": use_pickle, "tensor_meta": None}
    with opened(files, CONSTANTS) as content:
        content["config"]["x"] = entry


def set_sizes(files, text):
    """Every size in the graph, wherever it stands, is text."""
    name, new = member(files, GRAPH), f'"expr_str": {json.dumps(text)}'
    graph = json.dumps(json.loads(files[name]))
    files[name], count = re.subn(r'"expr_str": "[^"]*"', lambda _: new, graph)
    assert count


def set_target(files, target):
    with opened(files, GRAPH) as content:
        content["graph_module"]["graph"]["nodes"][0]["target"] = target


def add_node(files, target, *inputs):
    node = {"target": target, "outputs": [{"as_none": True}], "metadata": {}, "name": "added"}
    node |= {"inputs": list(inputs), "is_hop_single_tensor_return": True}
    with opened(files, GRAPH) as content:
        content["graph_module"]["graph"]["nodes"].insert(0, node)


def argument(name, kind=2, **value):
    return {"name": name, "arg": value, "kind": kind}


def set_names(files, *names):
    """Other names of the inputs."""
    with opened(files, GRAPH) as content:
        signature = content["graph_module"]["module_call_graph"][0]["signature"]
        signature["forward_arg_names"] = list(names)


def set_layout(files, kind, context):
    """Another kind of dictionary as the layout of the inputs by name."""
    with opened(files, GRAPH) as content:
        signature = content["graph_module"]["module_call_graph"][0]["signature"]
        old, new = '"builtins.dict", "context": "[]"', f'"{kind}", "context": "{context}"'
        assert old in signature["in_spec"]
        signature["in_spec"] = signature["in_spec"].replace(old, new)


def pickle_in_the_sample_inputs(files):
    files[member(files, "sample_inputs/model.pt")] = pickled(([Code()], {}))


def pickled_weight(files, flag):
    files[member(files, "weights/weight_0")] = pickled(Code())
    with opened(files, WEIGHTS) as content:
        for entry in content["config"].values():
            entry["use_pickle"] = flag


def pickled_constant(files):
    beside(files, "weights/weight_0", "constants/tensor_0", pickled(Code()))
    add_constant(files, "tensor_0", True)


def node_that_writes_a_file(files):
    name = argument("filename", 1, as_string="ran")
    shared, size = argument("shared", 1, as_bool=True), argument("size", 1, as_int=6)
    add_node(files, "torch.ops.aten.from_file.default", name, shared, size)


def code_in_the_layout_in_escapes(files):
    text = json.dumps([f'y={SHELL},z="\',#\'\\\n    "#"\\\n'])
    set_layout(files, "builtins.dict", "".join(f"\\u{ord(c):04x}" for c in text))
    set_names(files)


def guards_after_none(files):
    """A key that is there twice: readers differ in which of the two they take."""
    name = member(files, GRAPH)
    text = json.dumps(json.loads(files[name]))
    files[name] = text[:-1] + f', "guards_code": {json.dumps([SHELL])}, "guards_code": []}}'


FACTORY = {"default_factory_module": "antigravity", "default_factory_name": "x", "dict_context": []}
FACTORY = json.dumps(FACTORY).replace('"', '\\"')
ATTACKS = [  # a function, and what it is called with after the files
    (pickle_in_the_sample_inputs,),
    (pickled_weight, True),
    (pickled_weight, "False"),  # a text is as good as True
    (pickled_constant,),
    (add_constant, "custom_obj_0", False),
    (beside, "weights/weight_0", "constants/opaque_obj_0", pickled(Code())),
    (beside, "weight_0", "model.pt", pickled(Code())),  # the weights as torch saved them before
    (beside, "archive_format", "data/aotinductor/model/x.so", b"\x7fELF"),  # a compiled library
    (set_sizes, SHELL),
    (set_sizes, f"Symbol('s0', positive={SHELL})"),
    (set_target, "torch.hub.load"),
    (set_target, "torch.os.system"),
    (set_target, "os.system"),
    (set_target, "torch.ops.torchvision.write_file.default"),
    (set_target, "torch.ops.aten.__class__"),
    (node_that_writes_a_file,),
    (add_node, "torch.ops.higher_order.wrap", argument("func", as_operator="torch.hub.load")),
    (add_node, "torch.ops.higher_order.wrap", argument(f"a={SHELL}, b", as_int=1)),
    (set_names, f"x={SHELL}"),
    (set_layout, "collections.defaultdict", FACTORY),
    (set_layout, "collections.default\\u0064ict", FACTORY.replace("factory", "\\u0066actory")),
    (code_in_the_layout_in_escapes,),
    (change, GRAPH, "guards_code", [SHELL]),
    (guards_after_none,),
]


@pytest.fixture
def refused(refuse, unharmed):
    """refused(files) writes bad.pt2, unless there is one, and has it refused -> the line."""

    def call(files=None):
        if files:
            write(files.items())
        line = refuse("evaluate", "bad.pt2", "--data", "toy")
        assert line.startswith("bad.pt2: refused") and len(line) < 400
        assert not Path("overlay.png").exists()
        return line

    return call


def test_the_good_program_is_scored(files, capsys):
    """Without this the refusals below would prove nothing."""
    write(files.items())
    load("evaluate").main(["bad.pt2", "--data", "toy"])
    assert "bad.pt2" in capsys.readouterr().out


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_program_with_code_is_never_loaded(attack, files, refused, monkeypatch):
    function, *values = attack
    function(files, *values)
    loaded = []
    monkeypatch.setattr(torch.export, "load", loaded.append)
    refused(files)
    assert loaded == []


@pytest.mark.parametrize("last", [False, True])
def test_a_member_that_is_there_twice(last, files, refused):
    bad = (member(files, "sample_inputs/model.pt"), pickled(([Code()], {})))
    write([*files.items(), bad] if last else [bad, *files.items()])
    refused()


def test_an_archive_with_two_directories(files, unharmed):
    """Python reads a zip from its end, torch from the offset written there: one file, two contents.
    It may be refused, or the harmless content scored; the other may not be loaded."""

    def parts(members):
        write(members.items())
        raw = Path("bad.pt2").read_bytes()
        end = raw.rindex(b"PK\5\6")
        directory = struct.unpack_from("<I", raw, end + 16)[0]
        return raw[:directory], raw[directory:end], raw[end:]

    name = member(files, "sample_inputs/model.pt")
    bad, bad_directory, _ = parts(files | {name: pickled(([Code()], {})) + bytes(20_000)})
    good, directory, end = parts(files)
    directory, end, place = bytearray(directory), bytearray(end), 0
    while place < len(directory):  # offsets as Python will read them
        lengths = struct.unpack_from("<HHH", directory, place + 28)
        (offset,) = struct.unpack_from("<I", directory, place + 42)
        struct.pack_into("<I", directory, place + 42, offset + len(bad) - len(good))
        place += 46 + sum(lengths)
    struct.pack_into("<I", end, 16, len(bad))
    Path("bad.pt2").write_bytes(bad + bad_directory + good + directory + end)
    with zipfile.ZipFile("bad.pt2") as archive:
        assert archive.read(name) == files[name]  # the trick works
    try:
        load("evaluate").main(["bad.pt2", "--data", "toy"])
    except SystemExit as stop:
        assert str(stop.code).startswith("bad.pt2: refused")


# --- what is no segmenter ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value",
    [
        ("size", "big"),
        ("size", -16),
        ("size", 10**7),
        ("size", 32),  # another than it takes
        ("ignore", 300),
        ("ignore", True),
        ("ignore", 1.0),
        ("classes", "abc"),
        ("classes", ["a", "b", "\x1b[2J"]),  # moves the cursor
        ("classes", ["a", "b", "c", "d"]),
        ("args", {"data": 5}),
        ("args", {"root": 5}),
        ("args", None),
    ],
)
def test_meta_of_nonsense(key, value, files, refused):
    change(files, NOTE, key, value)
    refused(files)


@pytest.mark.parametrize("key", ["size", "classes", "ignore"])
def test_meta_without(key, files, refused):
    with opened(files, NOTE) as meta:
        del meta[key]
    assert key in refused(files)


@pytest.mark.parametrize("text", ["[1, 2]", "{", ""])
def test_meta_that_is_no_dictionary(text, files, refused):
    files[member(files, NOTE)] = text
    refused(files)


@pytest.mark.parametrize("end", [NOTE, GRAPH, "weights/weight_0", "sample_inputs/model.pt"])
def test_a_member_that_is_missing(end, files, refused):
    del files[member(files, end)]
    refused(files)


def test_zip_bomb(files, refused):
    beside(files, "weight_0", "weight_7", bytes(30_000_000))
    write(files.items(), zipfile.ZIP_DEFLATED)
    assert "unpacks" in refused()


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
def test_a_program_that_is_cut_off(share, files, refused):
    write(files.items())
    whole = Path("bad.pt2").read_bytes()
    Path("bad.pt2").write_bytes(whole[: int(share * len(whole))])
    refused()


class Fragile(torch.nn.Module):
    """Answers nan for a bright photo."""

    def forward(self, x):
        return torch.where(x.mean((1, 2, 3), keepdim=True) > 0.3, torch.nan * x, x)


def test_answers_that_are_not_finite(refused):
    """Not those for the first photo that is tried, which is dark."""
    export(Fragile())
    assert "not finite" in refused()


def test_a_checkpoint_is_no_program(refused):
    torch.save({"model": torch.zeros(3)}, "bad.pt2")
    refused()


class Pair(nn.Conv2d):
    """Answers with two tensors."""

    def forward(self, x):
        return super().forward(x), x


def diverged():
    net = nn.Conv2d(3, 3, 1)
    net.weight.data.fill_(float("nan"))
    return net


@pytest.mark.parametrize(
    "net, channels, free",
    [
        (nn.Conv2d(1, 3, 1), 1, True),  # takes photos of one channel
        (nn.Conv2d(3, 3, 1), 3, False),  # takes two photos
        (Pair(3, 3, 1), 3, True),
        (diverged(), 3, True),
    ],
)
def test_another_contract(net, channels, free, refused):
    export(net, channels=channels, free=free)
    refused()


def test_a_program_in_training_mode(refused):
    """It normalises with what is in the batch until eval() is called."""
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    export(net.train())
    assert "eval()" in refused()
    export(net.eval())
    load("evaluate").main(["bad.pt2", "--data", "toy"])
