"""Serving: from a model to an OpenAI-compatible service that stays up."""
