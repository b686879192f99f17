"""Rollouts as files that a later run trains on: what `data.rollouts` reads, written while a run goes on.

    RUN/rollouts/ rollout_000000_00.jsonl (one a rollout and process)  pictures/*.png (by their content)

A line has the prompt with its columns, the sample, its reward as it was trained on (null: it was left out), and of a
text the drawn tokens with their log-probs by the weights that drew them.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from unified_rl.data.recorded import TAKEN
from unified_rl.errors import RecipeError
from unified_rl.protocols import Policy, TellsTokens
from unified_rl.rollout import Rollout
from unified_rl.run_folder.tracking import to_json, write_whole
from unified_rl.types import Prompt, Recorded

FOLDER = "rollouts"
"""In a run's folder."""


class Recorder:
    """Writes the rollouts of one process."""

    def __init__(self, run: Path, policy: Policy, rank: int) -> None:
        """
        Args:
            policy: as it is without a critic.
        """
        self._folder, self._policy, self._rank = run / FOLDER, policy, rank

    def forget(self, index: int) -> None:
        """Remove rollouts from number `index` on, which a resumed run repeats; for the first process."""
        for file in self._folder.glob("rollout_*.jsonl"):
            found = re.fullmatch(r"rollout_(\d+)_\d+", file.stem)
            if found and int(found[1]) >= index:
                file.unlink()

    def write(self, index: int, rollout: Rollout) -> None:
        """Write all samples of rollout number `index` of this process.

        Raises:
            RecipeError: if a sample or a column of its prompt cannot be read back.
        """
        (self._folder / "pictures").mkdir(parents=True, exist_ok=True)
        if isinstance(self._policy, TellsTokens):
            told = self._policy.told(rollout.trajectory)
        else:
            told = [
                Recorded(completion=completion, token_ids=None, log_probs=None)
                for completion in rollout.trajectory.completions
            ]
        rows = []
        for number, (prompt, recorded) in enumerate(zip(rollout.prompts, told, strict=True)):
            breakdown = {name: float(values[number]) for name, values in rollout.scores.breakdown.items()}
            reward = float(rollout.scores.total[number])
            rows.append({**self._asked(prompt), **self._answered(recorded), "reward": reward, "rewards": breakdown})
        name = f"rollout_{index:06d}_{self._rank:02d}.jsonl"
        write_whole(self._folder / name, "".join(f"{to_json(row)}\n" for row in rows))

    def _asked(self, prompt: Prompt) -> dict[str, Any]:
        columns = {name: self._column(name, value) for name, value in prompt.columns.items()}
        pictures = {"condition_images": [self._picture(image) for image in prompt.images]} if prompt.images else {}
        return {"prompt": prompt.text, **columns, **pictures}

    def _column(self, name: str, value: Any) -> Any:
        if name in TAKEN:
            raise RecipeError(f"record_rollouts: a column of the prompts is called {name}, as samples' own; rename it")
        if isinstance(value, Image.Image):
            return self._picture(value)
        if isinstance(value, list) and value and all(isinstance(item, Image.Image) for item in value):
            return [self._picture(item) for item in value]
        try:
            same = json.loads(json.dumps(value)) == value
        except (TypeError, ValueError):
            same = False
        if not same:
            raise RecipeError(f"record_rollouts: column {name} of the prompts is {value!r:.60}, which is no JSON")
        return value

    def _answered(self, recorded: Recorded) -> Mapping[str, Any]:
        images = recorded.completion.images
        if len(images) > 1:
            raise RecipeError(f"record_rollouts: a sample has {len(images)} pictures; data.rollouts reads one")
        if images and not isinstance(images[0], Image.Image):
            raise RecipeError("record_rollouts: keeps pictures and texts, and the samples are neither (sound?)")
        if images:
            return {"image": self._picture(images[0])}
        known = {} if recorded.token_ids is None else {"token_ids": recorded.token_ids, "log_probs": recorded.log_probs}
        return {"text": recorded.completion.text, **known}

    def _picture(self, image: Image.Image) -> str:
        """Write a picture once, under the name of its content; returns its path in the folder of the rollouts."""
        content = hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()
        name = f"pictures/{content[:24]}.png"
        file = self._folder / name
        if not file.exists():
            partial = file.with_suffix(f".{self._rank}.partial")
            image.save(partial, format="PNG")
            partial.replace(file)
        return name
