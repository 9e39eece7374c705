"""prefix_attention by the package `flash-attn`, where it is installed: two or three of its calls, merged."""
