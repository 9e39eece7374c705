"""`python -m fastprompt` is the `fastprompt` command."""

from fastprompt.cli import app

if __name__ == "__main__":
    app(prog_name="fastprompt")
