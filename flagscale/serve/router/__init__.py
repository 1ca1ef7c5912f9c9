"""One address in front of many engine servers ("replicas"): routing, health, retries, metrics.

The router changes no byte of an answer. It reads a request's body once, for its `model` and what its policy wants to
know, sends it as it came to one replica, and passes on what comes back. It keeps whole request bodies in memory (which
makes a second try possible) and never whole answers.

    settings ─┐
    replica ──┼─> pool (breaker, policies, hold, probe) ──> forward, paired ──> app ──> server
    registry ─┘   metrics, status                           request, handover, answers

It imports no torch and nothing of the launcher: `flagscale.errors` and itself.
"""
