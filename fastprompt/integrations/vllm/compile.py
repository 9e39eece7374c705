"""`python -m fastprompt.integrations.vllm.compile STORE PROMPT`: an embedding prompt made a prefix."""

from __future__ import annotations

import json
import sys

from fastprompt.errors import FastPromptError


def main(store_folder: str, prompt_folder: str) -> int:
    """Compile the prompt of a folder on the CPU and print the digest of its prefix as JSON."""
    import torch

    from fastprompt import store
    from fastprompt.cli.backbones import load_backbone
    from fastprompt.integrations.vllm.export import Compiler, store_prefix, to_prefix
    from fastprompt.integrations.vllm.store import PrefixStore

    exported = PrefixStore(store_folder)
    backbone = exported.backbone()
    try:
        compiler = Compiler(lambda: load_backbone(backbone.model, dtype=getattr(torch, backbone.dtype)))
        prompt = store.load_prompt(prompt_folder, backbone.spec)
        digest = store_prefix(exported, to_prefix(prompt, backbone.spec, compiler))
    except FastPromptError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps({"digest": digest}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
