"""Files that hide code: no .pt and no .pt2 gets to run what it carries, and what is no segmenter is
refused in one line."""

import io
import json
import os
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import TRAINING, load

META = {"classes": ["pet", "background", "border"], "size": 16, "ignore": None}
GRAPH, NOTE = "models/model.json", "meta.json"
WEIGHTS, CONSTANTS = "model_weights_config.json", "model_constants_config.json"
pytestmark = pytest.mark.filterwarnings("ignore")


class Code:
    """A pickle of this writes a file when it is loaded without care."""

    def __reduce__(self):
        return os.system, (f"echo ran > {Path.cwd() / 'ran'}",)


def shell():
    """The same as an expression."""
    return f"__import__('os').system('echo ran > {Path.cwd() / 'ran'}')"


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


class Tiny(torch.nn.Module):
    """Three classes from one convolution."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(x)


def export(net, path="bad.pt2", meta=META, channels=3, free=True):
    shapes = None
    if free:
        shapes = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(net, (torch.zeros(2, channels, 16, 16),), dynamic_shapes=shapes)
    torch.export.save(program, path, extra_files={"meta.json": json.dumps(meta)})


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.pt2"
    export(Tiny().eval(), path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def files(exported, here):
    """{member: content} of a good program."""
    return dict(exported)


def member(files, end):
    (name,) = [name for name in files if name.endswith(end)]
    return name


def write(members, path="bad.pt2", method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def beside(files, old, new, content):
    """One member more: in the place of old, under the name new."""
    files[member(files, old).replace(old, new)] = content


def read(files, end):
    return json.loads(files[member(files, end)])


def put(files, end, value):
    files[member(files, end)] = json.dumps(value)


def change(files, end, **values):
    """Other values in one of the JSON files."""
    put(files, end, read(files, end) | values)


def add_constant(files, path, use_pickle):
    config = read(files, CONSTANTS)
    entry = {"path_name": path, "is_param": False, "use_pickle": use_pickle, "tensor_meta": None}
    config["config"]["x"] = entry
    put(files, CONSTANTS, config)


def set_sizes(files, text):
    """Every size in the graph, wherever it stands, is text."""

    def walk(value):
        if isinstance(value, dict):
            if "expr_str" in value:
                value["expr_str"] = text
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    graph = read(files, GRAPH)
    walk(graph)
    put(files, GRAPH, graph)


def set_target(files, target):
    graph = read(files, GRAPH)
    graph["graph_module"]["graph"]["nodes"][0]["target"] = target
    put(files, GRAPH, graph)


def add_node(files, target, *inputs):
    graph = read(files, GRAPH)
    node = {"target": target, "outputs": [{"as_none": True}], "metadata": {}, "name": "added"}
    node |= {"inputs": list(inputs), "is_hop_single_tensor_return": True}
    graph["graph_module"]["graph"]["nodes"].insert(0, node)
    put(files, GRAPH, graph)


def argument(name, kind=2, **value):
    return {"name": name, "arg": value, "kind": kind}


def set_signature(files, **values):
    graph = read(files, GRAPH)
    graph["graph_module"]["module_call_graph"][0]["signature"] |= values
    put(files, GRAPH, graph)


def set_layout(files, kind, context):
    """Another kind of dictionary as the layout of the inputs by name."""
    old = read(files, GRAPH)["graph_module"]["module_call_graph"][0]["signature"]["in_spec"]
    new = old.replace('"builtins.dict", "context": "[]"', f'"{kind}", "context": "{context}"')
    assert new != old
    set_signature(files, in_spec=new)


FACTORY = {
    "default_factory_module": "antigravity",
    "default_factory_name": "x",
    "dict_context": [],
}


def pickle_in_the_sample_inputs(files):
    files[member(files, "sample_inputs/model.pt")] = pickled(([Code()], {}))


def pickled_weight(files):
    files[member(files, "weights/weight_0")] = pickled(Code())
    config = read(files, WEIGHTS)
    for entry in config["config"].values():
        entry["use_pickle"] = True
    put(files, WEIGHTS, config)


def pickled_constant(files):
    beside(files, "weights/weight_0", "constants/tensor_0", pickled(Code()))
    add_constant(files, "tensor_0", True)


def custom_object(files):
    add_constant(files, "custom_obj_0", False)


def opaque_object(files):
    beside(files, "weights/weight_0", "constants/opaque_obj_0", pickled(Code()))


def old_pickle_of_weights(files):
    beside(files, "weight_0", "model.pt", pickled(Code()))


def compiled_library(files):
    beside(files, "archive_format", "data/aotinductor/model/x.so", b"\x7fELF")


def size_that_calls(files):
    set_sizes(files, shell())


def symbol_that_calls(files):
    set_sizes(files, f"Symbol('s0', positive={shell()})")


def node_that_loads_code(files):
    set_target(files, "torch.hub.load")


def node_that_calls_the_system(files):
    set_target(files, "torch.os.system")


def another_that_does(files):
    set_target(files, "os.system")


def node_of_torchvision_that_writes(files):
    set_target(files, "torch.ops.torchvision.write_file.default")


def node_with_underscores(files):
    set_target(files, "torch.ops.aten.__class__")


def node_that_writes_a_file(files):
    name = argument("filename", 1, as_string="ran")
    shared, size = argument("shared", 1, as_bool=True), argument("size", 1, as_int=6)
    add_node(files, "torch.ops.aten.from_file.default", name, shared, size)


def function_as_an_argument(files):
    add_node(files, "torch.ops.higher_order.wrap", argument("func", as_operator="torch.hub.load"))


def code_in_the_name_of_an_argument(files):
    add_node(files, "torch.ops.higher_order.wrap", argument(f"a={shell()}, b", as_int=1))


def code_in_the_name_of_an_input(files):
    set_signature(files, forward_arg_names=[f"x={shell()}"])


def factory_in_the_layout(files):
    set_layout(files, "collections.defaultdict", json.dumps(FACTORY).replace('"', '\\"'))


def factory_in_escapes(files):
    context = json.dumps(FACTORY).replace("factory", "\\u0066actory").replace('"', '\\"')
    set_layout(files, "collections.default\\u0064ict", context)


def code_in_the_layout_in_escapes(files):
    text = json.dumps([f'y={shell()},z="\',#\'\\\n    "#"\\\n'])
    context = ""
    for c in text:
        context += f"\\u{ord(c):04x}"
    set_layout(files, "builtins.dict", context)
    set_signature(files, forward_arg_names=[])


def guards(files):
    change(files, GRAPH, guards_code=[shell()])


def guards_after_none(files):
    """A key that is there twice: readers differ in which of the two they take."""
    name = member(files, GRAPH)
    text = json.dumps(read(files, GRAPH))
    files[name] = text[:-1] + f', "guards_code": {json.dumps([shell()])}, "guards_code": []}}'


ATTACKS = [
    pickle_in_the_sample_inputs,
    pickled_weight,
    pickled_constant,
    custom_object,
    opaque_object,
    old_pickle_of_weights,
    compiled_library,
    size_that_calls,
    symbol_that_calls,
    node_that_loads_code,
    node_that_calls_the_system,
    another_that_does,
    node_of_torchvision_that_writes,
    node_with_underscores,
    node_that_writes_a_file,
    function_as_an_argument,
    code_in_the_name_of_an_argument,
    code_in_the_name_of_an_input,
    factory_in_the_layout,
    factory_in_escapes,
    code_in_the_layout_in_escapes,
    guards,
    guards_after_none,
]


def refused(refuse):
    line = refuse("evaluate", "bad.pt2", "--data", "toy")
    assert line.startswith("bad.pt2: refused") and len(line) < 400
    assert not Path("overlay.png").exists()
    return line


def test_the_good_program_is_scored(files, capsys):
    """Without this the refusals below would prove nothing."""
    write(files)
    load("evaluate").main(["bad.pt2", "--data", "toy"])
    assert "bad.pt2" in capsys.readouterr().out


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_program_with_code_is_never_loaded(attack, files, refuse, unharmed, monkeypatch):
    attack(files)
    write(files)
    loaded = []
    monkeypatch.setattr(torch.export, "load", loaded.append)
    refused(refuse)
    assert loaded == []


@pytest.mark.parametrize("last", [False, True])
def test_a_member_that_is_there_twice(files, refuse, unharmed, last):
    name = member(files, "sample_inputs/model.pt")
    both = [pickled(([Code()], {})), files.pop(name)]
    if last:
        both.reverse()
    with zipfile.ZipFile("bad.pt2", "w") as archive:
        for content in both:
            archive.writestr(name, content)
        for key, data in files.items():
            archive.writestr(key, data)
    refused(refuse)


def test_an_archive_with_two_directories(files, unharmed):
    """Python reads a zip from its end, torch from the offset written there: one file, two contents.
    It may be refused, or the harmless content scored; the other may not be loaded."""

    def parts(members):
        write(members)
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
    "values",
    [
        {"size": "big"},
        {"size": -16},
        {"size": 10**7},
        {"size": 32},  # another than it takes
        {"ignore": 300},
        {"ignore": True},
        {"ignore": 1.0},
        {"classes": "abc"},
        {"classes": ["a", "a", "b"]},
        {"classes": ["a", "b", "\x1b[2J"]},  # moves the cursor
        {"classes": ["a", "b", "c", "d"]},
        {"args": {"data": 5}},
        {"args": {"root": 5}},
        {"args": None},
    ],
    ids=str,
)
def test_meta_of_nonsense(values, files, refuse):
    change(files, NOTE, **values)
    write(files)
    refused(refuse)


@pytest.mark.parametrize("key", ["size", "classes", "ignore"])
def test_meta_without(key, files, refuse):
    meta = read(files, NOTE)
    del meta[key]
    put(files, NOTE, meta)
    write(files)
    assert key in refused(refuse)


@pytest.mark.parametrize("text", ["[1, 2]", "{", ""])
def test_meta_that_is_no_dictionary(text, files, refuse):
    files[member(files, NOTE)] = text
    write(files)
    refused(refuse)


@pytest.mark.parametrize("end", [NOTE, GRAPH, "weights/weight_0", "sample_inputs/model.pt"])
def test_a_member_that_is_missing(end, files, refuse):
    del files[member(files, end)]
    write(files)
    refused(refuse)


def test_zip_bomb(files, refuse):
    beside(files, "weight_0", "weight_7", bytes(30_000_000))
    write(files, method=zipfile.ZIP_DEFLATED)
    assert "unpacks" in refused(refuse)


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
def test_a_program_that_is_cut_off(share, files, refuse):
    write(files)
    whole = Path("bad.pt2").read_bytes()
    Path("bad.pt2").write_bytes(whole[: int(share * len(whole))])
    refused(refuse)


def test_a_checkpoint_is_no_program(refuse):
    torch.save({"model": torch.zeros(3)}, "bad.pt2")
    refused(refuse)


class Grey(Tiny):
    """Takes photos of one channel."""

    def forward(self, x):
        return self.conv(x.expand(-1, 3, -1, -1))


class Pair(Tiny):
    """Answers with two tensors."""

    def forward(self, x):
        return self.conv(x), x


class Diverged(Tiny):
    """Has learned nothing but nan."""

    def __init__(self):
        super().__init__()
        self.conv.weight.data.fill_(float("nan"))


class Norm(Tiny):
    """Normalises with what is in the batch until eval() is called."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Sequential(self.conv, torch.nn.BatchNorm2d(3))


@pytest.mark.parametrize(
    "net, channels, free",
    [(Grey, 1, True), (Tiny, 3, False), (Pair, 3, True), (Diverged, 3, True)],
)
def test_another_contract(net, channels, free, refuse):
    """One channel, a fixed batch, two answers, answers that are no numbers."""
    export(net().eval(), channels=channels, free=free)
    refused(refuse)


def test_a_program_in_training_mode(refuse):
    export(Norm().train())
    assert "eval()" in refused(refuse)
    export(Norm().eval())
    load("evaluate").main(["bad.pt2", "--data", "toy"])
