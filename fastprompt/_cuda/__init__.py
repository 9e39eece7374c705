"""paged_prefix_attention of decoding rows in CUDA: which calls the kernel takes, and its call."""
