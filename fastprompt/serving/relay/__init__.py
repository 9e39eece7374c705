"""One face over several servers with the same prompts: where a request goes, and what happens if a server dies.

Knows ASGI and nothing of who runs the servers; `fastprompt/integrations/ray.py` does.
"""
