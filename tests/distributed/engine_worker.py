"""Run in several processes by test_engine_equality.py: trains one small model in many settings, stores what came out.

Also imported by that test, which trains the same windows in one process with the local engine.
"""

import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unified_rl.engine import build_engine, distributed
from unified_rl.metrics import slowest
from unified_rl.recipe.schema import EngineBlock, Optimizer
from unified_rl.recipe.snapshot import Ema, Snapshot
from unified_rl.run_folder import checkpoint
from unified_rl.snapshots import Snapshots

NUM_RANKS = 2
NUM_STEPS = 5
ROWS = 24
NORM_LIMIT = 2.9
"""Between the gradient norms of the steps: some are clipped, some are not."""
STAGES = ["0", "1", "2", "3", "3-sharded"]
WHOLE_SHARDS = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""DeepSpeed keeps small parameters whole under stage 3; not so with this."""
KEYS: dict[str, dict] = {
    "3-sharded": {"deepspeed": WHOLE_SHARDS},
    "1-offload": {"offload": "optimizer"},
    "2-offload": {"offload": "optimizer"},
    "3-offload": {"offload": "all", "deepspeed": WHOLE_SHARDS},
    "2-files": {"offload": "optimizer", "offload_folder": tempfile.gettempdir()},
    "3-files": {"offload": "all", "offload_folder": tempfile.gettempdir(), "deepspeed": WHOLE_SHARDS},
    "2-fp16": {"deepspeed": {"fp16": {"initial_scale_power": 8}}},
    "3-fp16": {"deepspeed": {"fp16": {"initial_scale_power": 8}}},
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
VARIANTS = ["2-bf16", "3-bf16", "2-fp16", "3-fp16"]
"""Trained like the stages, with less tried on them."""
OFFLOADED = ["1-offload", "2-offload", "3-offload", "2-files", "3-files"]
"""The same, with what the processes hold in main memory (which on CPU is another path through DeepSpeed only), or in
files."""
UNEVEN_STAGES = ["0", "1"]
"""Where ranks may use different parameters."""
SPLITS = {"one": (1,) * 5, "three": (3,) * 5, "mixed": (3, 1, 2, 1, 3)}
"""Windows a rank, by optimiser step."""


class Net(nn.Module):
    """An MLP with a frozen layer, trained and frozen scalars, a branch that some windows leave out (by its name a
    critic's, with a learning rate of its own), and a layer that is never used."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last, self.critics = nn.Linear(8, 33), nn.Linear(33, 8), nn.Linear(8, 8)
        self.unused, self.frozen = nn.Linear(3, 3), nn.Linear(8, 8)
        self.scale, self.shift = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(0.5), requires_grad=False)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor, branch: bool) -> Tensor:
        x = x.to(self.last.bias.dtype)
        y = self.last(torch.tanh(self.first(x))) * self.scale + self.frozen(x) + self.shift
        return y + self.critics(x) if branch else y


def recipe(backend: str, stage: str) -> SimpleNamespace:
    # Adam forgets the scale of gradients, and so would this test: a large eps and a clip limit inside their range
    # make it notice.
    optimizer = Optimizer(
        lr=1e-2,
        critic_lr=2e-2,
        eps=0.1,
        max_grad_norm=NORM_LIMIT,
        weight_decay=0.1,
        warmup_steps=2,
        decay="linear",
    )
    engine = EngineBlock(backend=backend, zero_stage=int(stage[0]), **KEYS.get(stage, {}))
    return SimpleNamespace(optimizer=optimizer, engine=engine)


