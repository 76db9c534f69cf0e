"""Small text sets in the exact layouts of the official files, written without the code under test.

Every writer returns the folder that a user would give as root, the names of the classes, and the (label, text) of every
sample by split.
"""

import json

AG = ("World", "Sports", "Business", "Sci/Tech")
DBPEDIA = [
    "Company",
    "EducationalInstitution",
    "Artist",
    "Athlete",
    "OfficeHolder",
    "MeanOfTransportation",
    "Building",
    "NaturalPlace",
    "Village",
    "Animal",
    "Plant",
    "Album",
    "Film",
    "WrittenWork",
]
YAHOO = [
    "Society & Culture",
    "Science & Mathematics",
    "Health",
    "Education & Reference",
    "Computers & Internet",
    "Sports",
    "Business & Finance",
    "Entertainment & Music",
    "Family & Relationships",
    "Politics & Government",
]
GROUPS = [
    "alt.atheism",
    "comp.graphics",
    "comp.os.ms-windows.misc",
    "comp.sys.ibm.pc.hardware",
    "comp.sys.mac.hardware",
    "comp.windows.x",
    "misc.forsale",
    "rec.autos",
    "rec.motorcycles",
    "rec.sport.baseball",
    "rec.sport.hockey",
    "sci.crypt",
    "sci.electronics",
    "sci.med",
    "sci.space",
    "soc.religion.christian",
    "talk.politics.guns",
    "talk.politics.mideast",
    "talk.politics.misc",
    "talk.religion.misc",
]
EMOTIONS = ["sadness", "joy", "love", "anger", "fear", "surprise"]
GRADES = ["very negative", "negative", "neutral", "positive", "very positive"]
STARS = ["1 star", "2 stars", "3 stars", "4 stars", "5 stars"]
HATE = ["hatespeech", "normal", "offensive"]
SPLITS = ("train", "test")


def quoted(*cells):
    """A CSV row as in the files of Zhang et al.: every cell in quotes, quotes doubled."""
    return ",".join('"' + str(cell).replace('"', '""') + '"' for cell in cells) + "\n"


def zhang(folder, classes, parts, each=2):
    """``train.csv`` and ``test.csv``; the class goes round, one row has quotes and an escaped line break."""
    folder.mkdir(parents=True)
    found = {}
    for split in SPLITS:
        rows, found[split] = "", []
        for i in range(classes * each):
            label = i % classes
            cells = [f"{split} part {part} of {i}" for part in range(parts)]
            if i == 0:
                cells[-1] = r'He said "no", \nand left'
            rows += quoted(label + 1, *cells)
            text = " ".join(cells).replace("\\n", " ")
            found[split].append((label, text))
        (folder / f"{split}.csv").write_text(rows, encoding="utf-8")
    return found


def ag_news(folder):
    return folder, AG, zhang(folder / "ag_news_csv", 4, 2)


def dbpedia(folder):
    return folder, DBPEDIA, zhang(folder / "dbpedia_csv", 14, 2)


def yahoo_answers(folder):
    return folder, YAHOO, zhang(folder / "yahoo_answers_csv", 10, 3)


def yelp(folder):
    return folder, STARS, zhang(folder / "yelp_review_full_csv", 5, 1)


def imdb(folder):
    """``aclImdb`` with line breaks in the texts, unlabelled reviews and index files."""
    found = {}
    for split in SPLITS:
        found[split] = []
        for label, name in enumerate(("neg", "pos")):
            inside = folder / "aclImdb" / split / name
            inside.mkdir(parents=True)
            for number in (0, 2, 10):  # in this order, not as sorted text
                rating = 3 if label == 0 else 9
                (inside / f"{number}_{rating}.txt").write_text(f"{split} {name}<br /><br />film {number} é", "utf-8")
                found[split].append((label, f"{split} {name}  film {number} é"))
        (folder / "aclImdb" / split / "urls_pos.txt").write_text("http://example.org\n")
    (folder / "aclImdb" / "train" / "unsup").mkdir()
    (folder / "aclImdb" / "train" / "unsup" / "0_0.txt").write_text("unlabelled")
    (folder / "aclImdb" / "imdb.vocab").write_text("the\n")
    return folder, ["negative", "positive"], found


