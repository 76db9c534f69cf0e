"""Small data sets in the exact layouts of the official files, written without the code under test.

Every function returns the folder (or file) that a user would give as root.
"""

import gzip
import io
import struct
import tarfile

import numpy as np
from PIL import Image

WNIDS = ("n02124075", "n04067472", "n04540053")
DOMAIN_FILES = {
    "tweets": "tweets_GroundTruth.txt",
    "films": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
}


# ------------------------------------------------------------------ idx


def idx(array):
    """Bytes of an idx file of unsigned bytes."""
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(np.uint8).tobytes()


def fashion(folder, train=30, test=10, seed=0):
    """The four gzip files; returns the folder, and arrays by split."""
    rng, arrays = np.random.default_rng(seed), {}
    folder.mkdir(parents=True, exist_ok=True)
    for split, prefix, count in (("train", "train", train), ("test", "t10k", test)):
        images, labels = rng.integers(0, 256, (count, 28, 28)), np.arange(count) % 10
        arrays[split] = (images, labels)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            (folder / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(idx(array), mtime=0))
    return folder, arrays


# ------------------------------------------------------------------ CIFAR


def python2(value):
    """Opcodes (protocol 2) that Python 2's cPickle writes for plain values and NumPy byte arrays, without memo."""
    if isinstance(value, str):
        raw = value.encode("latin1")
        return (b"U" + bytes([len(raw)]) if len(raw) < 256 else b"T" + struct.pack("<I", len(raw))) + raw
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        if 0 <= value < 256:
            return b"K" + bytes([value])
        return b"M" + struct.pack("<H", value) if 0 <= value < 65536 else b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(python2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(k) + python2(v) for k, v in value.items()) + b"u"
    dtype = b"cnumpy\ndtype\n" + python2("u1") + b"K\x00K\x01\x87R(K\x03" + python2("|") + b"NNNJ\xff\xff\xff\xffJ\xff"
    dtype += b"\xff\xff\xffK\x00tb"
    shape = b"(" + b"".join(map(python2, value.shape)) + b"t"
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + python2("b") + b"\x87R"
    raw = value.tobytes().decode("latin1")
    return made + b"(K\x01" + shape + dtype + b"\x89" + python2(raw) + b"tb"


def pickled(value):
    """A whole pickle as Python 2 writes it."""
    return b"\x80\x02" + python2(value) + b"."


def cifar10(folder, each=12, seed=0):
    """``cifar-10-batches-py`` in ``folder``; returns the folder, and (pictures (N, 3, 32, 32), labels) by split."""
    inside, rng, arrays = folder / "cifar-10-batches-py", np.random.default_rng(seed), {}
    inside.mkdir(parents=True)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    meta = {"num_cases_per_batch": 10000, "label_names": names, "num_vis": 3072}
    (inside / "batches.meta").write_bytes(pickled(meta))
    for number in range(6):
        data, labels = rng.integers(0, 256, (each, 3072)).astype(np.uint8), ((np.arange(each) + number) % 10).tolist()
        batch = {
            "data": data,
            "labels": labels,
            "batch_label": f"training batch {number + 1} of 5" if number < 5 else "testing batch 1 of 1",
            "filenames": [f"picture_{number}_{i}.png" for i in range(each)],
        }
        (inside / (f"data_batch_{number + 1}" if number < 5 else "test_batch")).write_bytes(pickled(batch))
        known = arrays.setdefault("train" if number < 5 else "test", ([], []))
        known[0].append(data.reshape(-1, 3, 32, 32))
        known[1].extend(labels)
    return folder, {split: (np.concatenate(x), np.array(y)) for split, (x, y) in arrays.items()}


