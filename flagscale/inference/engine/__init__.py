"""An inference engine of our own: any causal language model of transformers, many requests at once, on any chip.

Read it in this order: `request` and `pages` (what there is), `prefix` and `scheduler` (who gets it), `kv_cache`,
`attention` and `model` (the computation), `sampler` and `text` (the answer), `engine` and `async_engine` (the whole).

    engine = Engine.from_folder("path/to/model")
    outputs = engine.generate(["Once upon a time"], SamplingParams(max_tokens=32, temperature=0))
"""

from flagscale.inference.engine.adapters import Adapter
from flagscale.inference.engine.async_engine import AsyncEngine
from flagscale.inference.engine.config import EngineConfig
from flagscale.inference.engine.engine import Engine
from flagscale.inference.engine.metrics import EngineMetrics
from flagscale.inference.engine.outputs import Completion, Delta, OutputSum, RequestOutput, TokenLogprob
from flagscale.inference.engine.sampling import SamplingParams

__all__ = [
    "Adapter",
    "AsyncEngine",
    "Completion",
    "Delta",
    "Engine",
    "EngineConfig",
    "EngineMetrics",
    "OutputSum",
    "RequestOutput",
    "SamplingParams",
    "TokenLogprob",
]
