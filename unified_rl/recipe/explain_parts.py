"""What `validate` says of what stands beside a policy's model: an environment, a writer; no torch."""

from unified_rl.recipe.schema import Recipe


def environment_lines(recipe: Recipe) -> list[tuple[str, str]]:
    """(name, text) of what a language model acts in; nothing without one."""
    block = recipe.policy.environment
    if block is None:
        return []
    arguments = ", ".join(f"{key}: {value}" for key, value in block.arguments.items())
    made = f"{block.name} with {arguments}" if arguments else block.name
    return [("environment", f"{made}; at most {block.max_turns} turns an episode, one action each")]


def writer_lines(recipe: Recipe) -> list[tuple[str, str]]:
    """(name, text) of the writer, what it is asked and what is drawn; nothing without one."""
    writer = recipe.policy.writer
    if writer is None:
        return []
    trains = recipe.trains(writer.segment)
    trained = "frozen" if not trains else "LoRA" if writer.adapter.kind == "lora" else "full fine-tuning"
    keys = writer.sampling.model_dump(exclude_none=True)
    sampling = ", ".join(f"{key}: {value}" for key, value in keys.items())
    return [
        ("writer", f"{writer.model}, {writer.dtype}, {trained}; not in the estimate of memory below"),
        ("written", f"{sampling}; asked {writer.instruction!r}"),
        ("drawn", f"{writer.drawn!r}" + ("" if recipe.trains("image") else "; the pipeline is frozen")),
    ]
