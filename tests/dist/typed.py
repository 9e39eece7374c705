"""A user's program as mypy reads it (see check.py): the last line is wrong."""

from typing_extensions import reveal_type

import fastprompt as fp

reveal_type(fp.PromptTuning(num_virtual_tokens=16).num_virtual_tokens)
fp.PromptTuning(num_virtual_tokens="16")
