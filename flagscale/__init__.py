"""One toolkit that trains, fine-tunes, serves and reinforces large models on whatever chips a team has."""

__version__ = "0.1.0"
