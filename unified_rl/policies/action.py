"""A language model that acts: each turn it sees an environment's observation and writes an action, until the episode
ends.

A turn is one prompt and one completion of the language model, so that everything it can do (pictures, logits
processors, shared prompts, LoRA, critics) holds here too. A trajectory's steps are the tokens of all its actions, one
turn after the other; `turn_ids` says which is whose.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from unified_rl.data.environments import Environment
from unified_rl.policies.causal_lm import SEGMENT, CausalLMPolicy
from unified_rl.policies.episode import Episode, begin, check_failures, close
from unified_rl.protocols import Probe
from unified_rl.recipe.environment import EnvironmentBlock
from unified_rl.types import Prompt, Segment, StepStates, StepStats, Trajectory

SEEDS = 1 << 63


class ActionPolicy:
    """A language model in environments. See `unified_rl.protocols.Policy`.

    A completion's text is the episode's actions, a line each; its pictures are the last one of every observation; what
    the environment said is in `Completion.measured`: `episode_return` (the sum of its rewards), `success`,
    `num_turns`, the list of `actions`, and whether the environment `failed`.
    """

    steps_per_forward: Mapping[str, int | None] = {SEGMENT: None}

    def __init__(self, actor: CausalLMPolicy, make: Callable[[], Environment], block: EnvironmentBlock) -> None:
        """
        Args:
            actor: writes the actions.
            make: gives a fresh environment; one is made for each trajectory of a batch.
        """
        self._actor, self._make, self._block = actor, make, block
        self.module: nn.Module = actor.module
        self.max_steps: Mapping[str, int] = {SEGMENT: actor.max_steps[SEGMENT] * block.max_turns}

    @property
    def version(self) -> int:
        """Number of optimiser steps taken."""
        return self._actor.version

    @version.setter
    def version(self, number: int) -> None:
        self._actor.version = number

    @property
    def rollout(self) -> int:
        """Number of the rollout that is drawn."""
        return self._actor.rollout

    @rollout.setter
    def rollout(self, number: int) -> None:
        self._actor.rollout = number

    def sample(self, prompts: Sequence[Prompt], *, evaluation: bool = False) -> Trajectory:
        """Act one episode per prompt; in each turn, all that have not ended are one batch.

        Raises:
            RecipeError: if the environment does not keep its contract.
            EnvironmentFailedError: if it fails more often than the recipe allows.
        """
        episodes: list[Episode] = []
        try:
            for prompt in prompts:
                episodes.append(begin(prompt, self._make, self._block))
            for turn in range(self._block.max_turns):
                self._act([episode for episode in episodes if not episode.ended], turn, evaluation=evaluation)
        finally:
            close(episodes)
        check_failures(episodes, self._block)
        return Trajectory(
            group_ids=torch.tensor([prompt.group_id for prompt in prompts]),
            segments={SEGMENT: _joined(episodes)},
            completions=[episode.completion() for episode in episodes],
            policy_version=self.version,
        )

    def _act(self, episodes: Sequence[Episode], turn: int, *, evaluation: bool) -> None:
        """One turn of those that go on."""
        if not episodes:
            return
        asked = _sharing([self._ask(episode, turn) for episode in episodes])
        answers = self._actor.sample(asked, evaluation=evaluation)
        segment = answers.segments[SEGMENT]
        for row, (episode, answer) in enumerate(zip(episodes, answers.completions, strict=True)):
            tokens = segment.actions["tokens"][row]
            episode.inputs.append(segment.actions["inputs"][row])
            episode.tokens.append(tokens)
            episode.log_probs.append(segment.rollout_log_probs[row, : len(tokens)])
            episode.act(answer.text or "")

    def _ask(self, episode: Episode, turn: int) -> Prompt:
        """A turn as a prompt of its own, with a random stream of its own."""
        seed = (episode.prompt.seed * self._block.max_turns + turn) % SEEDS
        return replace(episode.prompt, text=episode.seen.text, images=episode.seen.images, columns={}, seed=seed)

    def log_prob(self, name: str, segment: Segment, steps: slice) -> StepStats:
        """Teacher-forced log-probs [B, s] of the recorded actions, each in its own turn."""
        turns, places = _turns(segment)
        stats = self._actor.log_prob(name, turns, slice(None))
        states = None if stats.states is None else _placed(stats.states.state, places)[:, steps]
        return StepStats(
            log_probs=_placed(stats.log_probs, places)[:, steps],
            entropy=None if stats.entropy is None else _placed(stats.entropy, places)[:, steps],
            mean=None,
            std=None,
            states=None if states is None else StepStates(state=states, level=None),
        )

    def watched(self) -> AbstractContextManager[None]:
        """As the language model."""
        return self._actor.watched()

    def states(self, name: str, segment: Segment, steps: slice, *, trunk: nn.Module | None = None) -> StepStates:
        """The last hidden state [B, s, H] in which each token was drawn."""
        turns, places = _turns(segment)
        found = self._actor.states(name, turns, slice(None), trunk=trunk)
        return StepStates(state=_placed(found.state, places)[:, steps], level=None)

    def trunk(self) -> nn.Module:
        """As the language model."""
        return self._actor.trunk()

    def reference(self) -> AbstractContextManager[None]:
        """As the language model."""
        return self._actor.reference()

    def probes(self) -> list[Probe]:
        """As the language model."""
        return self._actor.probes()

    def save(self, directory: Path) -> None:
        """As the language model, which is what is trained."""
        self._actor.save(directory)

    def restore(self, directory: Path) -> None:
        """Load what `save` wrote."""
        self._actor.restore(directory)


def _sharing(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts of a group that look the same hold the same pictures, so that they are computed once."""
    seen: dict[tuple, tuple[Any, ...]] = {}
    shared = []
    for prompt in prompts:
        key = (prompt.group_id, str(prompt.text), *((image.size, image.tobytes()) for image in prompt.images))
        shared.append(replace(prompt, images=seen.setdefault(key, prompt.images)))
    return shared