def cifar100(folder, train=200, test=100, seed=0):
    """``cifar-100-python`` in ``folder``; as ``cifar10``."""
    inside, rng, arrays = folder / "cifar-100-python", np.random.default_rng(seed), {}
    inside.mkdir(parents=True)
    meta = {"fine_label_names": [f"fine_{i}" for i in range(100)], "coarse_label_names": [f"c_{i}" for i in range(20)]}
    (inside / "meta").write_bytes(pickled(meta))
    for split, count in (("train", train), ("test", test)):
        data, fine = rng.integers(0, 256, (count, 3072)).astype(np.uint8), (np.arange(count) % 100).tolist()
        batch = {
            "data": data,
            "fine_labels": fine,
            "coarse_labels": [label // 5 for label in fine],
            "batch_label": f"{split}ing batch 1 of 1",
            "filenames": [f"{i}.png" for i in range(count)],
        }
        (inside / split).write_bytes(pickled(batch))
        arrays[split] = (data.reshape(-1, 3, 32, 32), np.array(fine))
    return folder, arrays


# ------------------------------------------------------------------ Tiny-ImageNet


def tiny_imagenet(folder, each=3, val=4, side=64):
    """``tiny-imagenet-200`` in ``folder``; class c is one flat brightness, so that JPEG does not blur it."""
    inside = folder / "tiny-imagenet-200"
    inside.mkdir(parents=True)
    (inside / "wnids.txt").write_text("".join(f"{w}\n" for w in WNIDS))
    (inside / "words.txt").write_text(
        "n02124075\tEgyptian cat\nn04067472\treel\nn04540053\tvolleyball, volley ball\nn0\tentity\n"
    )
    for number, wnid in enumerate(WNIDS):
        images = inside / "train" / wnid / "images"
        images.mkdir(parents=True)
        for i in range(each):
            # one grey picture in each class, as there are in the real set
            mode = "L" if i == 0 else "RGB"
            Image.new(mode, (side, side), brightness(number, mode)).save(images / f"{wnid}_{i}.JPEG", quality=95)
        boxes = "".join(f"{wnid}_{i}.JPEG\t0\t0\t63\t63\n" for i in range(each))
        (inside / "train" / wnid / f"{wnid}_boxes.txt").write_text(boxes)
    images, lines = inside / "val" / "images", []
    images.mkdir(parents=True)
    for i in range(val):
        number = (i * 2 + 1) % len(WNIDS)
        Image.new("RGB", (side, side), brightness(number, "RGB")).save(images / f"val_{i}.JPEG", quality=95)
        lines.append(f"val_{i}.JPEG\t{WNIDS[number]}\t0\t0\t62\t57\n")
    (inside / "val" / "val_annotations.txt").write_text("".join(lines))
    (inside / "test" / "images").mkdir(parents=True)
    Image.new("RGB", (side, side)).save(inside / "test" / "images" / "test_0.JPEG")
    return folder


def brightness(number, mode):
    """Colour of class ``number``."""
    level = 40 + 80 * number
    return level if mode == "L" else (level, level, level)


# ------------------------------------------------------------------ DomainNet, STL-10, SVHN

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
THINGS = ("aircraft_carrier", "airplane", "alarm_clock")


def domainnet(folder, train=2, test=1):
    """Lists and pictures of six domains; a wide and a high picture of each class, of one flat brightness.

    The brightness is ``10 + 40 * domain + 10 * class``, whatever the crop.
    """
    for place, domain in enumerate(DOMAINS):
        for split, count in (("train", train), ("test", test)):
            lines = []
            for label, thing in enumerate(THINGS):
                inside = folder / domain / thing
                inside.mkdir(parents=True, exist_ok=True)
                for i in range(count):
                    name = f"{domain}_{label + 1:03}_{split}{i:06}.jpg"
                    level = 10 + 40 * place + 10 * label
                    size = (40, 24) if i % 2 == 0 else (24, 30)
                    Image.new("RGB", size, (level, level, level)).save(inside / name, quality=95)
                    lines.append(f"{domain}/{thing}/{name} {label}\n")
            (folder / f"{domain}_{split}.txt").write_text("".join(lines))
    return folder


def stl10(folder, train=20, test=10, seed=0):
    """``stl10_binary`` in ``folder``; returns the folder, and (pictures (N, 3, 96, 96), labels from 0) by split."""
    inside, rng, arrays = folder / "stl10_binary", np.random.default_rng(seed), {}
    inside.mkdir(parents=True)
    for split, count in (("train", train), ("test", test)):
        images, labels = rng.integers(0, 256, (count, 3, 96, 96)).astype(np.uint8), np.arange(count) % 10
        (inside / f"{split}_X.bin").write_bytes(images.swapaxes(2, 3).tobytes())  # column by column
        (inside / f"{split}_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())
        arrays[split] = (images, labels)
    return folder, arrays


def svhn(folder, train=20, test=10, seed=0):
    """The two MATLAB files; returns the folder, and (pictures (N, 3, 32, 32), digits) by split."""
    from scipy.io import savemat

    rng, arrays = np.random.default_rng(seed), {}
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("test", test)):
        images, digits = rng.integers(0, 256, (count, 3, 32, 32)).astype(np.uint8), np.arange(count) % 10
        labels = np.where(digits == 0, 10, digits).astype(np.uint8)[:, None]
        content = {"X": images.transpose(2, 3, 1, 0), "y": labels}
        savemat(folder / f"{split}_32x32.mat", content, do_compression=True)
        arrays[split] = (images, digits)
    return folder, arrays


# ------------------------------------------------------------------ GLUE

GLUE_TSV = {
    "sst2": (
        "SST-2",
        "sentence\tlabel",
        ["hide new secretions from the parental units \t0", 'a "fine film \t1', "no wit \t0", "lovely \t1"],
    ),
    "cola": (
        "CoLA",
        None,
        ["gj04\t1\t\tOur friends won't buy this.", "gj04\t0\t*\tThey drank the pub.", "bc01\t1\t\tBill sang."],
    ),
    "mrpc": (
        "MRPC",
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        ["1\t702876\t702977\tAmrozi accused his brother .\tReferring to him .", '0\t1\t2\tYucaipa "owned\tIt sold'],
    ),
    "qqp": (
        "QQP",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        ["1\t2\t3\tHow is life?\tWhat is life?\t0", "4\t5\t6\tWhy?\tWhat for?\t1", "7\t8\tcut short"],
    ),
    "qnli": (
        "QNLI",
        "index\tquestion\tsentence\tlabel",
        ["0\tWhen did it start?\tIn 1909.\tentailment", "1\tWho?\tIt is blue.\tnot_entailment"],
    ),
    "rte": (
        "RTE",
        "index\tsentence1\tsentence2\tlabel",
        ["0\tNo weapons were found.\tWeapons found.\tnot_entailment", "1\tA man died.\tSomeone died.\tentailment"],
    ),
    "wnli": (
        "WNLI",
        "index\tsentence1\tsentence2\tlabel",
        ["0\tI stuck a pin in a carrot. It had a hole.\tThe carrot had a hole.\t1", "1\tHe ran.\tIt ran.\t0"],
    ),
    "mnli": (
        "MNLI",
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse"
        "\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        [
            "0\t1\t1n\tfiction\t( a )\t( b )\t(S a)\t(S b)\tA text.\tNot that.\tneutral\tneutral",
            "1\t2\t2e\tslate\t( a )\t( b )\t(S a)\t(S b)\tAnother.\tThe same.\tentailment\tentailment",
            "2\t3\t3c\tslate\t( a )\t( b )\t(S a)\t(S b)\tDay.\tNight.\tcontradiction\tcontradiction",
            "3\t4\t4x\tslate\t( a )\t( b )\t(S a)\t(S b)\tUnclear.\tWho knows.\tneutral\t-",
        ],
    ),
    "stsb": (
        "STS-B",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        [
            "0\tmain-captions\tMSRvid\t2012test\t1\tnone\tnone\tA plane.\tAn air plane.\t5.000",
            "1\tmain-captions\tMSRvid\t2012test\t4\tnone\tnone\tA man.\tA dog.\t0.500",
            "2\tmain-captions\tMSRvid\t2012test\t5\tnone\tnone\tA flute.\tA pipe.\t2.600",
        ],
    ),
}
"""Folder, header and lines of each task's TSV files."""


