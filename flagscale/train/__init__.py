"""What runs inside a training job: entry points over a backend's own training loop, and what they need around it.

This is the only room that imports a backend, and even here not before its hooks are installed: so Megatron's modules
are imported inside functions, after `flagscale.train.backend.start_megatron`. An entry point is run as a script,
which puts this folder on the path before all others: no file here may be called like a package that somebody imports.
"""
