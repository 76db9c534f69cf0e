"""Template questions: the topic of a sentence, looked up in a keyword table, asked in fixed words.

A question is used only if it shares no content word (Chinese: no content character) with its sentence, so copying it
earns nothing; what it gives away is the topic. Sentences without a topic get a general question, and where even that
shares a word, an empty one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from polymodal.errors import UserError
from polymodal.seeding import derive

from slt.data.leak import content_tokens
from slt.data.questions import Question, normalise

__all__ = ["PROMPT", "TOPICS", "Topic", "build_template_questions", "template_question", "topic_of"]


PROMPT = """\
In a conversation, somebody asked a question in {language} and another person answered, in sign language:
{sentence}
Write the question in {language}: one short sentence that this answer fits and that other answers would fit too. Use
none of the answer's nouns, verbs, adjectives, numbers or names, and nothing that tells what the answer is.
Return the question only.
"""
"""For any language model, offline, as a third source (``source="llm"``). The writer sees the sentence, so the leak
validator has the last word: ``slt-data validate`` rejects questions that repeat the sentence."""


@dataclass(frozen=True)
class Topic:
    """One row of the table.

    Attributes:
        name: written into the question file.
        stems: beginnings of words (Chinese: substrings) that point to the topic.
        questions: wordings, used where they share nothing with the sentence.
    """

    name: str
    stems: tuple[str, ...]
    questions: tuple[str, ...]


def _topic(name: str, stems: str, *questions: str) -> Topic:
    return Topic(name, tuple(stems.split()), questions)


GENERAL = "general"
TOPICS: dict[str, tuple[Topic, ...]] = {
    "de": (
        _topic("greeting", "guten hallo liebe schönen tschüss wünsche zuschauer", "was sagt die moderation ?"),
        _topic("thunder", "gewitter blitz donner unwetter", "welche gefahr droht ?", "wovor wird gewarnt ?"),
        _topic(
            "snow", "schnee schnei frost glatt glätte eis", "wie winterlich wird es ?", "was behindert den verkehr ?"
        ),
        _topic("rain", "regen regn schauer niederschl niesel nass", "wie feucht wird es ?", "wo hilft ein schirm ?"),
        _topic("wind", "wind sturm stürm böen böe weht", "wie stark bläst es ?", "was macht die luft ?"),
        _topic("temperature", "grad temperatur warm wärm kalt kält kühl hitze heiß", "was zeigt das thermometer ?"),
        _topic("sky", "sonn wolk heiter klar nebel bewölk", "wie sieht der himmel aus ?", "wie weit sieht man ?"),
        _topic("pressure", "hoch tief luftdruck ausläufer front", "was zeigt die karte ?", "was bestimmt die lage ?"),
        _topic(GENERAL, "", "worum geht es ?", "wie lautet die vorhersage ?"),
    ),
    "zh": (
        _topic("health", "医 药 病 疼 痛 感冒 发烧 护士 体检", "身体怎么样？", "健康方面有什么事？"),
        _topic("school", "学 课 老师 考试 作业 教室 书", "校园里怎么了？", "读书的事怎么样？"),
        _topic("shopping", "买 卖 钱 价 元 商店 超市 便宜 贵", "购物的情况如何？", "花费多少？"),
        _topic("food", "吃 饭 菜 喝 水果 餐 茶 咖啡", "饮食方面怎么样？", "味道如何？"),
        _topic("travel", "车 飞机 火车 路 站 旅游 票 机场", "出行怎么安排？", "交通如何？"),
        _topic("family", "爸 妈 哥 姐 弟 妹 儿子 女儿 爷 奶 家", "亲人怎么了？", "父母和孩子的情况如何？"),
        _topic("work", "工作 公司 上班 经理 同事 会议", "职业方面怎么样？", "忙些什么？"),
        _topic("weather", "天气 雨 雪 风 晴 冷 热", "气候如何？", "外面什么样？"),
        _topic(GENERAL, "", "发生了什么？", "谈什么？"),
    ),
    "en": (
        _topic("cooking", "cook bake oven pan sauce salt pepper oil stir recipe flour", "what is being prepared ?"),
        _topic("sport", "ball swing racket kick coach team score opponent golf tennis", "how is the game played ?"),
        _topic("music", "guitar drum chord string song note rhythm piano", "how is the instrument handled ?"),
        _topic("garden", "plant soil seed water root leaf leaves grow", "what happens outdoors ?"),
        _topic("health", "muscle stretch breath doctor pain skin exercise", "what does the body need ?"),
        _topic("craft", "cut glue paint paper wood tool drill fabric", "what is being made ?"),
        _topic("beauty", "hair makeup brush nail lip", "how is the look achieved ?"),
        _topic(GENERAL, "", "what is explained ?", "what is it about ?"),
    ),
}


def topic_of(sentence: str, language: str) -> Topic:
    """The topic with most stems in the sentence, the first on a tie, the general one if there is none.

    Raises:
        UserError: no table for the language.
    """
    table = _table(language)
    text = normalise(sentence)
    words = text.split()
    hits = [
        sum(stem in text if language[:2] == "zh" else any(w.startswith(stem) for w in words) for stem in topic.stems)
        for topic in table[:-1]
    ]
    best = max(hits)
    return table[hits.index(best)] if best else table[-1]


def template_question(sentence: str, language: str, video_id: str, seed: int = 0) -> tuple[str, str]:
    """Question and topic for one sentence.

    Args:
        sentence: the annotation.
        language: ``de``, ``zh`` or ``en``, with or without a country.
        video_id: decides among the wordings, together with ``seed``.
        seed: root seed of the file.

    Returns:
        ``(question, topic)``; the question is empty if every wording shares a content token with the sentence.
    """
    topic, general = topic_of(sentence, language), _table(language)[-1]
    content = content_tokens(sentence, language)
    for choice in (topic, general):
        free = [q for q in choice.questions if not content & content_tokens(q, language)]
        if free:
            return free[derive(seed, "template", video_id) % len(free)], choice.name
    return "", topic.name


def build_template_questions(sentences: Mapping[str, str], language: str, seed: int = 0) -> list[Question]:
    """Template questions for all clips of a split.

    Args:
        sentences: sentence by clip id.
        language: language code.
        seed: root seed; the same seed gives the same file.
    """
    out = []
    for name, sentence in sentences.items():
        question, topic = template_question(sentence, language, name, seed)
        out.append(Question(name, question, sentence, lang=language[:2].lower(), source="template", topic=topic))
    return out


def _table(language: str) -> tuple[Topic, ...]:
    code = language[:2].lower()
    if code not in TOPICS:
        raise UserError(f"language={language!r} has no template table; there are {', '.join(TOPICS)}")
    return TOPICS[code]
