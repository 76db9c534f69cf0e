"""Panels of translation runs: what the W&B workspace and the HTML report show first, in this order."""

from polymodal.dashboards import Panel, Section

__all__ = ["SECTIONS"]

SECTIONS = (
    Section(
        "Translation",
        (
            Panel("BLEU-4 on dev", ("val/bleu4",)),
            Panel("ROUGE-L on dev", ("val/rouge_l",)),
            Panel("Word accuracy on dev", ("val/word_accuracy",)),
            Panel("BLEU-4 on test", ("test/bleu4",), kind="bar"),
            Panel("ROUGE-L on test", ("test/rouge_l",), kind="bar"),
            Panel("chrF on test", ("test/chrf",), kind="bar"),
        ),
    ),
    Section(
        "What the question alone is worth",
        (
            Panel(
                "BLEU-4 on test without the video or with another question",
                (
                    "test/copy_question/bleu4",
                    "test/question_1nn/bleu4",
                    "test/question_only/bleu4",
                    "test/shuffled_question/bleu4",
                    "test/empty_question/bleu4",
                ),
                kind="bar",
            ),
            Panel("Words of the sentence that stand in the question (share)", ("test/overlap",), kind="bar"),
        ),
    ),
    Section("Samples", (Panel("Translations", ("test/translations",), kind="table"),)),
    Section(
        "Loss terms",
        (
            Panel("Translation", ("train/translation",)),
            Panel("Restoration", ("train/restore_question", "train/restore_sentence")),
            Panel(
                "Contrastive",
                ("train/contrastive_vs", "train/contrastive_vq", "train/contrastive_qs"),
            ),
        ),
    ),
)
