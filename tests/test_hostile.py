"""Odd pictures, odd numbers, odd machines: each ends well or in one line, and nothing is lost."""
import math, os, resource, shutil, signal, struct, subprocess, sys, zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import (LIGHT, ROOT, SEGMENTERS, SMALL, checkpoint, drawn, load, rows,
                      start, write_folder)

# The blocks under attack have the same text in every script: one with and one without labels at all
# times, the others with --slow.
each = pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in ("pretrain", "unet") else
                                                     pytest.mark.slow) for name in LIGHT])

def tiny(name, *flags):
    """The flags of a run of a second."""
    return [*SMALL[name], "--epochs", "1", "--out", "run", *map(str, flags)]

def ends(name, cwd, *argv, environment=None, limits=None, timeout=120, **options):
    """A script as a child -> exit code, stdout, stderr; whatever happens there is no traceback."""
    def lower():
        for limit, value in (limits or {}).items():
            resource.setrlimit(limit, (value, value))
    child = start(name, *argv, cwd=cwd, env=environment or os.environ, preexec_fn=lower, **options)
    try:
        out, err = child.communicate(timeout=timeout)
    finally:
        child.kill()
    assert "Traceback" not in err, err
    return child.returncode, out, err

# --- pictures -------------------------------------------------------------------------------------

