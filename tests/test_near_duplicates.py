"""The count of near-duplicates finds a known one and no other."""

import importlib.util
import json
from pathlib import Path

from conftest import ROOT, drawn
from PIL import Image, ImageOps

spec = importlib.util.spec_from_file_location("near_duplicates", ROOT / "tests/near_duplicates.py")
near = importlib.util.module_from_spec(spec)
spec.loader.exec_module(near)


def test_a_small_mirrored_copy_is_found(pets, capsys):
    (pets / "PetImages/Cat").mkdir(parents=True)
    for i in range(5):
        drawn(5000 + i)[0].save(pets / f"PetImages/Cat/{i}.jpg")
    name = (pets / "oxford-iiit-pet/annotations/test.txt").read_text().split()[0]
    with Image.open(pets / f"oxford-iiit-pet/images/{name}.jpg") as photo:
        ImageOps.mirror(photo).resize((90, 70)).save(pets / "PetImages/Cat/copy.jpg", quality=60)
    (pets / "PetImages/Cat/broken.jpg").write_bytes(b"no photo")
    near.main(["--root", str(pets), "--json", str(pets / "found.json")])
    found = json.loads(Path(pets, "found.json").read_text())
    assert found["test"] == 10 and found["sources"]["Microsoft"]["photos"] == 6
    (pair,) = found["sources"]["Microsoft"]["pairs"]
    assert pair[:2] == [f"{name}.jpg", "PetImages/Cat/copy.jpg"]
    assert "    1 of 10 test photos" in capsys.readouterr().out
