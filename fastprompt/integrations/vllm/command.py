"""`python -m fastprompt.integrations.vllm.command MODEL OPTIONS`: what `vllm serve` does, however vLLM is packaged.

Builds for CPUs are distributions of another name, which vLLM's own command asks for and does not find.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fastprompt.errors import ArgumentError, FastPromptError, UnsupportedError
from fastprompt.integrations.vllm.launch import PLUGIN
from fastprompt.integrations.vllm.versions import check_installed


def main(arguments: Sequence[str]) -> int:
    """Run vLLM's server; 1 where this vLLM cannot serve prompts, or would serve without looking at keys."""
    try:
        check_installed()
        _check_plugin()
        from vllm.entrypoints.cli.serve import cmd_init
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        (serve,) = cmd_init()
        parser = FlexibleArgumentParser(description="vLLM's server with fastprompt's prompts")
        serve.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
        args = parser.parse_args(["serve", *arguments])
        if getattr(args, "grpc", False):  # from the command line or a file of options
            raise ArgumentError("--grpc starts a server that knows no plugins, and so no keys and no prompts")
    except FastPromptError as error:
        print(error, file=sys.stderr)
        return 1
    serve.validate(args)
    serve.cmd(args)
    return 0


def _check_plugin() -> None:
    """Raise UnsupportedError unless vLLM loads the plugin: where it cannot, it logs that and serves without keys."""
    from vllm.plugins import load_endpoint_plugins

    if not any(plugin.name == PLUGIN for plugin in load_endpoint_plugins(("generate",))):
        raise UnsupportedError(
            f"vLLM does not load the endpoint plugin {PLUGIN!r}, without which it would answer anybody: VLLM_PLUGINS "
            "must name it, fastprompt must be installed with pip beside vLLM, and the log above says what failed"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
