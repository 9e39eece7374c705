"""Bridges to other libraries; nothing below `fastprompt.model` imports them."""
