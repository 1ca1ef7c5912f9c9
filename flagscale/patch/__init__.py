"""Someone else's source tree: where it comes from, whether it is what its pin says, and what we change in it."""
