"""What `validate` says of a language model before a pipeline; no torch."""

from unified_rl.recipe.schema import Recipe


def writer_lines(recipe: Recipe) -> list[tuple[str, str]]:
    """(name, text) of the writer, what it is asked and what is drawn; nothing without one."""
    writer = recipe.policy.writer
    if writer is None:
        return []
    trained = "frozen" if not recipe.trains("text") else "LoRA" if writer.adapter.kind == "lora" else "full fine-tuning"
    keys = writer.sampling.model_dump(exclude_none=True)
    sampling = ", ".join(f"{key}: {value}" for key, value in keys.items())
    return [
        ("writer", f"{writer.model}, {writer.dtype}, {trained}; not in the estimate of memory below"),
        ("written", f"{sampling}; asked {writer.instruction!r}"),
        ("drawn", f"{writer.draw!r}" + ("" if recipe.trains("image") else "; the pipeline is frozen")),
    ]