def windows(step: int, num_windows: int, skipping: str) -> list[list[tuple[Tensor, Tensor, bool]]]:
    """Per rank, the windows of a step: x [rows, 8], y [rows, 8], whether the branch is used.

    Skipping "none": always used; "alike": not in steps 1 and 3, and in step 2 not in the first window; "last rank": not
    there.
    """
    generator = torch.Generator().manual_seed(step)
    rows = torch.randn(2, ROWS, 8, generator=generator)
    plan = []
    for rank, part in enumerate(rows.chunk(NUM_RANKS, dim=1)):
        pieces = part.chunk(num_windows, dim=1)
        used = {
            "none": [True] * num_windows,
            "alike": [step in (0, 4) or (step == 2 and index > 0) for index in range(num_windows)],
            "last rank": [rank != NUM_RANKS - 1] * num_windows,
        }[skipping]
        plan.append([(x, y, use) for (x, y), use in zip(pieces, used, strict=True)])
    return plan


def train(
    module: Net, engine, split: tuple[int, ...], ranks: range, *, skipping="alike", bad_step=None, start=0
) -> Iterator[float]:
    """Train on the windows of `ranks`, from step `start` on; yields the norm after each step. In `bad_step` the last
    rank's loss is NaN."""
    for step, num_windows in enumerate(split):
        if step < start:
            continue
        plan = windows(step, num_windows, skipping)
        for rank in ranks:
            for x, y, use in plan[rank]:
                with engine.window():
                    loss = 3.0 * (module(x, use) - y).pow(2).sum() / (ROWS * 8)
                    engine.backward(loss * float("nan") if step == bad_step and rank == NUM_RANKS - 1 else loss)
        yield engine.step()


@contextmanager
def counted() -> Iterator[dict[str, float]]:
    """Inside it, the bytes that this process sends by the collectives that DeepSpeed uses here for weights and
    gradients, as rings do it: from the tensors that torch is given."""
    from deepspeed.comm import comm

    share = (distributed.world_size() - 1) / distributed.world_size()
    # Where torch is called, by the name of the tensor that is as large as all processes' together; what is sent of it.
    kinds = {
        "all_reduce": (dist, "all_reduce", "tensor", 2 * share),
        "reduce_scatter": (comm.cdb, "reduce_scatter_function", "input", share),
        "all_gather": (comm.cdb, "all_gather_function", "output_tensor", share),
    }
    found = dict.fromkeys(kinds, 0.0)

    def counting(kind: str, call: Callable, name: str, times: float) -> Callable:
        @functools.wraps(call)
        def counts(*given, **options):
            whole = signature(call).bind(*given, **options).arguments[name]
            found[kind] += times * whole.numel() * whole.element_size()
            return call(*given, **options)

        return counts

    with ExitStack() as stack:
        for kind, (holder, place, name, times) in kinds.items():
            stack.enter_context(mock.patch.object(holder, place, counting(kind, getattr(holder, place), name, times)))
        yield found


def weights(module: Net, engine) -> dict[str, Tensor]:
    with engine.full_weights():
        return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def build(stage: str, seed: int = 0):
    module = Net(seed).to(DTYPES.get(stage[2:], torch.float32))
    return module, build_engine(module, recipe("deepspeed", stage), num_steps=NUM_STEPS)


