"""What a linear classifier without any encoder makes of the emoji: what small encoders are to be held against.

    python packages/missing_modal/experiments/emoji_reference.py DATA/manifest.jsonl

Logistic regression on the training rows, all complete, tested on the test rows: on raw pixels, on the words of the
names, on their sequences of 2 to 4 letters, on pixels and letters together. Needs scikit-learn (of the workspace).
"""

import argparse
import sys
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "emoji" / "reference.json"


def main() -> int:
    """Fit, print and keep the accuracies."""
    import numpy as np
    from missing_modal.data.images import read_image
    from missing_modal.data.manifest import Manifest
    from polymodal.files import write_json
    from scipy.sparse import csr_matrix, hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("manifest", type=Path, help="as emoji.py wrote it")
    arguments = parser.parse_args()
    reader = Manifest(root=arguments.manifest)
    splits = {name: reader.samples(name) for name in ("train", "test")}
    names = {key: [sample.inputs["text"] for sample in held] for key, held in splits.items()}
    labels = {key: [sample.label for sample in held] for key, held in splits.items()}
    pixels = {
        key: np.stack([np.asarray(read_image(sample.inputs["image"])).ravel() / 255.0 for sample in held])
        for key, held in splits.items()
    }
    words, letters = TfidfVectorizer(), TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4))
    inputs: dict[str, tuple[Any, Any, float]] = {
        "raw pixels": (pixels["train"], pixels["test"], 0.01),
        "words of the name": (words.fit_transform(names["train"]), words.transform(names["test"]), 10.0),
        "2 to 4 letters of the name": (letters.fit_transform(names["train"]), letters.transform(names["test"]), 10.0),
    }
    joined = [
        hstack([csr_matrix(0.1 * pixels[key]), inputs["2 to 4 letters of the name"][place]])
        for place, key in enumerate(("train", "test"))
    ]
    inputs["pixels and letters"] = (joined[0], joined[1], 1.0)
    found = {}
    for name, (train, test, c) in inputs.items():
        model = LogisticRegression(C=c, max_iter=2000).fit(train, labels["train"])
        found[name] = round(100 * float(model.score(test, labels["test"])), 1)
        sys.stdout.write(f"{name:<28} {found[name]:5.1f} %\n")
    write_json(RESULT, {"schema_version": 1, "accuracy": found, "rows": {k: len(v) for k, v in splits.items()}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
