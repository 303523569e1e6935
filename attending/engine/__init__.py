"""Serving a model on one machine: scheduler, pages, sampler, speculation, and the arithmetic."""