def settings(folder: Path) -> dict:
    """One result per (stage, what). The stages' states after two steps stay in `folder`."""
    ranks = range(distributed.rank(), distributed.rank() + 1)
    results = {}
    for stage in STAGES:
        for name, split in SPLITS.items():
            module, engine = build(stage)
            norms = list(train(module, engine, split, ranks))
            results[stage, name] = {"weights": weights(module, engine), "norms": norms, "bytes": engine.sent_bytes}
        module, engine = build(stage)
        norms, measured, told = [], [], []
        with counted() as given:
            for norm in train(module, engine, SPLITS["three"], ranks, skipping="none"):
                norms.append(norm)
                measured.append(given.copy())
                told.append({name: sent - sum(step[name] for step in told) for name, sent in engine.sent_bytes.items()})
                given.update(dict.fromkeys(given, 0.0))
        results[stage, "resplit"] = {"weights": weights(module, engine), "norms": norms}
        results[stage, "resplit"] |= {"measured": measured, "told": told}
        if stage in UNEVEN_STAGES:
            module, engine = build(stage)
            norms = list(train(module, engine, SPLITS["mixed"], ranks, skipping="last rank"))
            results[stage, "uneven"] = {"weights": weights(module, engine), "norms": norms}
        module, engine = build(stage)
        norms = list(train(module, engine, SPLITS["mixed"], ranks, bad_step=1))
        norms = distributed.gather_objects([[str(norm) for norm in norms]])
        results[stage, "bad"] = {"weights": weights(module, engine), "norms": norms, "lr": engine.lr}
        results[stage, "snapshots"] = snapshots(stage, ranks)
        results[stage, "resumed"] = resumed(stage, ranks, folder)
        # What other stages, and one process, wrote goes on here.
        others = [other for other in (*STAGES, "one process") if other != stage and (folder / other).exists()]
        results[stage, "crossed"] = {other: last_steps(stage, ranks, folder / other)[0] for other in others}
    for stage in VARIANTS:
        results[stage, "resumed"] = resumed(stage, ranks, folder)
        results[stage, "mixed"] = {"weights": results[stage, "resumed"]["straight"]}
        others = VARIANTS[: VARIANTS.index(stage)][-1:]
        results[stage, "crossed"] = {other: last_steps(stage, ranks, folder / other)[0] for other in others}
    for stage in OFFLOADED:
        results[stage, "resumed"] = resumed(stage, ranks, folder)
        if stage.endswith("offload"):
            results[stage, "crossed"] = {"0": last_steps(stage, ranks, folder / "0")[0]}
        module, engine = build(stage)
        norms = list(train(module, engine, SPLITS["mixed"], ranks, bad_step=1))
        results[stage, "bad"] = {"weights": weights(module, engine), "norms": norms}
    module, engine = build("3-sharded")
    engine.window = nullcontext  # which leaves out what an engine does before a window
    results["3-sharded", "trap"] = {"norms": list(train(module, engine, SPLITS["three"], ranks))}
    return results


def resumed(stage: str, ranks: range, folder: Path) -> dict:
    """Train, save after step 2, continue; then again from the files in a new engine around other weights."""
    module, engine = build(stage)
    steps = train(module, engine, SPLITS["mixed"], ranks)
    next(steps), next(steps)
    engine.save(folder / stage)
    straight_norms, straight = list(steps), weights(module, engine)
    again, norms, lr = last_steps(stage, ranks, folder / stage)
    return {"straight": straight, "again": again, "norms": (straight_norms, norms), "lr": lr}


def last_steps(stage: str, ranks: range, state: Path) -> tuple[dict[str, Tensor], list[float], float]:
    """Load a state after step 2 into a new engine around other weights, and take the others: weights, norms, rate
    before."""
    module, engine = build(stage, seed=1)
    copy_frozen(module, stage)
    engine.load(state)
    lr = engine.lr
    norms = list(train(module, engine, SPLITS["mixed"], ranks, start=2))
    trained = weights(module, engine)
    distributed.barrier()
    return trained, norms, lr


def snapshots(stage: str, ranks: range) -> dict:
    """Weights of an average, and the module's output under it, along a training that also acts with it in between."""
    module, engine = build(stage)
    rules = {"ema": Snapshot(decay=0.75), "start": Snapshot(decay=1.0)}
    copies = Snapshots(engine, rules)
    x = torch.ones(2, 8)
    found: dict = {"outputs": [], "bytes": sum(copy.numel() for copy in copies._copies["ema"].values())}
    with tempfile.TemporaryDirectory() as own:
        shared = Path(distributed.gather_objects([own])[0])
        for _norm in train(module, engine, SPLITS["mixed"], ranks):
            copies.tick("step")
            with copies.use("ema"), torch.no_grad():
                found["outputs"].append(module(x, True))
        copies.save(shared)
        distributed.barrier()
        again = Snapshots(engine, rules)
        again.load(shared)
        distributed.barrier()
    for name, kept in (("ema", copies), ("start", copies), ("restored", again)):
        with kept.use("ema" if name == "restored" else name):
            found[name] = weights(module, engine)
    found["trained"] = weights(module, engine)
    return found