def _joined(episodes: Sequence[Episode]) -> Segment:
    """Episodes as rows: the tokens of their turns in a line."""
    lengths = torch.tensor([sum(map(len, episode.tokens)) for episode in episodes])
    turns = [
        torch.cat([torch.full((len(row),), turn) for turn, row in enumerate(episode.tokens)]) for episode in episodes
    ]
    return Segment(
        actions={
            "inputs": [episode.inputs for episode in episodes],
            "tokens": [episode.tokens for episode in episodes],
        },
        rollout_log_probs=pad_sequence([torch.cat(episode.log_probs) for episode in episodes], batch_first=True),
        loss_mask=torch.arange(int(lengths.max())) < lengths[:, None],
        turn_ids=pad_sequence(turns, batch_first=True),
        context_tokens=torch.tensor([sum(row["input_ids"].shape[1] for row in e.inputs) for e in episodes]),
    )


def _turns(segment: Segment) -> tuple[Segment, Tensor]:
    """A segment's turns as rows of the language model's own kind, and where its steps [B, S] are among theirs,
    flattened; one behind the last stands for padding."""
    per_row: list[list[Tensor]] = segment.actions["tokens"]  # type: ignore[assignment]
    inputs: list[list[Any]] = segment.actions["inputs"]  # type: ignore[assignment]
    tokens = [turn for row in per_row for turn in row]
    lengths = torch.tensor([len(turn) for turn in tokens])
    width = int(lengths.max())
    mask = torch.arange(width) < lengths[:, None]
    places = torch.full(segment.loss_mask.shape, mask.numel())
    first = 0
    for row, turns in enumerate(per_row):
        own = torch.arange(first * width, (first + len(turns)) * width)[mask[first : first + len(turns)].flatten()]
        places[row, : len(own)] = own
        first += len(turns)
    rows = Segment(
        actions={"inputs": [turn for row in inputs for turn in row], "tokens": tokens},
        rollout_log_probs=torch.zeros(mask.shape),
        loss_mask=mask,
        turn_ids=torch.zeros(mask.shape, dtype=torch.int64),
    )
    return rows, places


def _placed(values: Tensor, places: Tensor) -> Tensor:
    """[B, S, ...] of the turns' values [T, width, ...]; 0 where there is no step."""
    flat = values.flatten(0, 1)
    padded = torch.cat([flat, torch.zeros_like(flat[:1])])
    return padded[places.to(values.device)]
