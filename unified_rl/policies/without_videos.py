"""Loading a model's processor; where torchvision is missing, which its video half needs, the rest of it."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available
from transformers.video_processing_utils import BaseVideoProcessor

VIDEO = "video_processor"
_log = logging.getLogger(__name__)


class WithoutVideos:
    """Put before a processor's class, takes its video half away: texts and pictures are processed as ever."""

    video_settings: dict[str, Any]
    """Of the half that is missing. They are saved with the rest, so that the folder is whole where torchvision is."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [name for name in super().get_attributes() if name != VIDEO]  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), VIDEO: self.video_settings}  # type: ignore[misc]


def without_videos(kind: type, settings: dict[str, Any]) -> Any:
    """A processor's class without its video half.

    Args:
        settings: of the video half.
    """
    # Pipelines write the module of a component's class into their index.
    return type(kind.__name__, (WithoutVideos, kind), {"video_settings": settings, "__module__": kind.__module__})


def load_processor(model: str, revision: str | None) -> Any:
    """The processor of a model in a folder or on the hub; never runs remote code. That of a pipeline's component is the
    pipeline's.

    Raises:
        ImportError: if it needs another library than torchvision that is missing, or torchvision for more than videos.
    """
    pipeline = Path(model).absolute().parent
    if (pipeline / "model_index.json").is_file():
        return AutoProcessor.from_pretrained(pipeline / "processor")
    try:
        return AutoProcessor.from_pretrained(model, revision=revision)
    except ImportError:
        config = AutoConfig.from_pretrained(model, revision=revision)
        kind: Any = PROCESSOR_MAPPING[type(config)]
        if is_torchvision_available() or VIDEO not in kind.get_attributes():
            raise
        return _load(kind, model, revision=revision)


def processors_of(model: str, revision: str | None, index: Mapping[str, Any]) -> dict[str, Any]:
    """Those components of a pipeline that could not be loaded for their video half alone; none where torchvision is.

    Args:
        index: the pipeline's model_index.json.
    """
    if is_torchvision_available():
        return {}
    named = {name: value[1] for name, value in index.items() if isinstance(value, list) and value[0] == "transformers"}
    kinds = {name: getattr(transformers, kind) for name, kind in named.items() if kind.endswith("Processor")}
    return {
        name: _load(kind, model, revision=revision, subfolder=name)
        for name, kind in kinds.items()
        if issubclass(kind, transformers.ProcessorMixin) and VIDEO in kind.get_attributes()
    }


def _load(kind: Any, model: str, **where: Any) -> Any:
    _log.warning(
        "torchvision is missing: %s takes no videos, and PIL resizes its pictures, whose pixels may differ by rounding",
        kind.__name__,
    )
    settings, _ = BaseVideoProcessor.get_video_processor_dict(model, **where)
    return without_videos(kind, settings).from_pretrained(model, **where)
