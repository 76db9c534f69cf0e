"""What the user holds inside the ``with`` block: statistics, report, merge maps."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

from vlm_accel import costs

if TYPE_CHECKING:
    from torch import nn

    from vlm_accel.encoders.base import EncoderAdapter
    from vlm_accel.families import Family
    from vlm_accel.merge_map import MergeMap
    from vlm_accel.session import PrefillRecord, Session, VisionRecord

__all__ = ["Handle", "Watch", "time_calls"]

_WARM_UP = 8  # decode steps left out of the median (LightVLM 4)


class Handle:
    """Statistics, report and merge maps of one acceleration; alive after the block ends, too."""

    def __init__(self, session: Session, family: Family, encoder: EncoderAdapter | None) -> None:
        self._session = session
        self._family = family
        self._encoder = encoder

    @property
    def maps(self) -> list[MergeMap]:
        """One map per segment (image, tile, temporal slice) seen so far, in order; needs ``trace=True``."""
        return self._session.maps

    @property
    def stats(self) -> dict[str, float]:
        """Flat figures of the last encoder call, the last prefill, the cache as it is now, and the median times.

        ``tokens/...`` counts, ``macs/...`` multiply-accumulates (``_plain``: the unmodified model; ``_ratio``: plain /
        ours), ``kv/...`` bytes and entries of the whole batch, ``time/...`` ms, ``ideal/...`` speed-ups that the
        counts allow. Reading them waits for the device.
        """
        session = self._session
        found: dict[str, float] = {}
        if session.vision and self._encoder is not None:
            found |= _vision_stats(session.vision[-1], costs.EncoderShape.of(self._encoder))
        if self._family.decoder and session.prefills:
            found |= self._decoder_stats(session.prefills[-1])
        return found | _time_stats(session.times)

    def report(self) -> str:
        """``stats`` as a table of text: what, now, unmodified, ratio."""
        stats = self.stats
        lines = [f"{'':28}{'now':>16}{'unmodified':>16}{'ratio':>8}"]
        for label, key, unit in _ROWS:
            if key not in stats:
                continue
            plain = stats.get(f"{key}_plain")
            ratio = f"{plain / stats[key]:8.2f}" if plain and stats[key] else ""
            lines.append(f"{label:28}{_short(stats[key], unit):>16}{_short(plain, unit):>16}{ratio:>8}")
        per_layer = [int(stats[key]) for key in sorted(stats) if key.startswith("tokens/llm_")]
        if per_layer:
            lines.append(f"image tokens per layer: {_runs(per_layer)}")
        lines += [f"ideal {key[6:-8]} speed-up {value:.2f}" for key, value in stats.items() if key.startswith("ideal/")]
        return "\n".join(lines + [f"note: {note}" for note in dict.fromkeys(self._session.notes)])

    def _decoder_stats(self, record: PrefillRecord) -> dict[str, float]:
        from vlm_accel.llm.locate import find_decoder

        decoder = find_decoder(self._session.model)
        shape = costs.DecoderShape.of(decoder.config, len(decoder.layers))
        plain_rows = [record.prompt] * shape.layers
        found: dict[str, float] = {
            "tokens/prompt": record.prompt,
            "tokens/text": record.text,
            "tokens/image": record.image,
            "macs/prefill": record.batch * shape.prefill(record.rows),
            "macs/prefill_plain": record.batch * shape.prefill(plain_rows),
        }
        for layer, (rows, left) in enumerate(zip(record.rows, record.survivors, strict=True)):
            found[f"tokens/rows_{layer:02d}"] = rows
            found[f"tokens/llm_{layer:02d}"] = left
        if record.image:
            found["tokens/left_share"] = record.survivors[-1] / record.image
            found["tokens/mean_share"] = sum(record.survivors) / len(record.survivors) / record.image
        found["ideal/prefill_speedup"] = found["macs/prefill_plain"] / found["macs/prefill"]
        found |= self._cache_stats(shape, decoder.module)
        return found

    def _cache_stats(self, shape: costs.DecoderShape, decoder: nn.Module) -> dict[str, float]:
        layers = [
            layer for layer in getattr(self._session.cache, "layers", []) if getattr(layer, "keys", None) is not None
        ]
        layers = [layer for layer in layers if layer.keys.dim() == 4]
        if not layers:
            return {}
        from vlm_accel.llm.evict import kept_entries

        batch = layers[0].keys.shape[0]
        item = layers[0].keys.element_size()
        now = sum(layer.keys.numel() * item + layer.values.numel() * layer.values.element_size() for layer in layers)
        logical = [int(layer.get_seq_length()) for layer in layers]
        plain = batch * shape.kv_bytes(logical, item)
        weights = costs.weight_bytes(decoder)
        return {
            "kv/bytes": now,
            "kv/bytes_plain": plain,
            "kv/entries": sum(kept_entries(layer) for layer in layers),
            "kv/entries_plain": sum(logical),
            "kv/weight_bytes": weights,
            "ideal/decode_speedup": costs.decode_gain(weights, plain, now),
        }


def _vision_stats(record: VisionRecord, shape: costs.EncoderShape) -> dict[str, float]:
    def each(lengths: list[int]) -> list[int]:
        return lengths * record.images if len(lengths) == 1 else lengths

    unshortened = record.full_lengths or [record.lengths[0]] * len(record.lengths)
    macs = sum(shape.block(each(n), mlp) for n, mlp in zip(record.lengths, record.mlp_tokens, strict=True))
    plain = sum(shape.block(each(n), full) for n, full in zip(unshortened, record.full, strict=True))
    found: dict[str, float] = {"tokens/images": record.images, "macs/vision": macs, "macs/vision_plain": plain}
    for block, count in enumerate(record.tokens):
        found[f"tokens/vision_{block:02d}"] = count
    if record.left:
        found["tokens/patches_left"] = sum(record.left)
    found["ideal/vision_speedup"] = plain / macs
    return found


_ROWS = (
    ("encoder MACs", "macs/vision", ""),
    ("prefill MACs", "macs/prefill", ""),
    ("cache bytes", "kv/bytes", "B"),
    ("cache entries, all layers", "kv/entries", ""),
    ("vision, ms", "time/vision_ms", "ms"),
    ("prefill, ms", "time/prefill_ms", "ms"),
    ("per token, ms", "time/token_ms", "ms"),
)


def _short(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "ms":
        return f"{value:.2f}"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.2f} {letter}{unit}"
    return f"{value:.0f} {unit}".strip()


def _runs(counts: list[int]) -> str:
    """``[72, 72, 40]`` as ``72 x2, 40 x1``."""
    parts: list[list[int]] = []
    for count in counts:
        if parts and parts[-1][0] == count:
            parts[-1][1] += 1
        else:
            parts.append([count, 1])
    return ", ".join(f"{count} x{times}" for count, times in parts)


# ---- times


def time_calls(session: Session, family: Family, encoder: EncoderAdapter | None) -> None:
    """Time every call of the encoder, every prefill (vision excluded) and every decode step of ``session.model``.

    On a GPU the marks are events that are read only by ``stats``: nothing waits in the hot path. A prefill ends with
    the model's logits.
    """
    model = session.model
    clock = _Clock(model)
    tower = _tower(model) if family.decoder else (model if encoder is not None else None)
    running: dict[str, Any] = {}

    def start_vision(*_: Any) -> None:
        running["vision"] = clock.mark()

    def end_vision(*_: Any) -> None:
        span = (running.pop("vision"), clock.mark())
        session.times["vision"].append(span)
        running.setdefault("inside", []).append(span)

    def start_model(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running["inside"] = []
        given = kwargs.get("input_ids", args[0] if args else None)
        given = given if given is not None else kwargs.get("inputs_embeds")
        running["kind"] = "decode" if given is not None and given.shape[1] == 1 else "prefill"
        running["model"] = clock.mark()

    def end_model(*_: Any) -> None:
        if "model" in running:
            session.times[running["kind"]].append((running.pop("model"), clock.mark(), *running.pop("inside", [])))

    if tower is not None:
        session.hook(tower.register_forward_pre_hook(start_vision))
        session.hook(tower.register_forward_hook(end_vision))
    if family.decoder:
        session.hook(model.register_forward_pre_hook(start_model, with_kwargs=True))
        session.hook(model.register_forward_hook(end_model))


class _Clock:
    """Marks on the device's own time line: events on CUDA, ``perf_counter`` elsewhere."""

    def __init__(self, model: nn.Module) -> None:
        parameter = next(model.parameters(), None)
        self.cuda = parameter is not None and parameter.device.type == "cuda"

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _milliseconds(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return (end - start) * 1000
    end.synchronize()
    return float(start.elapsed_time(end))


def _time_stats(times: dict[str, list[Any]]) -> dict[str, float]:
    found = {}
    if times["vision"]:
        found["time/vision_ms"] = statistics.median(_milliseconds(*span) for span in times["vision"])
    if times["prefill"]:
        spans = [
            _milliseconds(a, b) - sum(_milliseconds(*part) for part in inside) for a, b, *inside in times["prefill"]
        ]
        found["time/prefill_ms"] = statistics.median(spans)
    if times["decode"]:
        steps = [_milliseconds(span[0], span[1]) for span in times["decode"]]
        found["time/token_ms"] = statistics.median(steps[_WARM_UP:] or steps)
    return found


def _tower(model: nn.Module) -> nn.Module | None:
    """The image encoder of a vision-language model."""
    inner = getattr(model, "model", model)
    for name in ("vision_tower", "visual", "vision_model"):
        if getattr(inner, name, None) is not None:
            module: nn.Module = getattr(inner, name)
            return module
    return None


class Watch:
    """Times an unmodified model as a ``Handle`` does: ``with Watch(model) as handle: ...; handle.stats``."""

    def __init__(self, model: nn.Module) -> None:
        from vlm_accel.families import family_of
        from vlm_accel.session import Plan, Session

        self._session = Session(model, Plan())
        self._family = family_of(model)

    def __enter__(self) -> Watch:
        time_calls(self._session, self._family, None)
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    @property
    def stats(self) -> dict[str, float]:
        """The ``time/...`` figures."""
        return _time_stats(self._session.times)
