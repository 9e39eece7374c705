"""Numbers in README and docs/, made from bench/results: a page says which, and `python -m bench pages` checks it.

A comment before a table names its maker in `TABLES`, and two comments around a number in the text name its maker in
`VALUES`::

    <!-- results: readme -->

    | time of | over the time of | ratio |
    ...
    gave <!-- result: load.over-peft -->6.9<!-- --> times the tokens

After new results `python -m bench pages --write` puts what they say in place.
"""
