"""How many test photos of the pets stand, all but unchanged, among the photos to pre-train on?

python tests/near_duplicates.py --root data

Every photo becomes 24 x 24 grey pixels of mean 0 and length 1; two photos are near-duplicates when
the product of these, their correlation, is above --above, upright or mirrored. Scaling, compression
and changes of brightness hardly move it; a crop by more than a few pixels is not found.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps


def thumbnails(files, side=24):
    """-> (N, side * side) float, rows of length 1, and the files that could be read."""

    def read(file):
        try:
            with Image.open(file) as image:
                image.draft("L", (2 * side, 2 * side))
                return np.asarray(
                    ImageOps.exif_transpose(image).convert("L").resize((side, side), Image.BOX),
                    np.float32,
                )
        except Exception:  # a broken file is nobody's duplicate
            return None

    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(read, files))
    kept = [i for i, row in enumerate(rows) if row is not None and row.std() > 0]
    x = torch.from_numpy(np.stack([rows[i] for i in kept])).flatten(1)
    return torch.nn.functional.normalize(x - x.mean(1, keepdim=True)), [files[i] for i in kept]


def pairs_above(a, b, limit):
    """Numbers (i, j) and correlations of the rows of a and b, b upright or mirrored, that are alike."""
    side = int(a.shape[1] ** 0.5)
    mirrored = b.view(-1, side, side).flip(2).flatten(1)
    found = []
    for start in range(0, len(a), 512):
        alike = torch.maximum(a[start : start + 512] @ b.T, a[start : start + 512] @ mirrored.T)
        found += [(start + i, j, alike[i, j].item()) for i, j in (alike > limit).nonzero().tolist()]
    return found


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--root", default="data")
    p.add_argument("--above", type=float, default=0.95)
    p.add_argument("--json", help="write counts and pairs to this file")
    args = p.parse_args(argv)
    base, root = Path(args.root, "oxford-iiit-pet"), Path(args.root)
    names = {
        part: [
            line.split()[0]
            for line in (base / f"annotations/{part}.txt").read_text().splitlines()
            if line and line[0] != "#"
        ]
        for part in ("test", "trainval")
    }
    test, test_files = thumbnails([base / f"images/{name}.jpg" for name in names["test"]])
    result = {
        "test": len(test),
        "above": args.above,
        "torch": str(torch.__version__),
        "sources": {},
    }
    sources = {
        "Oxford-IIIT Pet, trainval": [base / f"images/{name}.jpg" for name in names["trainval"]],
        "Microsoft": sorted(root.glob("PetImages/*/*.jpg")),
        "Stanford Dogs": sorted(root.glob("Images/*/*.jpg")),
        "Google filtered": sorted(root.glob("cats_and_dogs_filtered/*/*s/*.jpg")),
    }
    for name, files in sources.items():
        if files:
            rows, kept = thumbnails(files)
            pairs = pairs_above(test, rows, args.above)
            result["sources"][name] = {
                "photos": len(rows),
                "test_photos": len({i for i, _, _ in pairs}),
                "pairs": [
                    [test_files[i].name, str(kept[j].relative_to(root)), round(value, 4)]
                    for i, j, value in sorted(pairs, key=lambda pair: -pair[2])[:200]
                ],
            }
            print(
                f"{name:26}{len(rows):8,} photos: {len({i for i, _, _ in pairs}):5} of {len(test):,} test photos "
                f"have a near-duplicate there ({len(pairs)} pairs)",
                flush=True,
            )
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
