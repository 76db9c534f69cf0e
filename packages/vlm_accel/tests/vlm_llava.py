"""Models, batches and two plain methods for the tests of LLaVA's encoders."""

import functools
from dataclasses import dataclass

import torch
import vlm_tiny as tiny
from vlm_accel import Step
from vlm_accel.methods.base import FeatureMethod, Reduced, TokenMethod

FAMILIES = ("llava", "llava_next", "llava_onevision")
STEPS = [Step("vision", 1, keep=12), Step("vision", 2, keep=9)]


@functools.cache
def model_of(name, attn="sdpa"):
    return tiny.build(name, attn)


def batch_of(name, batch=1, images=1, **options):
    return tiny.inputs(name, model_of(name), batch=batch, images=images, **options)


def many(name, batch, images):
    """Several images a sample; OneVision then gives each one tile (``batch_num_images``)."""
    made = batch_of(name, batch, images)
    if name == "llava_onevision" and images > 1:
        run, text = torch.full((17,), tiny.IMAGE), torch.arange(10, 15)
        row = torch.cat([text] + [part for _ in range(images) for part in (run, text)])
        made["input_ids"] = row.repeat(batch, 1)
        made["attention_mask"] = torch.ones_like(made["input_ids"])
        made["pixel_values"] = made["pixel_values"][:, :1]
        made["batch_num_images"] = torch.full((batch,), images)
    return made


def run(model, batch, **options):
    with torch.no_grad():
        return model(**batch, **options)


def generate(model, batch, **options):
    return model.generate(**batch, **({"max_new_tokens": 4, "do_sample": False} | options))


def plain_modules(model):
    """Instance attributes and hooks of every module."""
    return [
        (name, sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks), id(m.__dict__.get("config")))
        for name, m in model.named_modules()
    ]


def first_layer(handle):
    """(B, n) logical positions that the first decoder layer has cached, -1 for padding."""
    return handle._session.cache.layers[0].index


@dataclass(frozen=True)
class First(TokenMethod):
    """Keeps the patches of the smallest number that ``order`` gives them (a permutation of 16), whatever they hold."""

    order: tuple = tuple(range(16))

    def score(self, stage):
        return "none"

    def reduce(self, tokens, keep):
        rank = torch.tensor(self.order)[tokens.index]
        kept = rank.argsort(dim=1)[:, :keep].sort(1).values
        return Reduced(tokens.x.gather(1, kept[..., None].expand(-1, -1, tokens.x.shape[2])), kept)


@dataclass(frozen=True)
class Pick(FeatureMethod):
    """Keeps (number of the image + 2) patches with most CLS attention; writes down what it was given."""

    even: bool = False
    seen: tuple = ()
    keep_all: bool = False

    def blocks(self, depth, used):
        return (0, used)

    def select(self, features):
        for box in self.seen:
            box.append(features)
        answers = []
        for image in range(len(features.x)):
            count = features.x.shape[1] if self.keep_all else 3 if self.even else 2 + image
            attention = features.cls_attention[max(features.cls_attention)][image].mean(0)
            kept = attention.argsort(descending=True, stable=True)[:count].sort().values[None]
            assign = torch.full((1, features.x.shape[1]), -1).scatter(1, kept, torch.arange(count)[None])
            answers.append(Reduced(features.x[image : image + 1, kept[0]], kept, assign=assign))
        return answers
