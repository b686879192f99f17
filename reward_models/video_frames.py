"""Picture rewards on videos: the mean over frames at even distances, as DanceGRPO (arXiv:2505.07818) judges videos."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from reward_models.dual_encoder import Hps


def spread(video: Sequence[Image.Image], num_frames: int) -> list[Image.Image]:
    """`num_frames` frames (all, if there are fewer) in the middles of equal stretches of a video."""
    count = min(num_frames, len(video))
    return [video[int((index + 0.5) * len(video) / count)] for index in range(count)]


class HpsFrames(Hps):
    """Human Preference Score of a video's frames, averaged."""

    def __init__(self, *, num_frames: int = 4, **keys: Any) -> None:
        """Args:
        num_frames: frames of each video that are judged.
        keys: those of `Hps`.
        """
        super().__init__(**keys)
        self.num_frames = num_frames

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        videos = [spread(video if isinstance(video, list) else [video], self.num_frames) for video in completions]
        texts = [prompt for prompt, frames in zip(prompts, videos, strict=True) for _ in frames]
        scores = self.cosines(texts, [frame for frames in videos for frame in frames]).tolist()
        means, at = [], 0
        for frames in videos:
            means.append(sum(scores[at : at + len(frames)]) / len(frames))
            at += len(frames)
        return means
