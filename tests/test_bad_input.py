"""Bad input gets one line that names the thing, exit code 2, and leaves nothing behind."""
import io, json, os, struct, zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import SCRIPTS, SEGMENTERS, SMALL, TRAINING, drawn, load, start, write_folder

BOTH = [name for name in ("pretrain", "finetune", "vqvae") if name in SCRIPTS]

def quick(name, *flags):
    """The fewest flags with which a script would train at once."""
    return [*SMALL[name], "--epochs", "1", "--frac", "0.05", *map(str, flags)]

@pytest.fixture(autouse=True)
def nothing_left(here):
    """Whatever was refused, there is no run folder afterwards unless the test made one."""
    yield
    assert not Path("checkpoints").exists()

# --- flags ----------------------------------------------------------------------------------------

FLAGS = [("--frac", "0"), ("--frac", "2"), ("--frac", "half"), ("--frac", "auto"), ("--size", "63"),
         ("--size", "100", "63"), ("--size", "0"), ("--size", "32", "32", "32"), ("--size", "auto", "32"),
         ("--epochs", "0"), ("--epochs", "1.5"), ("--lr", "nan"), ("--lr", "0"), ("--lr", "inf"),
         ("--batch-size", "0"), ("--batch-size", "-3"), ("--weight-decay", "-1"), ("--weight-decay", "auto"),
         ("--seed", "-1"), ("--seed", "auto"), ("--learning-rate", "1"), ("--epoch", "3"),
         ("--device", "abacus")]

@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
@pytest.mark.parametrize("name", TRAINING)
def test_flag(name, flags, refuse):
    line = refuse(name, *quick(name), *flags)
    assert flags[0].strip("-") in line and (flags[0] not in ("--lr", "--frac") or flags[1] in line)

@pytest.mark.parametrize("flags", (("--mask", "0.9-0.1"), ("--mask", "0.5"), ("--mask-style", "round"),
                                   ("--patch", "0"), ("--downs", "0"), ("--width", "auto"), ("--size", "62")), ids=" ".join)
@pytest.mark.skipif("pretrain" not in SCRIPTS, reason="no pretrain.py")
def test_flag_of_pretrain(flags, refuse):
    assert flags[0] in refuse("pretrain", *quick("pretrain"), *flags)

@pytest.mark.parametrize("flags", (("--loss", "bce+hinge"), ("--take", "head"), ("--cats", "Garfield"),
                                   ("--cats", "Bombay,beagle"), ("--ignore", "300"), ("--ignore", "auto")), ids=" ".join)
@pytest.mark.skipif("finetune" not in SCRIPTS, reason="no finetune.py")
def test_flag_of_finetune(flags, refuse):
    assert flags[0] in refuse("finetune", *quick("finetune"), *flags)

@pytest.mark.parametrize("flags", (("--split", "train"), ("--blur", "-1"), ("--blur", "auto"), ("--batch-size", "0"),
                                   ("--batch-size", "auto"), ("--verbose",)), ids=" ".join)
def test_flag_of_evaluate(flags, refuse):
    assert flags[0] in refuse("evaluate", *flags)

@pytest.mark.parametrize("name", SEGMENTERS)
def test_nothing_of_drawn_pets_is_ignored(name, refuse):
    assert "--ignore" in refuse(name, *quick(name), "--data", "toy", "--ignore", "2")

@pytest.mark.parametrize("name", ("unet", "evaluate"))
def test_a_device_of_others(name, files, here):
    """Its module is missing, which is another error than that of a name that is no device. (In a process of its own:
    after a look at such a device autograd refuses to be forked, which other tests do.)"""
    write(files)
    child = start(name, *(["bad.pt2"] if name == "evaluate" else quick(name)), "--device", "hpu", cwd=here)
    line = child.communicate(timeout=120)[1]
    assert child.returncode == 2 and line.startswith(f"{name}.py: error: --device hpu") and line.count("\n") == 1
    assert "--device cpu" in line and len(line) < 250

