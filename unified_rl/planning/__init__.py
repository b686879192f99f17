"""What a run needs in memory and traffic, from the recipe and the model's own files: nothing is loaded."""