def copy_frozen(module: Net, stage: str) -> None:
    """Give a module the frozen layer of seed 0, which checkpoints leave out."""
    import deepspeed

    parameters = list(module.frozen.parameters())
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=stage[0] == "3"), torch.no_grad():
        for parameter, source in zip(parameters, Net(0).frozen.parameters(), strict=True):
            parameter.copy_(source)


def helpers() -> dict:
    """The collectives of `distributed`, on values that differ by rank."""
    rank = distributed.rank()
    tensors = {
        "bool": torch.tensor([rank == 0, True]),
        "bfloat16": torch.full((1, 2, 2), rank + 0.5, dtype=torch.bfloat16),
        "int64": torch.tensor([[rank, 2**60 + rank]]),
        "empty": torch.zeros(0, 3),
    }
    found: dict = {name: distributed.gather_rows(tensor) for name, tensor in tensors.items()}
    try:
        distributed.gather_rows(torch.zeros(rank + 1))
        refused = False
    except AssertionError:
        refused = True
    found["uneven refused"] = distributed.gather_objects([refused])
    found["objects"] = distributed.gather_objects([{"rank": rank, "text": "ü" * rank}] * (rank + 1))
    found["slowest"] = slowest("update", rank + 1.0)
    found["sum"] = distributed.sum_over_ranks([rank + 1, 2.0**40 + rank])
    found["max"] = distributed.max_over_ranks([-float(rank), float(rank)])
    found["flags"] = [distributed.broadcast_flag(rank == 1), distributed.broadcast_flag(False)]
    return found


class DummyPolicy:
    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def save(self, directory: Path) -> None:
        if self.fails:
            raise OSError("disk full")
        (directory / "weights.txt").write_text("weights")


def checkpoints(run_folder: Path) -> dict:
    """Checkpoints of two processes, one of which cannot be written."""
    _, engine = build("2")
    errors = []
    for step, fails in ((1, False), (2, True)):
        try:
            checkpoint.save_checkpoint(
                run_folder,
                step,
                policy=DummyPolicy(fails),
                engine=engine,
                snapshots=Snapshots(engine, {"ema": Ema()}),
                state={"step": step},
                keep=2,
            )
            errors.append("")
        except checkpoint.CheckpointError as error:
            errors.append(str(error))
    found = checkpoint.find_checkpoint(run_folder, "auto")
    return {"errors": distributed.gather_objects([errors]), "found": distributed.gather_objects([str(found)])}


def plain_training(stage: str, states: Path) -> dict:
    """The whole of it, and its last steps from what two processes of another stage wrote."""
    module, engine = build(stage)
    ranks = range(distributed.rank(), distributed.rank() + 1)
    norms = list(train(module, engine, SPLITS["mixed"], ranks))
    other = STAGES[(STAGES.index(stage) + 2) % len(STAGES)]
    crossed = last_steps(stage, ranks, states / other)[0]
    return {"weights": weights(module, engine), "norms": norms, "crossed": crossed}


def main(out: Path, num_ranks: int, states: Path) -> None:
    """`states`: written to by two processes, read by four."""
    global NUM_RANKS
    NUM_RANKS = num_ranks
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed refuses float16 on CPUs without instructions for it; torch computes it on all.
    get_accelerator().is_fp16_supported = lambda: True
    distributed.initialise(timeout_seconds=60)
    if num_ranks == 2:
        results = {
            "settings": settings(states),
            "helpers": helpers(),
            "checkpoints": checkpoints(out.parent / "run"),
        }
    else:
        results = {"settings": {(stage, "mixed"): plain_training(stage, states) for stage in STAGES}}
    if distributed.is_main():
        torch.save(results, out)
    distributed.shutdown()
