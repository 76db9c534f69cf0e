"""Text classification sets of the federated adapter papers, each in its official layout."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from polymodal.errors import UserError

from fedcore.data.own import check_share, held_out
from fedcore.data.text_rows import Rows, csv_rows, folder_rows, label_number, line_rows, majority, read_json, tree_rows
from fedcore.data.text_set import TextSet

__all__ = [
    "IMDB",
    "MR",
    "SST5",
    "AGNews",
    "DBPedia",
    "Emotion",
    "HateXplain",
    "Newsgroups20",
    "YahooAnswers",
    "Yelp",
]

_log = logging.getLogger(__name__)


# ------------------------------------------------------------------ one CSV a split (Zhang et al. 2015)


@dataclass
class _ZhangSet(TextSet):
    marks: ClassVar[tuple[str, ...]] = ("train.csv", "test.csv")
    columns: ClassVar[tuple[str, ...]] = ()

    def rows(self, home: Path, split: str) -> Rows:
        """All texts of a row as one."""
        return csv_rows(home / f"{split}.csv", self.name, len(self.class_names()), self.columns, self.remedy)


@dataclass
class AGNews(_ZhangSet):
    """AG's news: 120,000 + 7,600 headlines with a first sentence, four topics.

    ``<root>/[ag_news_csv/]{train,test}.csv``: class 1..4, title, description; a header is skipped.

    Source: Zhang, Zhao and LeCun, Character-level Convolutional Networks for Text Classification, 2015.
    """

    name: ClassVar[str] = "ag_news"
    remedy: ClassVar[str] = "unpack ag_news_csv.tar.gz and give the folder ag_news_csv"
    labels: ClassVar[tuple[str, ...]] = ("World", "Sports", "Business", "Sci/Tech")
    folders: ClassVar[tuple[str, ...]] = ("ag_news_csv",)
    columns: ClassVar[tuple[str, ...]] = ("title", "description")


@dataclass
class DBPedia(_ZhangSet):
    """DBPedia: 560,000 + 70,000 abstracts with their titles, 14 kinds; 50,000 + 10,000 of them by default.

    ``<root>/[dbpedia_csv/]{train,test}.csv``: class 1..14, title, content.

    Source: Zhang et al. 2015; size of the subset from ilora.md section 4.
    """

    train_samples: int = 50_000
    test_samples: int = 10_000

    name: ClassVar[str] = "dbpedia"
    remedy: ClassVar[str] = "unpack dbpedia_csv.tar.gz and give the folder dbpedia_csv"
    labels: ClassVar[tuple[str, ...]] = (
        *("Company", "EducationalInstitution", "Artist", "Athlete", "OfficeHolder", "MeanOfTransportation"),
        *("Building", "NaturalPlace", "Village", "Animal", "Plant", "Album", "Film", "WrittenWork"),
    )
    folders: ClassVar[tuple[str, ...]] = ("dbpedia_csv",)
    columns: ClassVar[tuple[str, ...]] = ("title", "content")


@dataclass
class YahooAnswers(_ZhangSet):
    """Yahoo! Answers: 1,400,000 + 60,000 questions with their best answers, ten topics; 100,000 + 10,000 by default.

    ``<root>/[yahoo_answers_csv/]{train,test}.csv``: class 1..10, question title, question content, best answer.

    Source: Zhang et al. 2015; size of the subset from ilora.md section 4.
    """

    train_samples: int = 100_000
    test_samples: int = 10_000

    name: ClassVar[str] = "yahoo_answers"
    remedy: ClassVar[str] = "unpack yahoo_answers_csv.tar.gz and give the folder yahoo_answers_csv"
    labels: ClassVar[tuple[str, ...]] = (
        *("Society & Culture", "Science & Mathematics", "Health", "Education & Reference", "Computers & Internet"),
        *("Sports", "Business & Finance", "Entertainment & Music", "Family & Relationships", "Politics & Government"),
    )
    folders: ClassVar[tuple[str, ...]] = ("yahoo_answers_csv",)
    columns: ClassVar[tuple[str, ...]] = ("question title", "question content", "best answer")


@dataclass
class Yelp(_ZhangSet):
    """Yelp reviews: 650,000 + 50,000 with stars, or 560,000 + 38,000 good and bad; 100,000 + 10,000 by default.

    ``<root>/[yelp_review_full_csv/ or yelp_review_polarity_csv/]{train,test}.csv``: class from 1, text.

    Args:
        kind: ``full``, one to five stars, or ``polarity``, negative (one or two stars) and positive (three or four).

    Source: Zhang et al. 2015; size of the subset as of Yahoo! Answers.
    """

    train_samples: int = 100_000
    test_samples: int = 10_000
    kind: Literal["full", "polarity"] = "full"

    name: ClassVar[str] = "yelp"
    remedy: ClassVar[str] = (
        "unpack yelp_review_full_csv.tgz (or yelp_review_polarity_csv.tgz with kind=polarity) and give its folder"
    )
    columns: ClassVar[tuple[str, ...]] = ("text",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in ("full", "polarity"):
            raise UserError(f"kind={self.kind!r}; expected full (stars) or polarity")

    def class_names(self) -> list[str]:
        """Stars, or negative and positive."""
        return (
            ["negative", "positive"]
            if self.kind == "polarity"
            else [f"{n} stars" if n > 1 else "1 star" for n in range(1, 6)]
        )

    def home(self) -> Path:
        """The folder of this kind in the root, or the root."""
        root = super().home()
        inside = root / f"yelp_review_{self.kind}_csv"
        return inside if inside.is_dir() and not (root / "train.csv").is_file() else root


# ------------------------------------------------------------------ one file a sample


@dataclass
class IMDB(TextSet):
    """IMDB: 25,000 + 25,000 film reviews, negative and positive.

    ``<root>/[aclImdb/]{train,test}/{neg,pos}/*.txt``; the unlabelled ``unsup`` is not read.

    Source: Maas et al., Learning Word Vectors for Sentiment Analysis, ACL 2011.
    """

    name: ClassVar[str] = "imdb"
    remedy: ClassVar[str] = "unpack aclImdb_v1.tar.gz and give the folder aclImdb"
    labels: ClassVar[tuple[str, ...]] = ("negative", "positive")
    folders: ClassVar[tuple[str, ...]] = ("aclImdb",)
    marks: ClassVar[tuple[str, ...]] = ("train/neg", "train/pos")

    def rows(self, home: Path, split: str) -> Rows:
        """Negative reviews, then positive ones, without their line breaks."""
        for number, folder in enumerate(("neg", "pos")):
            for label, text in folder_rows(home / split / folder, number, self.name, self.remedy):
                yield label, text.replace("<br />", " ")


@dataclass
class Newsgroups20(TextSet):
    """20 Newsgroups: 11,314 + 7,532 messages, divided by date.

    ``<root>/[20news-bydate/]20news-bydate-{train,test}/<group>/<number>``, Latin-1.

    Args:
        headers: keep the lines before the first empty one: they name senders and subjects, which tell the group.

    Source: Lang, NewsWeeder, ICML 1995; the version ``20news-bydate``.
    """

    headers: bool = False

    name: ClassVar[str] = "newsgroups20"
    remedy: ClassVar[str] = "unpack 20news-bydate.tar.gz and give the folder with 20news-bydate-train"
    labels: ClassVar[tuple[str, ...]] = (
        *("alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware"),
        *("comp.sys.mac.hardware", "comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles"),
        *("rec.sport.baseball", "rec.sport.hockey", "sci.crypt", "sci.electronics", "sci.med", "sci.space"),
        *("soc.religion.christian", "talk.politics.guns", "talk.politics.mideast", "talk.politics.misc"),
        "talk.religion.misc",
    )
    folders: ClassVar[tuple[str, ...]] = ("20news-bydate",)
    marks: ClassVar[tuple[str, ...]] = ("20news-bydate-train", "20news-bydate-test")

    def rows(self, home: Path, split: str) -> Rows:
        """Messages group by group."""
        for number, group in enumerate(self.labels):
            folder = home / f"20news-bydate-{split}" / group
            for label, text in folder_rows(folder, number, self.name, self.remedy, "latin-1"):
                yield label, text if self.headers else _body(text)


def _body(message: str) -> str:
    """What follows the first empty line; the whole text where there is none."""
    _, empty, body = message.replace("\r\n", "\n").partition("\n\n")
    return body if empty else message


@dataclass
class MR(TextSet):
    """Film reviews of Pang and Lee: 5,331 negative and 5,331 positive sentences, or 2,000 whole reviews.

    ``<root>/[rt-polaritydata/]rt-polarity.{neg,pos}``, one Latin-1 sentence a line (the set of 2005), or
    ``<root>/[review_polarity/][txt_sentoken/]{neg,pos}/*.txt`` (2004, which ILoRA's scripts take). No split was
    published: a share of each class is held out.

    Args:
        test_share: that share, 0..1.
        split_seed: which samples those are; the seed of a run does not change the data.

    Source: Pang and Lee, Seeing Stars, ACL 2005; A Sentimental Education, ACL 2004.
    """

    test_share: float = 0.1
    split_seed: int = 0

    name: ClassVar[str] = "mr"
    remedy: ClassVar[str] = "unpack rt-polaritydata.tar.gz and give the folder with rt-polarity.pos"
    labels: ClassVar[tuple[str, ...]] = ("negative", "positive")
    folders: ClassVar[tuple[str, ...]] = (
        "rt-polaritydata",
        "txt_sentoken",
        "review_polarity",
        "review_polarity/txt_sentoken",
    )
    marks: ClassVar[tuple[str, ...]] = ("rt-polarity.neg", "rt-polarity.pos", "neg", "pos")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.test_share)

    def rows(self, home: Path, split: str) -> Rows:
        """Samples of the split, negative ones first."""
        import numpy as np

        samples = [row for number, name in enumerate(("neg", "pos")) for row in self._class(home, number, name)]
        labels = np.array([label for label, _ in samples], dtype=np.int64)
        for place in held_out(labels, self.test_share, self.split_seed, split, False):
            yield samples[place]

    def _class(self, home: Path, number: int, name: str) -> Rows:
        if (home / name).is_dir():
            yield from folder_rows(home / name, number, self.name, self.remedy, "latin-1")
            return
        path = home / f"rt-polarity.{name}"
        if not path.is_file():
            raise UserError(f"{self.name}: {path} is missing; {self.remedy}")
        for line in path.read_bytes().decode("latin-1").split("\n"):
            if line.strip():
                yield number, line.strip()


# ------------------------------------------------------------------ one line a sample


@dataclass
class Emotion(TextSet):
    """Emotion: 16,000 + 2,000 English tweets, six emotions.

    ``<root>/{train,test}.txt``, lines ``text;label``; ``val.txt`` is not read: a run cuts its validation samples from
    the training split.

    Source: Saravia et al., CARER, EMNLP 2018.
    """

    name: ClassVar[str] = "emotion"
    remedy: ClassVar[str] = "give the folder with train.txt and test.txt, lines text;label"
    labels: ClassVar[tuple[str, ...]] = ("sadness", "joy", "love", "anger", "fear", "surprise")
    marks: ClassVar[tuple[str, ...]] = ("train.txt", "test.txt")

    def rows(self, home: Path, split: str) -> Rows:
        """Lines of the split's file."""
        return line_rows(home / f"{split}.txt", self.name, self.labels, self.remedy)


@dataclass
class SST5(TextSet):
    """Stanford Sentiment Treebank: 8,544 + 2,210 sentences of film reviews, five grades.

    ``<root>/[trees/]{train,test}.txt``, one tree a line; whole sentences are read, ``dev.txt`` is not: a run cuts its
    validation samples from the training split.

    Source: Socher et al., Recursive Deep Models for Semantic Compositionality, EMNLP 2013.
    """

    name: ClassVar[str] = "sst5"
    remedy: ClassVar[str] = "unpack trainDevTestTrees_PTB.zip and give the folder trees"
    labels: ClassVar[tuple[str, ...]] = ("very negative", "negative", "neutral", "positive", "very positive")
    folders: ClassVar[tuple[str, ...]] = ("trees",)
    marks: ClassVar[tuple[str, ...]] = ("train.txt", "test.txt")

    def rows(self, home: Path, split: str) -> Rows:
        """Sentences of the split's trees."""
        return tree_rows(home / f"{split}.txt", self.name, self.remedy)


@dataclass
class HateXplain(TextSet):
    """HateXplain: 15,383 + 1,924 posts, hate speech, normal or offensive by the majority of three annotators.

    ``<root>/[Data/]{dataset.json, post_id_divisions.json}``. Posts without a majority are left out and counted (the
    official divisions have none). The division ``val`` is not read: a run cuts its validation samples from the
    training split.

    Source: Mathew et al., HateXplain, AAAI 2021; order of the classes from its ``classes.npy``.
    """

    name: ClassVar[str] = "hatexplain"
    remedy: ClassVar[str] = "give the folder Data of the HateXplain repository"
    labels: ClassVar[tuple[str, ...]] = ("hatespeech", "normal", "offensive")
    folders: ClassVar[tuple[str, ...]] = ("Data", "HateXplain/Data")
    marks: ClassVar[tuple[str, ...]] = ("dataset.json", "post_id_divisions.json")

    def rows(self, home: Path, split: str) -> Rows:
        """Posts in the order of the division."""
        path = home / "dataset.json"
        posts, divisions = (
            read_json(home / file, self.name, self.remedy) for file in ("dataset.json", "post_id_divisions.json")
        )
        ties = 0
        for number, post in enumerate(divisions.get(split, []), start=1):
            try:
                votes = [str(annotator["label"]).lower() for annotator in posts[post]["annotators"]]
                text = " ".join(posts[post]["post_tokens"])
            except (KeyError, TypeError) as error:
                raise UserError(
                    f"{self.name}: {path} has no labels and tokens of the post {post!r} ({split}); {self.remedy}"
                ) from error
            label = majority(votes)
            if label:
                yield label_number(label, self.labels, path, number, self.name), text
            else:
                ties += 1
        if ties:
            _log.info("%s: %d posts of %s without a majority left out", self.name, ties, split)
