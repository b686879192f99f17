"""One process of `test_broken_replay`: the sampler of the second one reports wrong log-probs."""

from pathlib import Path

from tests.unit.toys import Bandit, build_parts
from unified_rl.engine import distributed
from unified_rl.errors import RecipeError
from unified_rl.run_folder.resume import Position
from unified_rl.stopping import UNASKED
from unified_rl.train import run_loop


def main(folder: Path) -> None:
    distributed.initialise()
    rank = distributed.rank()
    parts = build_parts(folder / str(rank), Bandit([0.3, 0.1], sampler_bias=0.5 * rank))
    parts.engine.rank, parts.engine.world_size = rank, distributed.world_size()
    try:
        run_loop(parts, Position(step=0, rollout=0), UNASKED)
    except RecipeError as error:
        (folder / f"told_{rank}").write_text(str(error))
    distributed.shutdown()