@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", TRAINING)
def test_a_device_that_is_not_there(name, refuse):
    line = refuse(name, *quick(name, "--device", "cuda"))
    assert "--device cuda" in line and "--device cpu" in line

# --- checkpoints ----------------------------------------------------------------------------------

class Code:
    """A pickle of this writes the file when it is loaded without care."""
    def __reduce__(self):
        return os.system, (f"echo ran > {Path.cwd() / 'ran'}",)

@pytest.fixture
def unharmed(here):
    """No test may leave the file that the planted code writes."""
    yield
    assert not Path("ran").exists(), "planted code ran"

def test_the_planted_code_works(here):
    torch.save(Code(), "bad.pt")
    torch.load("bad.pt", weights_only=False)
    assert Path("ran").exists()

@pytest.mark.skipif("finetune" not in SCRIPTS, reason="no finetune.py")
class TestInit:
    def refused(self, refuse, file):
        line = refuse("finetune", "--size", "16", "--epochs", "1", "--init", str(file))
        assert str(file) in line and "python pretrain.py" in line
        return line

    def test_missing(self, refuse):
        self.refused(refuse, "checkpoints/pretrain/best.pt")
        assert "python pretrain.py" in refuse("finetune")         # by default it is asked for

    @pytest.mark.parametrize("content", (b"", b"no checkpoint", "list", "dict", "other", "old", "code", "folder"))
    def test_foreign(self, refuse, unharmed, content):
        objects = {"list": [1, 2], "dict": {"model": {}}, "code": {"script": "pretrain.py", "format": 1, "x": Code()},
                   "other": {"script": "unet.py", "format": 1, "model": {}, "args": {}},
                   "old": {"script": "pretrain.py", "format": 0, "model": {}, "args": {}}}
        if content == "folder":
            Path("bad.pt").mkdir()
        elif isinstance(content, bytes):
            Path("bad.pt").write_bytes(content)
        else:
            torch.save(objects[content], "bad.pt")
        self.refused(refuse, "bad.pt")

    @pytest.mark.parametrize("share", (0.1, 0.5, 0.99))
    def test_truncated(self, refuse, share):
        torch.save({"script": "pretrain.py", "format": 1, "model": {"a": torch.zeros(9999)}, "args": {}}, "bad.pt")
        whole = Path("bad.pt").read_bytes()
        Path("bad.pt").write_bytes(whole[:int(len(whole) * share)])
        self.refused(refuse, "bad.pt")

    def test_other_widths_than_it_says(self, refuse):
        m = load("finetune")
        state = m.VQVAE(3, 32, 8, 1, 2).state_dict()
        widths = {"width": 64, "residual_width": 8, "residual_blocks": 1, "downs": 2}
        torch.save({"script": "pretrain.py", "format": m.FORMAT, "model": state, "args": widths | {"data": "toy"}}, "bad.pt")
        assert "--init" in refuse("finetune", "--size", "16", "--epochs", "1", "--init", "bad.pt")

@pytest.mark.parametrize("name", TRAINING)
def test_resume_without_a_run(name, refuse):
    line = refuse(name, *quick(name, "--resume", "--out", "run"))
    assert "last.pt" in line and "--resume" in line and not Path("run").exists()

# --- folders --------------------------------------------------------------------------------------

