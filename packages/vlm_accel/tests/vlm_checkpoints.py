"""Tiny checkpoints with processors, written to a folder as ``save_pretrained`` does, for the commands' tests.

from vlm_checkpoints import write
write("llava", tmp_path / "llava")      # llava, llava_next, llava_onevision, qwen2_vl, qwen2_5_vl, internvl, smolvlm
"""

from __future__ import annotations

from pathlib import Path

import transformers as tf
import vlm_tiny as tiny
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = [
    "what", "is", "in", "the", "picture", "where", "digit", "left", "right", "both", "two", "one", "yes", "no", "red",
    "blue", "describe", "it", "?", ".", "user", "assistant",
]  # fmt: skip
SPECIAL = {
    0: "<pad>", 1: "<eos>", 88: "<fake_token_around_image>", 89: "<global-img>", tiny.IMAGE: "<image>",
    tiny.VIDEO: "<video>", tiny.START: "<|vision_start|>", tiny.END: "<|vision_end|>",
}  # fmt: skip
TEMPLATE = (
    "{% for turn in messages %}{% for part in turn['content'] %}{% if part['type'] == 'image' %}IMAGE "
    "{% elif part['type'] == 'video' %}VIDEO {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}assistant"
)


def tokenizer(**tokens: str) -> tf.PreTrainedTokenizerFast:
    """A word-level tokenizer of 100 words, with the special tokens of ``vlm_tiny`` at their ids."""
    plain = iter([*WORDS, *(f"w{number}" for number in range(100))])
    vocabulary = {SPECIAL.get(number) or next(plain): number for number in range(100)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = tf.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="w0", padding_side="left",
        extra_special_tokens=tokens,
    )  # fmt: skip
    made.add_special_tokens({"additional_special_tokens": list(SPECIAL.values())[2:]})
    return made


def write(name: str, folder: Path) -> Path:
    """Write the tiny model called ``name`` with its processor; returns the folder."""
    tiny.build(name).save_pretrained(folder)
    _PROCESSORS[name]().save_pretrained(folder)
    return folder


def _template(image: str, video: str = "<video>") -> str:
    return TEMPLATE.replace("IMAGE", image).replace("VIDEO", video)


def _llava() -> tf.LlavaProcessor:
    return tf.LlavaProcessor(
        tf.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer(image_token="<image>"), patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=_template("<image>"),
    )  # fmt: skip


def _llava_next() -> tf.LlavaNextProcessor:
    images = tf.LlavaNextImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56},
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
    )  # fmt: skip
    return tf.LlavaNextProcessor(
        images, tokenizer(image_token="<image>"), patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=_template("<image>"),
    )  # fmt: skip


def _llava_onevision() -> tf.LlavaOnevisionProcessor:
    images = tf.LlavaOnevisionImageProcessor(
        size={"height": 56, "width": 56}, image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]]
    )
    return tf.LlavaOnevisionProcessor(
        images, tokenizer(image_token="<image>", video_token="<video>"),
        tf.LlavaOnevisionVideoProcessor(size={"height": 56, "width": 56}), num_image_tokens=16,
        vision_feature_select_strategy="full", chat_template=_template("<image>"),
    )  # fmt: skip


def _qwen(processor: type, image: type) -> tf.ProcessorMixin:
    words = tokenizer(
        image_token="<image>",
        video_token="<video>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )
    size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    template = _template("<|vision_start|> <image> <|vision_end|>", "<|vision_start|> <video> <|vision_end|>")
    return processor(image(size=size), words, tf.Qwen2VLVideoProcessor(size=size), chat_template=template)


def _internvl() -> tf.InternVLProcessor:
    words = tokenizer(
        start_image_token="<|vision_start|>",
        end_image_token="<|vision_end|>",
        context_image_token="<image>",
        video_token="<video>",
    )
    images = tf.GotOcr2ImageProcessor(size={"height": 112, "width": 112}, crop_to_patches=True, max_patches=4)
    return tf.InternVLProcessor(
        images, words, tf.InternVLVideoProcessor(size={"height": 112, "width": 112}), image_seq_length=16,
        chat_template=_template("<image>"),
    )  # fmt: skip


def _smolvlm() -> tf.SmolVLMProcessor:
    images = tf.SmolVLMImageProcessor(size={"longest_edge": 224}, max_image_size={"longest_edge": 112})
    words = tokenizer(
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
        end_of_utterance_token="<eos>",
    )
    return tf.SmolVLMProcessor(
        images, words, tf.SmolVLMVideoProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 112}),
        image_seq_len=16, chat_template=_template("<image>"),
    )  # fmt: skip


_PROCESSORS = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": lambda: _qwen(tf.Qwen2VLProcessor, tf.Qwen2VLImageProcessor),
    "qwen2_5_vl": lambda: _qwen(tf.Qwen2_5_VLProcessor, tf.Qwen2VLImageProcessor),
    "internvl": _internvl,
    "smolvlm": _smolvlm,
}
