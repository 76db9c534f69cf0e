"""Any encoder-decoder of mmsegmentation as a feature extractor; extra ``polymodal-css[mmseg]``.

mmsegmentation is imported only here, in ``css.data.mmseg_datasets`` and where a network ``mmseg:...`` is built.
"""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.errors import UserError, did_you_mean
from polymodal.weights import load_tensors
from torch import Tensor, nn

from css.models.base import FeatureExtractor, Features
from css.models.probe import probe
from css.models.weights import fill

if TYPE_CHECKING:
    from mmengine.config import Config

__all__ = ["MMSegExtractor", "import_mmseg", "shipped_configs"]

_EXTRA = "needs mmsegmentation, which is not installed: pip install 'polymodal-css[mmseg]'"
_CONFIGS = Path(__file__).parents[1] / "configs" / "mmseg"


def import_mmseg(module: str = "mmseg") -> Any:
    """Import a module of mmsegmentation or mmengine without their notes on standard output.

    Raises:
        UserError: it is not installed, or its parts do not fit together.
    """
    with _quiet():
        _placeholder_ops()
        try:
            return import_module(module)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] in ("mmseg", "mmcv", "mmengine"):
                raise UserError(f"this {_EXTRA}") from error
            raise UserError(
                f"mmsegmentation needs {error.name}, which is not installed: pip install 'polymodal-css[mmseg]'"
            ) from error
        except AssertionError as error:  # mmsegmentation asserts the versions of mmcv and mmengine
            reason = (str(error) or "versions that do not fit").splitlines()[0]
            raise UserError(f"mmsegmentation cannot start: {reason}; pip install 'polymodal-css[mmseg]'") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """What these libraries print while they are imported or build a network says nothing about this run."""
    logger = logging.getLogger("mmengine")
    if "mmengine.logging" in sys.modules:
        logger = sys.modules["mmengine.logging"].MMLogger.get_current_instance()
    level = logger.level
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def _no_operator(name: str) -> Callable[..., object]:
    """Stands for a compiled operator of mmcv; there is none."""
    if name.startswith("__"):  # what Python itself asks a module for, such as its file
        raise AttributeError(name)

    def operator(*_: object, **__: object) -> object:
        raise NotImplementedError(f"{name} is a compiled operator of mmcv; mmcv-lite has none")

    return operator


def _placeholder_ops() -> None:
    """Upstream's mmsegmentation 1.2.2 imports ``mmcv.ops``, which mmcv-lite lacks: give it operators that cannot run.

    Does nothing where mmcv is absent, brings its operators, or belongs to a mmsegmentation that asks for none.
    """
    from importlib.machinery import ModuleSpec
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec
    from types import ModuleType

    try:
        version("mmsegmentation")
    except PackageNotFoundError:
        return
    if "mmcv._ext" in sys.modules or find_spec("mmcv") is None or find_spec("mmcv._ext") is not None:
        return
    placeholder = ModuleType("mmcv._ext")
    placeholder.__getattr__ = _no_operator  # type: ignore[method-assign]
    placeholder.__spec__ = ModuleSpec("mmcv._ext", loader=None)
    sys.modules["mmcv._ext"] = placeholder


def shipped_configs() -> dict[str, Path]:
    """Configurations that css brings: name -> file."""
    return {path.stem: path for path in sorted(_CONFIGS.glob("*.py"))}


class MMSegExtractor(FeatureExtractor):
    """Backbone, neck and decode head of a segmentor; our heads take the place of its classifier.

    The feature is what the decode head hands to its ``conv_seg``, after its dropout. ``stages`` are what the backbone
    hands on (after an activation, where the backbone ends its stages with one). Synchronised norms become plain ones.

    Args:
        config: name of a shipped configuration (``segformer_b0``), file of a configuration, or name or path of one
            that mmsegmentation brings (``segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512``).
        weights: checkpoint of the segmentor, or of its backbone alone; None: random.

    Raises:
        UserError: mmsegmentation is missing, the configuration cannot be built or has no single classifier, or the
            weights do not fit.
    """

    def __init__(self, config: str | Path, *, weights: str | Path | None = None) -> None:
        super().__init__()
        import_mmseg()
        path = find_config(str(config))
        self.model = _build(_model_config(path), path)
        head = self.model.decode_head
        if not isinstance(getattr(head, "conv_seg", None), nn.Conv2d):
            raise UserError(
                f"{path}: {type(head).__name__} has no conv_seg whose input could feed the heads of css; "
                "take a configuration with one decode head that classifies pixels"
            )
        self.out_channels = int(head.conv_seg.in_channels)
        head.conv_seg = _Tap()
        if weights is not None:
            _load(self.model, weights)
        self.stride = probe(self, str(path))

    def forward(self, x: Tensor) -> Features:
        """(B, 3, H, W) -> features (B, D, h, w) and the backbone's stages."""
        stages = self.model.backbone(x)
        maps = self.model.neck(stages) if self.model.with_neck else stages
        self.model.decode_head(maps)
        # A head may return several results, or work on after its classifier: what counts is what it classified.
        return Features(self.model.decode_head.conv_seg.take(), list(stages))

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """The backbone's."""
        parameters: Iterator[nn.Parameter] = self.model.backbone.parameters()
        return parameters

    def neck_parameters(self) -> Iterator[nn.Parameter]:
        """The neck's and the decode head's."""
        if self.model.with_neck:
            yield from self.model.neck.parameters()
        yield from self.model.decode_head.parameters()