class TestFolder:
    name = SEGMENTERS[0]

    @pytest.fixture
    def folder(self, here):
        return write_folder(here / "f", 12)

    def refused(self, refuse, folder, *flags):
        return refuse(self.name, "--data", folder, *quick(self.name), *flags)

    def test_missing(self, refuse):
        assert "nowhere" in self.refused(refuse, "nowhere")

    def test_empty(self, refuse):
        Path("empty/images").mkdir(parents=True)
        Path("empty/masks").mkdir()
        assert "empty" in self.refused(refuse, "empty")

    @pytest.mark.parametrize("kind", ("images", "masks"))
    def test_mismatched(self, refuse, folder, kind):
        file = sorted((folder / kind).iterdir())[4]
        file.unlink()
        assert file.stem in self.refused(refuse, folder)

    def test_rgb_mask(self, refuse, folder):
        drawn(0)[0].save(folder / "masks/004.png")
        line = self.refused(refuse, folder)
        assert "004" in line and "RGB" in line

    @pytest.mark.parametrize("values", ([0, 200], [0, 1, 255], [3, 128, 255]))
    def test_unexpected_values(self, refuse, folder, values):
        for file in (folder / "masks").iterdir():
            Image.fromarray(np.tile(np.repeat(np.array(values, np.uint8), 48 // len(values)), (40, 1))).save(file)
        line = self.refused(refuse, folder)
        assert "masks" in line and str(values[-1]) in line

    def test_unequal_sizes(self, refuse, folder):
        drawn(0, (20, 30), 2)[1].save(folder / "masks/004.png")
        line = self.refused(refuse, folder)
        assert "004" in line and "20" in line and "48" in line

    def test_unreadable(self, refuse, folder):
        (folder / "images/004.jpg").write_bytes(b"no photo")
        assert "004.jpg" in self.refused(refuse, folder)

    def test_cut_off_photo(self, refuse, folder):
        whole = (folder / "images/004.jpg").read_bytes()
        (folder / "images/004.jpg").write_bytes(whole[:len(whole) // 2])
        assert "004.jpg" in self.refused(refuse, folder)

    def test_many_unreadable_photos_are_one_line(self, refuse, folder):
        for file in sorted((folder / "images").iterdir()):
            file.write_bytes(b"no photo")
        self.refused(refuse, folder)
        assert not list(Path("data").rglob("*.*"))

    def test_one_photo(self, refuse, here):
        self.refused(refuse, write_folder(here / "one", 1))

@pytest.mark.parametrize("name", [n for n in BOTH if n != "finetune"])
@pytest.mark.parametrize("data", ("nowhere", "empty", "catdog", "pets"))
def test_no_photos(name, data, refuse):
    if name != "pretrain" and data == "catdog":
        pytest.skip("only pretrain.py has the four collections")
    Path("empty").mkdir()
    assert data in refuse(name, "--data", data, "--root", "empty", *quick(name))

# --- where it writes ------------------------------------------------------------------------------

@pytest.mark.parametrize("name", TRAINING)
class TestOut:
    def test_holds_something_else(self, name, refuse):
        Path("mine").mkdir()
        Path("mine/thesis.txt").write_text("years of work")
        assert "mine" in refuse(name, *quick(name, "--out", "mine"))
        assert os.listdir("mine") == ["thesis.txt"] and not Path("mine.prev").exists()

    @pytest.mark.parametrize("out", ("file", "file/run"))
    def test_a_file_is_in_the_way(self, name, refuse, out):
        Path("file").write_text("here first")
        assert "file" in refuse(name, *quick(name, "--out", out))
        assert Path("file").read_text() == "here first"

    @pytest.mark.parametrize("error", (OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")),
                             ids=("OSError", "RuntimeError"))
    def test_full_disk(self, name, refuse, error, monkeypatch):
        def full(state, file, *_, **__):
            Path(file).write_bytes(b"half")
            raise error
        monkeypatch.setattr(torch, "save", full)
        line = refuse(name, *quick(name, "--out", "run"))
        assert ".pt" in line and str(error).split("]")[-1].strip() in line and "space" in line
        assert [file for file in Path("run").rglob("*") if file.name != "log.jsonl"] == []

    def test_full_disk_later_keeps_the_last_epoch(self, name, refuse, monkeypatch):
        save, count = torch.save, [0]
        def full(state, file, *_, **__):
            count[0] += 1
            if count[0] > 2:
                raise OSError(28, "No space left on device")
            return save(state, file)
        monkeypatch.setattr(torch, "save", full)
        refuse(name, *quick(name, "--out", "run"), "--epochs", "3")
        assert torch.load("run/last.pt", weights_only=True)["epoch"] == 1

@pytest.mark.parametrize("name", BOTH)
def test_a_loss_that_is_not_finite(name, refuse, monkeypatch):
    forward = load(name).VQVAE.forward
    monkeypatch.setattr(load(name).VQVAE, "forward", lambda self, *args: tuple(
        value * float("nan") if i == 0 and self.training else value for i, value in enumerate(forward(self, *args))))
    line = refuse(name, *quick(name, "--out", "run"))
    assert "epoch 1" in line and "--lr" in line and not Path("run/best.pt").exists()

# --- programs -------------------------------------------------------------------------------------

class Tiny(torch.nn.Module):
    """Three classes at 16 x 16."""
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(x)

META = {"classes": ["pet", "background", "border"], "size": 16, "ignore": None}

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The members of a good program: {name in the archive: bytes}."""
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    program = torch.export.export(Tiny().eval(), (torch.zeros(2, 3, 16, 16),),
                                  dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.export.save(program, path, extra_files={"meta.json": json.dumps(META)})
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}

def member(files, end):
    name, = [name for name in files if name.endswith(end)]
    return name

def write(members, path="bad.pt2", method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)

def change(files, end, function):
    """A copy of the members in which one JSON file went through a function that changes it."""
    value = json.loads(files[member(files, end)])
    function(value)
    return files | {member(files, end): json.dumps(value)}

def pickled(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()

def shell():
    return f"__import__('os').system('echo ran > {Path.cwd() / 'ran'}')"

def nodes(graph):
    return graph["graph_module"]["graph"]["nodes"]

def node(target, *inputs):
    return {"target": target, "inputs": list(inputs), "outputs": [{"as_none": True}], "metadata": {},
            "is_hop_single_tensor_return": True, "name": "added"}

def score(*flags):
    load("evaluate").main(["bad.pt2", "--data", "toy", *flags])

def test_the_good_program_is_scored(files, capsys):
    """Without this the refusals below would prove nothing."""
    write(files)
    score()
    assert "bad.pt2" in capsys.readouterr().out

def symbols(graph):
    """Every expr_str in a graph, as (dictionary, key)."""
    found, stack = [], [graph]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            found += [value] if "expr_str" in value else []
            stack += value.values()
        elif isinstance(value, list):
            stack += value
    return found

def sizes(graph, text):
    for holder in symbols(graph):
        holder["expr_str"] = text

def layout(files, kind, context, names=None):
    """The members with another kind of dictionary as the layout of the inputs by name."""
    def put(graph):
        signature = graph["graph_module"]["module_call_graph"][0]["signature"]
        old = signature["in_spec"]
        signature["in_spec"] = old.replace('"builtins.dict", "context": "[]"', f'"{kind}", "context": "' + (
            context if names is not None else context.replace('"', '\\"')) + '"')
        signature["forward_arg_names"] = signature["forward_arg_names"] if names is None else names
        assert signature["in_spec"] != old
    return change(files, "models/model.json", put)

def escaped(text):
    return "".join(c if c.isalnum() else f"\\u{ord(c):04x}" for c in text)

ATTACKS = {        # what is in the archive, and what the message must name
    "pickle in the sample inputs": lambda f: (
        f | {member(f, "sample_inputs/model.pt"): pickled(([Code()], {}))}, "sample inputs"),
    "pickled weight": lambda f: (change(
        f | {f"{member(f, 'weights/weight_0')}": pickled(Code())}, "model_weights_config.json",
        lambda c: [v.update(use_pickle=True) for v in c["config"].values()]), "pickle"),
    "pickled constant": lambda f: (change(
        f | {member(f, "weights/weight_0").replace("weights/weight_0", "constants/tensor_0"): pickled(Code())},
        "model_constants_config.json", lambda c: c["config"].update(x={
            "path_name": "tensor_0", "is_param": False, "use_pickle": True, "tensor_meta": None})), "pickle"),
    "custom object": lambda f: (change(f, "model_constants_config.json", lambda c: c["config"].update(x={
        "path_name": "custom_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": None})), "custom_obj_0"),
    "opaque object": lambda f: (f | {member(f, "weights/weight_0").replace(
        "weights/weight_0", "constants/opaque_obj_0"): pickled(Code())}, "opaque_obj_0"),
    "a size that calls": lambda f: (change(f, "models/model.json", lambda g: sizes(g, shell())), "size"),
    "a symbol that calls": lambda f: (change(
        f, "models/model.json", lambda g: sizes(g, f"Symbol('s0', positive={shell()})")), "size"),
    "a node that loads code": lambda f: (change(f, "models/model.json", lambda g: nodes(g)[0].update(
        target="torch.hub.load")), "torch.hub.load"),
    "a node that calls the system": lambda f: (change(f, "models/model.json", lambda g: nodes(g)[0].update(
        target="torch.os.system")), "torch.os.system"),
    "another node that does": lambda f: (change(f, "models/model.json", lambda g: nodes(g)[0].update(
        target="os.system")), "os.system"),
    "a function as an argument": lambda f: (change(f, "models/model.json", lambda g: nodes(g).insert(0, node(
        "torch.ops.higher_order.wrap", {"name": "func", "arg": {"as_operator": "torch.hub.load"}, "kind": 2}))), ""),
    "code in the name of an argument": lambda f: (change(f, "models/model.json", lambda g: nodes(g).insert(0, node(
        "torch.ops.higher_order.wrap", {"name": f"a={shell()}, b", "arg": {"as_int": 1}, "kind": 2}))), ""),
    "code in the name of an input": lambda f: (change(
        f, "models/model.json", lambda g: g["graph_module"]["module_call_graph"][0]["signature"].update(
            forward_arg_names=[f"x={shell()}"])), ""),
    "a factory in the layout of the inputs": lambda f: (layout(f, "collections.defaultdict", json.dumps(
        {"default_factory_module": "antigravity", "default_factory_name": "x", "dict_context": []})), "one tensor"),
    "the same in escapes": lambda f: (layout(f, "collections.default\\u0064ict", json.dumps(
        {"default_\\u0066actory_module": "antigravity", "default_factory_name": "x", "dict_context": []})
        .replace("\\\\", "\\")), "one tensor"),
    "code in the layout, in escapes": lambda f: (layout(f, "builtins.dict", escaped(json.dumps(
        [f"y={shell()},z=\"',#'\\\n    \"#\"\\\n"])), []), "one tensor"),
    "a node that writes a file": lambda f: (change(f, "models/model.json", lambda g: nodes(g).insert(0, node(
        "torch.ops.aten.from_file.default", {"name": "filename", "arg": {"as_string": "ran"}, "kind": 1},
        {"name": "shared", "arg": {"as_bool": True}, "kind": 1}, {"name": "size", "arg": {"as_int": 6}, "kind": 1}))),
        "from_file"),
    "a node of torchvision that does": lambda f: (change(f, "models/model.json", lambda g: nodes(g)[0].update(
        target="torch.ops.torchvision.write_file.default")), "write_file"),
    "a node with underscores": lambda f: (change(f, "models/model.json", lambda g: nodes(g)[0].update(
        target="torch.ops.aten.__class__")), "__class__"),
    "guards": lambda f: (change(f, "models/model.json", lambda g: g.update(guards_code=[shell()])), "code"),
    "a compiled library": lambda f: (
        f | {member(f, "archive_format").replace("archive_format", "data/aotinductor/model/x.so"): b"\x7fELF"},
        "aotinductor"),
    "an old-style pickle of weights": lambda f: (
        f | {member(f, "weights/weight_0").replace("weight_0", "model.pt"): pickled(Code())}, "model.pt"),
    "no meta.json": lambda f: ({n: d for n, d in f.items() if not n.endswith("meta.json")}, "meta.json"),
    "no graph": lambda f: ({n: d for n, d in f.items() if not n.endswith("model.json")}, "model.json"),
    "meta without size": lambda f: (change(f, "meta.json", lambda m: m.pop("size")), "size"),
    "meta without classes": lambda f: (change(f, "meta.json", lambda m: m.pop("classes")), "classes"),
    "meta without ignore": lambda f: (change(f, "meta.json", lambda m: m.pop("ignore")), "ignore"),
    "meta that is a list": lambda f: (f | {member(f, "meta.json"): "[1, 2]"}, ""),
    "meta that is no JSON": lambda f: (f | {member(f, "meta.json"): "{"}, ""),
    "a size of nonsense": lambda f: (change(f, "meta.json", lambda m: m.update(size="big")), ""),
    "a label of nonsense": lambda f: (change(f, "meta.json", lambda m: m.update(ignore=300)), "300"),
    "a label that is no number": lambda f: (change(f, "meta.json", lambda m: m.update(ignore=True)), "ignore"),
    "a label with a point": lambda f: (change(f, "meta.json", lambda m: m.update(ignore=1.0)), "ignore"),
    "two classes of one name": lambda f: (change(f, "meta.json", lambda m: m.update(classes=list("aab"))), "names"),
    "a name that moves the cursor": lambda f: (
        change(f, "meta.json", lambda m: m.update(classes=["a", "b", "\x1b[2J"])), "names"),
    "classes in one word": lambda f: (change(f, "meta.json", lambda m: m.update(classes="abc")), "names"),
    "data that are a number": lambda f: (change(f, "meta.json", lambda m: m.update(args={"data": 5})), "args"),
    "a root that is a number": lambda f: (change(f, "meta.json", lambda m: m.update(args={"root": 5})), "args"),
    "arguments of nonsense": lambda f: (change(f, "meta.json", lambda m: m.update(args=None)), "args"),
    "a negative size": lambda f: (change(f, "meta.json", lambda m: m.update(size=-16)), ""),
    "a huge size": lambda f: (change(f, "meta.json", lambda m: m.update(size=10**7)), ""),
    "another size than it takes": lambda f: (change(f, "meta.json", lambda m: m.update(size=32)), ""),
    "more classes than it has": lambda f: (change(f, "meta.json", lambda m: m["classes"].append("x")), "4"),
}

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attack", ATTACKS)
def test_program_is_refused(attack, files, refuse, unharmed):
    members, word = ATTACKS[attack](files)
    write(members)
    line = refuse("evaluate", "bad.pt2", "--data", "toy")
    assert "bad.pt2" in line and "refused" in line and word in line
    assert not Path("overlay.png").exists()

class Grey(Tiny):
    """Takes photos of one channel."""
    def forward(self, x):
        return self.conv(x.expand(-1, 3, -1, -1))

class Pair(Tiny):
    """Answers with two tensors."""
    def forward(self, x):
        return self.conv(x), x

class Diverged(Tiny):
    """Has learned nothing but NaN."""
    def __init__(self):
        super().__init__()
        self.conv.weight.data.fill_(float("nan"))

class Norm(Tiny):
    """Normalises with what is in the batch, as nobody called eval()."""
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Sequential(self.conv, torch.nn.BatchNorm2d(3))

@pytest.mark.filterwarnings("ignore")
def test_a_program_in_training_mode(refuse, capsys):
    for net in (Norm(), Norm().eval()):
        program = torch.export.export(net, (torch.zeros(2, 3, 16, 16),),
                                      dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        torch.export.save(program, "bad.pt2", extra_files={"meta.json": json.dumps(META)})
        if net.training:
            assert "eval()" in refuse("evaluate", "bad.pt2", "--data", "toy")
    score()
    assert "bad.pt2" in capsys.readouterr().out

class Second(torch.nn.Module):
    """Sees the second of two classes in the left half of every photo."""
    def forward(self, x):
        left = (torch.arange(x.shape[3]) < x.shape[3] // 2).float().expand(x.shape[0], 1, *x.shape[2:])
        return torch.cat([1 - left, left], 1) + 0 * x[:, :2]

@pytest.mark.filterwarnings("ignore")
def test_two_channels_for_background_and_foreground(here, capsys):
    """Both constant answers are there by their names, D5 is of the foreground, and a program of one channel for the
    same photos stands in the same call."""
    Path("f/images").mkdir(parents=True)
    Path("f/masks").mkdir()
    for i in range(20):
        Image.new("RGB", (16, 16)).save(f"f/images/{i}.png")
        mask = Image.new("L", (16, 16))
        mask.paste(255, (0, 0, 4, 16))                                 # a quarter, inside the left half
        mask.save(f"f/masks/{i}.png")
    for path, net, classes in (("two.pt2", Second(), ["background", "foreground"]), ("one.pt2", Tiny(), ["foreground"])):
        net = net if path == "two.pt2" else torch.nn.Sequential(net, torch.nn.Conv2d(3, 1, 1))
        program = torch.export.export(net.eval(), (torch.zeros(2, 3, 16, 16),),
                                      dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
                                      if path == "two.pt2" else {"input": {0: torch.export.Dim("batch", min=1)}})
        torch.export.save(program, path, extra_files={"meta.json": json.dumps(META | {"classes": classes})})
    load("evaluate").main(["two.pt2", "one.pt2", "--data", "f", "--as-published", "--json", "s.json"])
    out, scores = capsys.readouterr().out, json.loads(Path("s.json").read_text())[0]["scores"]
    assert "all foreground" in out and scores["D5_iou"] == pytest.approx(0.5) == scores["classes"]["foreground"]["iou"]
    line = next(line for line in out.splitlines() if line.startswith("all background"))
    assert line.split()[2] == "0.7500"

@pytest.mark.filterwarnings("ignore")
def test_a_program_for_few_photos(refuse):
    program = torch.export.export(Tiny().eval(), (torch.zeros(2, 3, 16, 16),),
                                  dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=8)},))
    torch.export.save(program, "bad.pt2", extra_files={"meta.json": json.dumps(META)})
    assert "--batch-size" in refuse("evaluate", "bad.pt2", "--data", "toy")
    score("--batch-size", "8")

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("net, channels, free", ((Grey, 1, True), (Tiny, 3, False), (Pair, 3, True), (Diverged, 3, True)))
def test_a_program_with_another_contract(net, channels, free, refuse):
    """One channel, a fixed batch, two answers, answers that are no numbers."""
    shapes = ({0: torch.export.Dim("batch", min=1)},) if free else None
    program = torch.export.export(net().eval(), (torch.zeros(2, channels, 16, 16),), dynamic_shapes=shapes)
    torch.export.save(program, "bad.pt2", extra_files={"meta.json": json.dumps(META)})
    assert "bad.pt2: refused" in refuse("evaluate", "bad.pt2", "--data", "toy")

def test_zip_bomb(files, refuse):
    name = member(files, "weights/weight_0").replace("weight_0", "weight_7")
    write(files | {name: bytes(30_000_000)}, method=zipfile.ZIP_DEFLATED)
    assert "unpacks" in refuse("evaluate", "bad.pt2", "--data", "toy")

@pytest.mark.parametrize("share", (0, 0.3, 0.9, 0.999))
def test_truncated_program(files, refuse, share):
    write(files)
    whole = Path("bad.pt2").read_bytes()
    Path("bad.pt2").write_bytes(whole[:int(len(whole) * share)])
    assert "bad.pt2" in refuse("evaluate", "bad.pt2", "--data", "toy")

def test_a_checkpoint_is_no_program(refuse):
    torch.save({"model": torch.zeros(3)}, "bad.pt2")
    assert "bad.pt2" in refuse("evaluate", "bad.pt2", "--data", "toy")

@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("last", (False, True))
def test_a_member_that_is_there_twice(files, refuse, unharmed, last):
    """Readers differ in which of the two they take."""
    name = member(files, "sample_inputs/model.pt")
    with zipfile.ZipFile("bad.pt2", "w") as archive:
        for key, data in files.items():
            both = [data, pickled(([Code()], {}))] if last else [pickled(([Code()], {})), data]
            for content in both if key == name else [data]:
                archive.writestr(key, content)
    refuse("evaluate", "bad.pt2", "--data", "toy")

@pytest.mark.filterwarnings("ignore")
def test_an_archive_with_two_directories(files, unharmed, capsys):
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
    while place < len(directory):            # offsets as Python will read them
        lengths = struct.unpack_from("<HHH", directory, place + 28)
        offset, = struct.unpack_from("<I", directory, place + 42)
        struct.pack_into("<I", directory, place + 42, offset + len(bad) - len(good))
        place += 46 + sum(lengths)
    struct.pack_into("<I", end, 16, len(bad))
    Path("bad.pt2").write_bytes(bad + bad_directory + good + directory + end)
    with zipfile.ZipFile("bad.pt2") as archive:
        assert archive.read(name) == files[name]                 # the trick works
    try:
        score()
    except SystemExit as stop:
        assert stop.code == 2 and "bad.pt2" in capsys.readouterr().err

# --- evaluate -------------------------------------------------------------------------------------

def test_nothing_to_evaluate(refuse):
    line = refuse("evaluate")
    assert "python pretrain.py" in line and "python finetune.py" in line

@pytest.mark.parametrize("run", ("nowhere", "nowhere.pt2"))
def test_a_run_that_is_not_there(run, refuse):
    assert run in refuse("evaluate", run)

def test_a_run_without_a_program(refuse):
    Path("run").mkdir()
    assert "run" in refuse("evaluate", "run")

def test_a_program_that_names_no_data(files, refuse):
    write(files)
    assert "--data" in refuse("evaluate", "bad.pt2")

def test_classes_that_do_not_fit(files, refuse, parted):
    write(change(files, "meta.json", lambda m: m.update(ignore=9)))
    line = refuse("evaluate", "bad.pt2", "--data", parted)
    assert "pet" in line and "bad.pt2" in line

def test_a_binary_program_on_three_classes(files, refuse):
    write(change(files, "meta.json", lambda m: m.update(classes=["a", "b", "c"])))
    assert "classes" in refuse("evaluate", "bad.pt2", "--data", "toy")

@pytest.mark.parametrize("log", ('{"epoch": 1, "train_loss": 0.5}', "", '{"epoch": 1', "[3]"))
def test_a_log_of_somebody_else(log, files, here, capsys):
    """A program of one's own, with a log of one's own beside it: scores, pictures, no curves."""
    Path("run").mkdir()
    write(files, "run/model.pt2")
    Path("run/log.jsonl").write_text(log)
    load("evaluate").main(["run", "--data", "toy"])
    assert "no curves" in capsys.readouterr().out and Path("run/overlay.png").exists()
    assert not Path("run/curves.png").exists()

def test_a_folder_in_the_place_of_the_scores(files, refuse, monkeypatch):
    write(files)
    monkeypatch.setattr(load("evaluate"), "run_program", None)             # it ends before
    assert "--json ." in refuse("evaluate", "bad.pt2", "--data", "toy", "--json", ".")

def test_pictures_that_cannot_be_written(files, here, capsys):
    """The scores stand on the terminal and in the file all the same."""
    write(files)
    Path("bad-overlay.png").mkdir()
    with pytest.raises(SystemExit) as stop:
        score("--json", "s.json")
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and "bad-overlay.png" in err and "all background" in out
    assert json.loads(Path("s.json").read_text())[0]["scores"]["miou"] > 0

def test_scores_that_cannot_be_written(files, refuse):
    write(files)
    Path("file").write_text("here first")
    assert "file" in refuse("evaluate", "bad.pt2", "--data", "toy", "--json", "file/scores.json")