def glue(folder, tasks=tuple(GLUE_TSV)):
    """Official folders with ``train.tsv`` and ``dev.tsv`` (MNLI: matched and mismatched)."""
    for task in tasks:
        name, header, lines = GLUE_TSV[task]
        (folder / name).mkdir(parents=True)
        text = "".join(f"{line}\n" for line in ([header] if header else []) + lines)
        for file in ("train", *(("dev_matched", "dev_mismatched") if task == "mnli" else ("dev",))):
            (folder / name / f"{file}.tsv").write_text(text, encoding="utf-8")
    return folder


# ------------------------------------------------------------------ VADER's texts


def text_domains(folder, documents=10, archive=False):
    """The four files (CRLF, tabs); three sentences a document except tweets; some scores are exactly 0."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {}
    for place, (domain, file) in enumerate(DOMAIN_FILES.items()):
        lines = []
        for document in range(1, documents + 1):
            for sentence in (0,) if domain == "tweets" else (1, 2, 3):
                score = ((document * 3 + sentence * 5 + place) % 9 - 4) / 2
                name = f"{document}_{sentence}" if sentence else str(document)
                word = "good" if score > 0 else "bad"
                lines.append(f"{name}\t{score}\tA {word} text, number {document}.{sentence} of {domain}!\r\n")
        contents[file] = "".join(lines).encode()
    if not archive:
        for file, content in contents.items():
            (folder / file).write_bytes(content)
        return folder
    path = folder / "hutto_ICWSM_2014.tar.gz"
    with tarfile.open(path, "w:gz") as tape:
        for file, content in contents.items():
            member = tarfile.TarInfo(f"hutto_ICWSM_2014/{file}")
            member.size = len(content)
            tape.addfile(member, io.BytesIO(content))
    return path
