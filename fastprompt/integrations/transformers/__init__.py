"""Everything that knows transformers: attention and mask functions, positions, the probe of a backbone."""
