"""OpenAI's HTTP interface over the engine: one process, one model.

    python -m flagscale.inference.server --model path/to/model --port 8000

Read it in this order: `options` (what it is told), `service` (what state it is in), `lifecycle` (loading, draining,
ending), `app` and `gate` (routes, and who may use them), `bodies` and `asking` (a body becomes prompts and sampling
parameters), `answers`, `shapes` and `token_text` (deltas become JSON), `streams` (many deltas at once, and clients that
leave), `faults`, `metrics`.

It stays thin: nothing is queued, retried or balanced here, that is for the engine behind it and the router before it.
"""
