"""Which rows and steps go through the policy together."""

from collections.abc import Sequence

from unified_rl.engine import distributed
from unified_rl.recipe.schema import EngineBlock
from unified_rl.types import Rows, Segment


def spans(
    segment: Segment, rows: range, steps: Sequence[int], engine: EngineBlock, *, steps_per_forward: int | None
) -> list[tuple[Rows, slice]]:
    """The (rows, steps) of each forward, as many on every process: rows by `micro_batch` or `micro_batch_tokens`, steps
    as many as the policy evaluates at once. Called by all processes, each with as many rows."""
    runs = [slice(None)] if steps_per_forward is None else [slice(step, step + 1) for step in steps]
    if engine.micro_batch_tokens is not None and segment.context_tokens is not None:
        chunks: list[Rows] = [*filled(segment, rows, engine.micro_batch_tokens, engine.micro_batch)]
    else:
        parts = [rows[start : start + engine.micro_batch] for start in range(0, len(rows), engine.micro_batch)]
        chunks = [slice(part.start, part.stop, part.step) for part in parts]
    return [(chunk, run) for run in runs for chunk in chunks]


def filled(segment: Segment, rows: Sequence[int], max_tokens: int, max_rows: int) -> list[list[int]]:
    """Rows of similar length together, the longest first, so that a run that does not fit fails at once.

    Rows with the same prompt length and completions of similar length stay together, so that most groups do. A row
    longer than `max_tokens` gets a window of its own. Processes with fewer windows split their largest ones until all
    have as many: a forward that one process alone makes would hang where weights are sharded.
    """
    assert segment.context_tokens is not None
    contexts = segment.context_tokens.tolist()
    lengths = segment.loss_mask.sum(1).tolist()
    order = sorted(rows, key=lambda row: (-contexts[row] - lengths[row], -contexts[row], row))
    chunks: list[list[int]] = []
    for row in order:
        together = [*chunks[-1], row] if chunks else [row]
        longest = max(contexts[each] for each in together) + max(lengths[each] for each in together)
        if chunks and len(together) <= max_rows and longest * len(together) <= max_tokens:
            chunks[-1].append(row)
        else:
            chunks.append([row])
    (num_chunks,) = distributed.max_over_ranks([float(len(chunks))])
    while len(chunks) < num_chunks:
        number = max(range(len(chunks)), key=lambda index: len(chunks[index]))
        half = len(chunks[number]) // 2
        chunks[number : number + 1] = [chunks[number][:half], chunks[number][half:]]
    return chunks