def huge(path, width, height):
    """A PNG that says it is that large and holds nothing of it."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(
        ">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                     + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b""))

def photo(kind, path):
    """A good but unusual photo of 48 x 40 under that name."""
    rgb = drawn(0)[0]
    if kind == "16-bit":
        return Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257).save(path, "PNG")
    if kind == "animated":
        return rgb.convert("P").save(path, "GIF", save_all=True, append_images=[rgb.convert("P")] * 3)
    if kind == "1x1":
        return rgb.resize((1, 1)).save(path, "PNG")
    if kind == "wrong extension":
        return rgb.save(path, "BMP")
    if kind == "palette with transparency":
        return rgb.convert("P").save(path, "PNG", transparency=3)
    rgb.convert(kind).save(path, {"CMYK": "JPEG"}.get(kind, "PNG"))

GOOD = ["CMYK", "P", "palette with transparency", "animated", "L", "LA", "RGBA", "1", "1x1",
        "wrong extension"]
BAD = {"empty": lambda file: file.write_bytes(b""), "cut": lambda file: file.write_bytes(file.read_bytes()[:300]),
       "bomb": lambda file: huge(file, 20000, 20000), "larger bomb": lambda file: huge(file, 2**31 - 1, 2**31 - 1),
       "text": lambda file: file.write_text("<html>404</html>"),
       "noise": lambda file: file.write_bytes(bytes(range(256)) * 20),
       "a folder": lambda file: (file.unlink(), file.mkdir())}

@pytest.mark.parametrize("kind", GOOD)
def test_unusual_photos_are_read(kind, here):
    """In all ways of reading photos, with colours about right; no label moves."""
    folder = write_folder("f", 12)
    if kind == "1x1":
        Image.new("L", (1, 1)).save("f/masks/000.png")
    photo(kind, Path("f/images/000.jpg"))
    m = load("unet")
    parts = [m.load_split("f", "data", part, [16, 16], None) for part in ("train", "val")]
    assert sum(len(images) for images, *_ in parts) == 10
    images, notes = load("pretrain").decode_photos(sorted(folder.glob("images/*")), [16, 16])
    assert notes["bad"] == {} and len(images) == 12
    if kind not in ("1x1", "1"):
        likeness = np.corrcoef(images[0].float().mean(0).flatten(), np.asarray(
            drawn(0)[0].convert("L").resize((16, 16), Image.BILINEAR)).flatten())[0, 1]
        assert likeness > 0.9

def test_16_bit_photos(here, refuse):
    """Without labels they are turned into 8 bits, with labels refused; never taken for white ones."""
    write_folder("f", 12)
    photo("16-bit", Path("f/images/004.jpg"))
    images, notes = load("pretrain").decode_photos(sorted(Path("f/images").glob("*")), [16, 16])
    grey = np.asarray(drawn(0)[0].convert("L").resize((16, 16), Image.BILINEAR)).astype(int)
    assert notes["bad"] == {} and abs(images[4, 1].numpy() - grey).mean() < 3
    assert "004.jpg, 004.png: wrong mode or size" in refuse("unet", *tiny("unet"), "--data", "f")

@pytest.mark.parametrize("kind", BAD)
def test_broken_photos(kind, here, refuse):
    """With labels the file is named; without, it is left out, counted and named."""
    write_folder("f", 12)
    BAD[kind](Path("f/images/004.jpg"))
    load("pretrain").main([*tiny("pretrain"), "--data", "f/images"])
    line = refuse("unet", *tiny("unet"), "--data", "f")
    assert "004.jpg" in line and len(line) < 400

def test_broken_photos_are_counted(here, capsys):
    """Two thousand broken files among twelve good ones: three are named, all are counted."""
    write_folder("f", 12)
    for i in range(2000):
        Path(f"f/images/x{i}.png").write_bytes(b"" if i % 2 else b"nothing")
    load("pretrain").main([*tiny("pretrain"), "--data", "f/images"])
    out = capsys.readouterr().out
    assert out.count("skipped") == 3 and " 2000 " in out and "train 11" in out

# --- masks ----------------------------------------------------------------------------------------

def paint(values):
    def painted(labels):
        return np.asarray(values, np.uint8)[labels]
    return painted

@pytest.mark.parametrize("name", [name for name in SEGMENTERS if name in LIGHT])
@pytest.mark.parametrize("values, flags", (([0, 255], ()), ([0, 1], ()), ([0, 0], ()), ([255, 255], ()), ([1, 1], ()),
                                           ([0, 5], ("--ignore", 5)), ([5, 5], ("--ignore", 3)), ([5, 90], ()),
                                           ([7, 7], ())), ids=str)
def test_masks_of_every_kind(name, values, flags, here):
    """Empty, full, one label, gaps between labels, nothing but what is ignored: it trains, and every
    number in the log is one."""
    write_folder("f", 12, paint=paint(values))
    load(name).main([*tiny(name, *flags), "--data", "f"])
    load("evaluate").main(["run", "--as-published", "--json", "s.json"])
    for row in rows("run"):
        numbers = [value for key, value in row.items() if key != "memory_gb" and not isinstance(value, list)]
        assert all(math.isfinite(value) for value in numbers), row

@pytest.mark.parametrize("name", [name for name in SEGMENTERS if name in LIGHT])
def test_masks_of_nothing_but_what_is_ignored(name, here, refuse):
    write_folder("f", 12, paint=paint([3, 3]))
    assert "--ignore" in refuse(name, *tiny(name), "--data", "f", "--ignore", "3")

# --- numbers --------------------------------------------------------------------------------------

@each
class TestNumbers:
    def data(self, name, n=12):
        write_folder("f", n)
        return ["--data", "f" if name in SEGMENTERS else "f/images"]

    @pytest.mark.parametrize("flags", (("--seed", 2**31), ("--batch-size", 10**6), ("--frac", 1e-6), ("--lr", 1e-9),
                                       ("--weight-decay", 10), ("--size", 32, 64),
                                       pytest.param(("--size", 1024), marks=pytest.mark.slow)), ids=str)
    def test_the_ends_of_the_ranges(self, name, flags, here):
        load(name).main([*tiny(name), *self.data(name), "--size", "64", *map(str, flags)])
        assert all(math.isfinite(row["val_loss"]) for row in rows("run"))

    def test_a_rate_that_diverges(self, name, here, refuse, monkeypatch):
        """Ten epochs at a rate of 10, a thousand times too much: it ends well or says --lr."""
        step = torch.optim.AdamW.step
        def burst(self, *args, **kwargs):
            step(self, *args, **kwargs)
            for group in self.param_groups:
                for weight in group["params"]:
                    weight.data.mul_(1e20)
        monkeypatch.setattr(torch.optim.AdamW, "step", burst)
        line = refuse(name, *tiny(name), *self.data(name), "--lr", "10", "--epochs", "3")
        assert "not finite" in line and "--lr" in line

    def test_the_fewest_photos(self, name, here, refuse):
        """Three photos train; of one, or none, the script says what it wants."""
        data = self.data(name, 3)
        load(name).main([*tiny(name), *data, "--size", "64"])
        for file in Path("f").rglob("*.*"):
            if file.stem != "000":
                file.unlink()
        shutil.rmtree("data")
        refuse(name, *tiny(name), *data)

# --- checkpoints ----------------------------------------------------------------------------------

def altered(path, change):
    state = checkpoint(path)
    change(state)
    torch.save(state, path)

CHANGES = {"renamed": lambda s: s["model"].update({"x" + key: s["model"].pop(key) for key in list(s["model"])}),
           "other shapes": lambda s: s["model"].update({key: value[..., None] for key, value in s["model"].items()}),
           "no model": lambda s: s.pop("model"), "no optimizer": lambda s: s.pop("optimizer"),
           "no history": lambda s: s.pop("history"), "no args": lambda s: s.pop("args"),
           "a foreign optimizer": lambda s: s["optimizer"]["param_groups"][0].update(params=[1, 2]),
           "a list": lambda s: s.update(model=[1, 2])}

@pytest.mark.parametrize("change", CHANGES)
@each
def test_resume_from_an_altered_checkpoint(name, change, here, refuse):
    write_folder("f", 12)
    argv = [*tiny(name), "--data", "f" if name in SEGMENTERS else "f/images"]
    load(name).main(argv)
    altered("run/last.pt", CHANGES[change])
    assert "last.pt" in refuse(name, *argv, "--resume")

def test_a_script_under_another_name(here):
    """A copy that somebody took along trains, resumes and ends like the original."""
    write_folder("f", 12)
    shutil.copy(ROOT / "unet.py", "mine.py")
    for more in ((), ("--resume",)):
        done = subprocess.run([sys.executable, "mine.py", *tiny("unet"), "--data", "f", *more],
                              capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, "") and "best     epoch 1" in done.stdout

def test_photos_that_came_later(here, refuse):
    """A resumed pre-training must not go on with other photos: the split would be another."""
    write_folder("f", 12)
    load("pretrain").main([*tiny("pretrain"), "--data", "f/images"])
    drawn(99)[0].save("f/images/new.jpg")
    assert "--photos 13 (was 12)" in refuse("pretrain", *tiny("pretrain"), "--data", "f/images", "--resume")

def test_weights_that_are_nan(here, refuse):
    write_folder("f", 12)
    load("pretrain").main([*tiny("pretrain"), "--data", "f/images"])
    altered("run/best.pt", lambda s: [value.fill_(math.nan) for value in s["model"].values()])
    os.rename("run", "pre")
    line = refuse("finetune", "--init", "pre/best.pt", "--data", "f", "--size", "16", "--epochs", "1", "--out", "run")
    assert "finite" in line and not Path("run/best.pt").exists()

# --- storage --------------------------------------------------------------------------------------

@each
class TestStorage:
    def prepare(self, name, n=12):
        write_folder("f", n)
        return [*tiny(name), "--data", "f" if name in SEGMENTERS else "f/images"]

    @pytest.mark.parametrize("limit", (3_000, 30_000, 300_000))
    def test_no_file_may_be_larger(self, name, limit, here):
        """A quota, as a limit on the size of files: cache, checkpoint or program cannot be written."""
        code, out, err = ends(name, here, *self.prepare(name, 40), limits={resource.RLIMIT_FSIZE: limit})
        assert code == 2 and err.count("\n") == 1 and "space" in err or code == 0, (code, err)
        assert not list(here.rglob(".[0-9]*"))

    def test_a_folder_that_is_gone(self, name, here, refuse, monkeypatch):
        """The run folder is deleted in the middle: the run says so, rather than go on without its best."""
        m, argv = load(name), self.prepare(name)
        saved = m.save_epoch
        def gone(*args):
            shutil.rmtree("run", ignore_errors=True)
            return saved(*args)
        monkeypatch.setattr(m, "save_epoch", gone)
        line = refuse(name, *argv, "--epochs", "3")
        assert "run: another run" in line and "deleted" in line

    def test_a_cache_with_other_bytes(self, name, here):
        """Cut, emptied, longer, of an older format: it is built again, with the same scores."""
        argv = self.prepare(name)
        load(name).main(argv)
        want = [row["val_loss"] for row in rows("run")]
        for change in (lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b + b"more", lambda b: b[:-1]):
            for file in Path("data/cache").iterdir():
                file.write_bytes(change(file.read_bytes()))
            load(name).main(argv)
            assert [row["val_loss"] for row in rows("run")] == want

    def test_two_build_the_same_cache(self, name, here):
        argv = [word if word != "run" else "{}" for word in self.prepare(name, 60)]
        children = [start(name, *(word.format(f"run{i}") for word in argv), cwd=here) for i in range(2)]
        for child in children:
            out, err = child.communicate(timeout=200)
            assert child.returncode == 0, err
        assert rows("run0")[0]["val_loss"] == rows("run1")[0]["val_loss"]

    def test_names_of_all_kinds(self, name, here):
        folder = write_folder("Fotos von Müßig 猫 100%", 12)
        data = folder if name in SEGMENTERS else folder / "images"
        load(name).main([*SMALL[name], "--epochs", "1", "--data", str(data), "--out", "läuft {0} %s/ein Lauf"])
        assert len(rows("läuft {0} %s/ein Lauf")) == 1

# --- environment ----------------------------------------------------------------------------------

ODD = {"no HOME": lambda env: env.pop("HOME", None), "C locale": lambda env: env.update(LC_ALL="C", LANG="C"),
       "ascii": lambda env: env.update(PYTHONIOENCODING="ascii"), "optimised": lambda env: env.update(PYTHONOPTIMIZE="2"),
       "narrow": lambda env: env.update(COLUMNS="40"), "a number of threads": lambda env: env.update(OMP_NUM_THREADS="3")}

@pytest.mark.parametrize("odd", ["all at once", *(pytest.param(odd, marks=pytest.mark.slow) for odd in ODD)])
def test_odd_environments(odd, here):
    """The chain: pretrain, finetune, evaluate, and --help."""
    write_folder("f", 12)
    env = dict(os.environ)
    for name in [odd] if odd in ODD else ODD:
        ODD[name](env)
    env.setdefault("TORCHINDUCTOR_CACHE_DIR", str(here / "t"))
    for name, argv in (("pretrain", ["--size", "16", "--epochs", "1", "--data", "f/images"]),
                       ("finetune", ["--size", "16", "--epochs", "1", "--data", "f"]), ("evaluate", []),
                       ("experiments", ["labels", "--dry-run"]), ("unet", ["--help"])):
        code, out, err = ends(name, here, *argv, environment=env)
        assert code == 0 and (err == "" or "warn" in err.lower()), (name, err)

def test_no_input_and_few_open_files(here):
    write_folder("f", 200)
    code, out, err = ends("unet", here, *tiny("unet"), "--data", "f", limits={resource.RLIMIT_NOFILE: 40},
                          stdin=subprocess.DEVNULL)
    assert (code, err) == (0, "")

@pytest.mark.slow
@each
def test_little_memory(name, here):
    """Where a batch does not fit, the line says which flag to change."""
    write_folder("f", 12)
    code, out, err = ends(name, here, *tiny(name), "--data", "f" if name in SEGMENTERS else "f/images", "--size", "4096",
                          *(["--width", "512"] if name not in ("linknet", "finetune") else []),
                          limits={resource.RLIMIT_AS: 6 * 2**30}, timeout=300)
    assert code == 2 and "memory" in err and "--batch-size" in err, (code, err)

@pytest.mark.parametrize("error", (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")))
@each
def test_a_graphics_card_that_runs_out_of_memory(name, error, here, refuse, monkeypatch):
    write_folder("f", 12)
    def full(*args, **kwargs):
        raise error
    monkeypatch.setattr(torch.Tensor, "backward", full)
    assert "--batch-size" in refuse(name, *tiny(name), "--data", "f" if name in SEGMENTERS else "f/images")

@each
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place where nobody may write")
def test_where_nobody_may_write(name, here, refuse, monkeypatch):
    """The run's folder, and that of the caches; root may not write there either."""
    write_folder("f", 12)
    data = ["--data", "f" if name in SEGMENTERS else "f/images"]
    assert "/proc/x" in refuse(name, *tiny(name), *data, "--out", "/proc/x/run")
    shutil.rmtree("data")
    monkeypatch.setattr(load(name), "CACHE", Path("/proc/x/cache"))
    assert "/proc/x/cache" in refuse(name, *tiny(name), *data)

