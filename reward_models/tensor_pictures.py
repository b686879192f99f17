"""Pictures with gradients, prepared as a picture processor of transformers prepares PIL pictures.

Scaling is torch's with antialiasing: the processors' own, but for Pillow's rounding to 256 levels in between.
"""

from typing import Any


def prepared(processor: Any, pictures: Any) -> Any:
    """Pixel values [B, 3, h, w] of pictures [B, 3, H, W] in [0, 1], differentiable.

    Args:
        processor: a picture processor that scales, crops its centre and standardises colours, each as far as it does.

    Raises:
        ValueError: for a size that it states in another way than these.
    """
    import torch

    if processor.do_resize:
        size = _scaled(processor.size, *pictures.shape[-2:])
        mode = {2: "bilinear", 3: "bicubic"}[int(processor.resample)]
        pictures = torch.nn.functional.interpolate(pictures, size=size, mode=mode, antialias=True).clamp(0.0, 1.0)
    if processor.do_center_crop:
        height, width = processor.crop_size["height"], processor.crop_size["width"]
        top, left = (pictures.shape[-2] - height) // 2, (pictures.shape[-1] - width) // 2
        if top < 0 or left < 0:
            raise ValueError(f"{type(processor).__name__} would pad pictures of {tuple(pictures.shape[-2:])} pixels")
        pictures = pictures[..., top : top + height, left : left + width]
    if processor.do_normalize:
        mean, std = (
            torch.tensor(values, device=pictures.device).view(3, 1, 1)
            for values in (processor.image_mean, processor.image_std)
        )
        pictures = (pictures - mean) / std
    return pictures


def _scaled(size: Any, height: int, width: int) -> tuple[int, int]:
    stated = {key: value for key, value in dict(size).items() if value is not None}
    if stated.keys() == {"height", "width"}:
        return stated["height"], stated["width"]
    if stated.keys() == {"shortest_edge"}:
        short, edge = min(height, width), stated["shortest_edge"]
        return int(edge * height / short), int(edge * width / short)
    raise ValueError(
        f"pictures of size {stated} cannot be prepared with gradients; known: height and width, shortest_edge"
    )
