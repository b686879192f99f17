"""The embedded world's drawing prompts in French words, word for word: what `shapes_sd3` was never taught to read."""

from unified_rl.worlds import shapes

NAMES = {"circle": "cercle", "square": "carre", "triangle": "triangle"}
WORDS = {
    **NAMES,
    **{f"{name}s": f"{word}s" for name, word in NAMES.items()},
    **{"red": "rouge", "green": "vert", "blue": "bleu", "yellow": "jaune", "purple": "violet"},
    **{"a": "un", "two": "deux", "three": "trois", "four": "quatre", "and": "et", "of": "de", "on": "sur", "at": "a"},
    **{"left": "gauche", "right": "droite", "above": "dessus", "below": "dessous", "the": "le"},
    **{"top": "haut", "bottom": "bas"},
}
"""English -> French; what a caption of the world may hold."""


def french(caption: str) -> str:
    """A caption, word for word."""
    return " ".join(WORDS[word] for word in caption.split())


def _rows(split: shapes.Split) -> list[dict]:
    return [{**row, "prompt": french(row["prompt"])} for row in shapes.drawing_prompts(split)]


def train() -> list[dict]:
    """Prompts to train on: columns `prompt`, `kind`, `spec`."""
    return _rows("train")


def heldout() -> list[dict]:
    """Prompts whose combinations never occur in `train`."""
    return _rows("heldout")
