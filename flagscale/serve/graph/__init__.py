"""A graph of models in Ray Serve: the program that answers for it, and what runs in Ray's workers."""
