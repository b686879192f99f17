"""A picture reward on videos: which frames are judged, and their mean."""

import torch
from PIL import Image

from reward_models.video_frames import HpsFrames, spread


class RedShare(HpsFrames):
    """The reward with a cosine that can be computed by hand: the red value of a frame."""

    def __init__(self, num_frames: int) -> None:
        self.num_frames = num_frames

    def cosines(self, prompts, pictures):
        assert len(prompts) == len(pictures)
        return torch.tensor([picture.getpixel((0, 0))[0] for picture in pictures])


def video(*reds: int) -> list:
    return [Image.new("RGB", (2, 2), (red, 0, 0)) for red in reds]


def test_frames_are_at_even_distances():
    assert spread(range(8), 4) == [1, 3, 5, 7]  # type: ignore[arg-type]
    assert spread(range(5), 1) == [2]  # type: ignore[arg-type]
    assert spread(range(2), 4) == [0, 1]  # type: ignore[arg-type]


def test_a_video_scores_the_mean_of_its_frames():
    assert RedShare(2)(["p", "q", "r"], [video(0, 10, 20, 30), video(4), video(8)[0]]) == [20.0, 4.0, 8.0]
