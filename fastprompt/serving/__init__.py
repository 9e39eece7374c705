"""Serving: many requests under many prompts over one backbone, batched step by step.

`Engine` is the loop that one thread runs, `AsyncEngine` its face for asyncio, `PromptRegistry` the prompts on disk,
`Residency` the way they take into the device's memory, and `fastprompt.serving.http` the server.
"""
