"""A server process over the fake engine: `python drain_app.py FOLDER KEYS PAUSE DRAIN`."""

import logging
import sys
from pathlib import Path

from serving.http.fakes import SPEC, VOCAB, FakeEngine

from fastprompt.serving.http import Access, create_app
from fastprompt.serving.http.server import binding, run
from fastprompt.serving.registry import PromptRegistry


class Numbers:
    """A tokenizer of which every token says its number: transformers' own take longer to load than all the rest."""

    all_special_ids = ()

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(VOCAB)}

    def convert_ids_to_tokens(self, token: int) -> str:
        return str(token)

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return "".join(f" {token}" for token in tokens)


folder, keys, pause, drain = sys.argv[1:]
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
engine = FakeEngine(Numbers(), PromptRegistry(folder, SPEC), pause=float(pause))
access = Access(Path(keys))
run(create_app(engine, access), binding("127.0.0.1", 0, access), float(drain))