@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@each
def test_nothing_may_be_written_here(name, here):
    write_folder("f", 12)
    here.chmod(0o500)
    code, out, err = ends(name, here, *tiny(name), "--data", "f" if name in SEGMENTERS else "f/images")
    here.chmod(0o700)
    assert code == 2 and err.count("\n") == 1

@pytest.mark.parametrize("signal_", (signal.SIGINT, signal.SIGTERM))
@each
def test_stopped_while_decoding(name, here, monkeypatch, capsys, signal_):
    """A stop before the first epoch, while photos are being read, is one line as well."""
    write_folder("f", 12)
    m = load(name)
    monkeypatch.setattr(m, "progress", lambda text: os.kill(os.getpid(), signal_))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)      # a background job ignores it
    with pytest.raises(SystemExit) as stop:
        m.main([*tiny(name), "--data", "f" if name in SEGMENTERS else "f/images"])
    signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130 and "no epoch yet" in capsys.readouterr().out
    assert not Path("run").exists() and not list(Path(".").rglob(".[0-9]*"))

def test_stopped_over_an_older_run(here, monkeypatch, capsys):
    """Its last.pt is no epoch of the new run, and --resume with the new flags would be refused."""
    write_folder("f", 12)
    m = load("unet")
    m.main([*tiny("unet"), "--data", "f"])
    monkeypatch.setattr(m, "open_run", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    for more, answer in ((["--lr", "1e-4"], "no epoch yet"), (["--resume"], "--resume continues run")):
        with pytest.raises(SystemExit) as stop:
            m.main([*tiny("unet"), "--data", "f", *more])
        assert stop.value.code == 130 and answer in capsys.readouterr().out
    assert Path("run/last.pt").exists() and not Path("run.prev").exists()

def test_two_files_of_one_stem(here, refuse):
    """Which of them belongs to the mask?"""
    write_folder("f", 12)
    Path("f/images/004.png").write_bytes(Path("f/images/003.jpg").read_bytes())
    assert "'004' wanted once in images/ and once in masks/" in refuse("unet", *tiny("unet"), "--data", "f")