class _Tap(nn.Module):
    """In the place of a classifier: keeps its input until it is taken."""

    def __init__(self) -> None:
        super().__init__()
        self._feature: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Keep ``x`` and hand it on."""
        self._feature = x
        return x

    def take(self) -> Tensor:
        """The last input, once."""
        feature, self._feature = self._feature, None
        assert feature is not None, "the decode head did not call its classifier"
        return feature


def find_config(name: str) -> Path:
    """File of a configuration by path, shipped name, or name or path within mmsegmentation's own.

    Raises:
        UserError: there is none, or several have that name.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_configs()
    if name.removesuffix(".py") in shipped:
        return shipped[name.removesuffix(".py")]
    theirs = Path(import_mmseg().__file__).parent / ".mim" / "configs"
    wanted = name.removesuffix(".py") + ".py"
    if (theirs / wanted).is_file():
        return theirs / wanted
    found = sorted(theirs.rglob(wanted)) if "/" not in wanted else []
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"mmseg:{name} is the name of {len(found)} configurations; give {found[0]} or another path")
    known = [*shipped, *(path.stem for path in theirs.rglob("*.py"))]
    hint = did_you_mean(name, known)
    raise UserError(
        f"mmseg:{name} is no file and no configuration of mmsegmentation; {hint}shipped: {', '.join(shipped)}"
    )


def _model_config(path: Path) -> Config:
    """The model of a configuration file, without what would download weights or build auxiliary heads."""
    config_class = import_mmseg("mmengine.config").Config
    try:
        with _quiet():
            config = config_class.fromfile(str(path))
    except (SyntaxError, ValueError, TypeError, KeyError, AttributeError, NameError, ImportError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read the configuration {path}: {reason}") from error
    model = config.get("model")
    if not isinstance(model, dict) or "backbone" not in model or "decode_head" not in model:
        raise UserError(f"{path} has no model with backbone and decode_head; give a configuration of a segmentor")
    if isinstance(model["decode_head"], list | tuple):
        raise UserError(f"{path}: {model.get('type')} has several decode heads in a row; take one with a single one")
    for name in ("auxiliary_head", "data_preprocessor"):
        model.pop(name, None)
    _without_downloads(model)
    return model


def _without_downloads(node: Any) -> None:
    """Remove every ``pretrained`` and pretrained ``init_cfg``: weights come from files that the user names."""
    if isinstance(node, dict):
        if node.get("pretrained"):
            node["pretrained"] = None
        start = node.get("init_cfg")
        if isinstance(start, dict) and start.get("type") == "Pretrained":
            node["init_cfg"] = None
        elif isinstance(start, list | tuple):
            node["init_cfg"] = [one for one in start if one.get("type") != "Pretrained"] or None
        for value in node.values():
            _without_downloads(value)
    elif isinstance(node, list | tuple):
        for value in node:
            _without_downloads(value)


def _build(config: Any, path: Path) -> Any:
    registry = import_mmseg("mmseg.registry").MODELS
    import_mmseg("mmseg.models")
    revert: Callable[[nn.Module], nn.Module] = import_mmseg("mmengine.model.utils").revert_sync_batchnorm
    scope = import_mmseg("mmengine.registry").DefaultScope
    try:
        with _quiet(), scope.overwrite_default_scope("mmseg"):
            model = registry.build(config)
            model.init_weights()
            return revert(model)
    except (KeyError, TypeError, ValueError, AssertionError, ImportError, AttributeError, NotImplementedError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"mmsegmentation cannot build {path}: {reason}") from error


def _load(model: nn.Module, weights: str | Path) -> None:
    """A checkpoint of the whole segmentor (its classifier and auxiliary heads are left out) or of its backbone."""
    tensors = load_tensors(weights, safe=_beside_the_weights())
    name = type(model.backbone).__name__
    if any(key.startswith("backbone.") for key in tensors):
        skip = ("decode_head.conv_seg.", "auxiliary_head.", "data_preprocessor.")
        fill(model, tensors, weights, f"a checkpoint of this segmentor with {name}", skip=skip)
    else:
        assert isinstance(model.backbone, nn.Module)
        fill(model.backbone, tensors, weights, f"weights of {name}", skip=("head.", "fc."))


def _beside_the_weights() -> list[Any]:
    """What mmengine's trainer saves beside the weights: histories of numbers, with a call of ``getattr`` in each.

    Stand-ins under those two names read past them: nothing is called, and nothing of them is kept.
    """
    import numpy as np

    def skip(*_: object) -> None:
        """Instead of getattr."""

    history = type("HistoryBuffer", (), {"__module__": "mmengine.logging.history_buffer"})
    skip.__module__, skip.__name__, skip.__qualname__ = "builtins", "getattr", "getattr"
    old = np.lib.NumpyVersion(np.__version__) < "2.0.0"
    reconstruct = import_module("numpy.core.multiarray" if old else "numpy._core.multiarray")
    scalars = [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32")]
    return [history, skip, reconstruct._reconstruct, reconstruct.scalar, np.ndarray, np.dtype, *scalars]