def newsgroups20(folder):
    """``20news-bydate`` with headers and one byte that is no utf-8."""
    found = {}
    for split in SPLITS:
        found[split] = []
        for label, group in enumerate(GROUPS):
            inside = folder / "20news-bydate" / f"20news-bydate-{split}" / group
            inside.mkdir(parents=True)
            for number in (9, 101) if label == 0 else (55,):
                head = f"From: someone@example.org\nSubject: about {group}\nLines: 2\n\n"
                body = f"{split} words of {group}\n\nnumber {number} caf\xe9\n"
                (inside / str(number)).write_bytes((head + body).encode("latin-1"))
                found[split].append((label, body))
    return folder, GROUPS, found


def emotion(folder):
    """``train.txt``, ``val.txt`` and ``test.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for split in ("train", "val", "test"):
        rows = [(i % 6, f"i feel {split} number {i}; really") for i in range(12)]
        (folder / f"{split}.txt").write_text("".join(f"{text};{EMOTIONS[label]}\n" for label, text in rows))
        found[split] = rows
    return folder, EMOTIONS, {split: found[split] for split in SPLITS}


def sst5(folder):
    """``trees`` with brackets and a slash as the treebank writes them."""
    (folder / "trees").mkdir(parents=True)
    found = {}
    for split in ("train", "dev", "test"):
        lines, found[split] = "", []
        for i in range(10):
            label = i % 5
            lines += f"({label} (2 (2 The) (2 {split})) (3 (2 (2 -LRB-) (3 film\\/book)) (2 (2 -RRB-) (2 {i}))))\n"
            found[split].append((label, f"The {split} ( film/book ) {i}"))
        (folder / "trees" / f"{split}.txt").write_text(lines)
    return folder, GRADES, {split: found[split] for split in SPLITS}


def mr(folder):
    """``rt-polaritydata``: 20 lines a class, Latin-1; there is no official split."""
    (folder / "rt-polaritydata").mkdir(parents=True)
    both = []
    for label, name in enumerate(("neg", "pos")):
        lines = [f"a {name} film , number {i} of caf\xe9s . " for i in range(20)]
        (folder / "rt-polaritydata" / f"rt-polarity.{name}").write_bytes("\n".join(lines).encode("latin-1") + b"\n")
        both += [(label, line.strip()) for line in lines]
    return folder, ["negative", "positive"], {"both": both}


def hatexplain(folder):
    """``Data/dataset.json`` and ``Data/post_id_divisions.json``; one post of the training split has no majority."""
    (folder / "Data").mkdir(parents=True)
    posts, divisions, found = {}, {"train": [], "val": [], "test": []}, {}
    for split in divisions:
        found[split] = []
        for i in range(6):
            label = i % 3
            votes = [HATE[label], HATE[(label + i // 3) % 3], HATE[label]]
            tokens = [split, "words", "of", f"<number>{i}"]
            posts[f"{i}_{split}"] = post(f"{i}_{split}", votes, tokens)
            divisions[split].append(f"{i}_{split}")
            found[split].append((label, " ".join(tokens)))
    posts["tie"] = post("tie", HATE, ["nobody", "agrees"])
    divisions["train"].insert(2, "tie")
    (folder / "Data" / "dataset.json").write_text(json.dumps(posts))
    (folder / "Data" / "post_id_divisions.json").write_text(json.dumps(divisions))
    return folder, HATE, {split: found[split] for split in SPLITS}


def post(name, votes, tokens):
    """One entry of HateXplain's ``dataset.json``."""
    annotators = [{"label": vote, "annotator_id": i, "target": ["None"]} for i, vote in enumerate(votes)]
    return {"post_id": name, "annotators": annotators, "rationales": [], "post_tokens": tokens}


WRITERS = {
    "ag_news": ag_news,
    "dbpedia": dbpedia,
    "yahoo_answers": yahoo_answers,
    "yelp": yelp,
    "imdb": imdb,
    "newsgroups20": newsgroups20,
    "emotion": emotion,
    "sst5": sst5,
    "mr": mr,
    "hatexplain": hatexplain,
}
"""``WRITERS[name](folder) -> (root, names of the classes, {split: [(label, text), ...]})``"""
