"""Weights between the formats of trainers and of inference engines.

`canon` says what a model's tensors are called on both sides, as data, and `layout` how one becomes the other, each
conversion defined once and played in both directions. Both work on names and shapes: no byte is read before the whole
plan is known to fit. `megatron_args` and `hf_config` read a model's dimensions; `inert`, `torch_dist`, `rank_files` and
`hf_folder` read and write files; `checkpoint` puts them together.
"""
