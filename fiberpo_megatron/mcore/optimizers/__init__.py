"""The optimizer, the data-parallel wrapping of the model, and the memory that both take."""
