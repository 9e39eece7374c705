"""A server process over the fake engine: `python drain_app.py FOLDER KEYS PAUSE DRAIN`."""

import logging
import sys
from pathlib import Path

from serving.http.fakes import SPEC, FakeEngine

from fastprompt import demo
from fastprompt.serving.http import Access, create_app
from fastprompt.serving.http.server import binding, run
from fastprompt.serving.registry import PromptRegistry

folder, keys, pause, drain = sys.argv[1:]
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
engine = FakeEngine(demo.tokenizer(), PromptRegistry(folder, SPEC), pause=float(pause))
access = Access(Path(keys))
run(create_app(engine, access), binding("127.0.0.1", 0, access), float(drain))
