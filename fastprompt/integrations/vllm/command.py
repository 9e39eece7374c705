"""`python -m fastprompt.integrations.vllm.command MODEL OPTIONS`: what `vllm serve` does, however vLLM is packaged.

Builds for CPUs are distributions of another name, which vLLM's own command asks for and does not find.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fastprompt.errors import FastPromptError
from fastprompt.integrations.vllm.versions import check_installed


def main(arguments: Sequence[str]) -> int:
    """Run vLLM's server; 1 where this vLLM cannot serve prompts."""
    try:
        check_installed()
    except FastPromptError as error:
        print(error, file=sys.stderr)
        return 1
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    (serve,) = cmd_init()
    parser = FlexibleArgumentParser(description="vLLM's server with fastprompt's prompts")
    serve.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    args = parser.parse_args(["serve", *arguments])
    serve.validate(args)
    serve.cmd(args)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
