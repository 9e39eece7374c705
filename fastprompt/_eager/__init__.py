"""The ops in plain PyTorch, reading prefixes in place: what runs where no kernel is installed.

Rows of one prompt are folded into the rows of one matrix product against a view of the arena; nothing of the size
of rows x prefix tokens x head size is ever allocated. Callers have checked shapes and dtypes.
"""
