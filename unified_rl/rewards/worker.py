"""The process of one reward: it imports the reward, then judges batches that its parent sends, until the parent goes.

Started by `process` as `python -m unified_rl.rewards.worker FD`. Messages are pickled, but only ever between a
process and the child that it started itself, over a socket pair that nobody else can reach.

    parent                                    child
    (reference, arguments, shown, where, device)   ->
                                              <-   ("ready", traits) or ("refused", message)
    RewardBatch                               ->
                                              <-   ("judged", Judged), ("raised" or "unusable", message)
"""

import os
import pickle
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from unified_rl.errors import RecipeError
from unified_rl.imports import load_import, one_line
from unified_rl.rewards.conventions import UniformReward, make_reward
from unified_rl.rewards.types import RewardBatch, RewardError, WrongAnswerError

PARENT_CHECK_SECONDS = 2.0


def main(descriptor: int) -> None:
    """Serve the parent at the other end of a socket."""
    os.dup2(2, 1)  # what a reward prints must not mix with the parent's output
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    _be_the_first_to_go()
    connection = Connection(descriptor)
    try:
        reward = _load(*take(connection))
    except RecipeError as error:
        put(connection, ("refused", one_line(error)))
        return
    except (Exception, SystemExit) as error:  # the reward is the user's code: anything may come out of it
        put(connection, ("refused", f"{type(error).__name__}: {one_line(error)}"))
        return
    put(connection, ("ready", traits(reward)))
    while True:
        try:
            batch = take(connection)
        except EOFError:
            return
        except Exception as error:  # whatever unpickling the user's columns says
            put(
                connection,
                ("unusable", f"got data that its process cannot read ({one_line(error)}); isolation: thread"),
            )
            continue
        put(connection, answer(reward, batch))


def put(connection: Connection, message: Any) -> None:
    """Send a message by value. The connection's own `send` would hand torch tensors over as shared memory, which only
    processes that fork from one another can open."""
    connection.send_bytes(pickle.dumps(message))


def take(connection: Connection) -> Any:
    """The next message."""
    return pickle.loads(connection.recv_bytes())


def traits(reward: UniformReward) -> dict[str, object]:
    """What the parent has to know of a reward."""
    return {
        "convention": reward.convention,
        "groupwise": reward.groupwise,
        "differentiable": reward.differentiable,
    }


def answer(reward: UniformReward, batch: RewardBatch) -> tuple[str, object]:
    """The reply about a batch: judged; raised, which may be tried again; unusable, which may not."""
    try:
        return "judged", reward.judge(batch)
    except RewardError as error:
        return "unusable", one_line(error)
    except WrongAnswerError as error:
        return "raised", one_line(error)
    except (Exception, SystemExit) as error:  # see above
        traceback.print_exc()
        return "raised", f"failed: {type(error).__name__}: {one_line(error)}"


def _load(reference: str, arguments: dict, shown: str, where: str, device: str) -> UniformReward:
    return make_reward(load_import(reference, f"{where}.name"), arguments, shown=shown, where=where, device=device)


def _end_with(parent: int) -> None:
    """Leave when the parent has gone, also while the reward hangs."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SECONDS)
    os._exit(1)


def _be_the_first_to_go() -> None:
    """Where memory runs out, Linux shall end this process, not the trainer."""
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")
    except OSError:  # not Linux, or not allowed: only the wish is lost
        return


if __name__ == "__main__":
    main(int(sys.argv[1]))
