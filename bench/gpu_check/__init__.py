"""`python -m bench gpu-check`: whether the kernels are right on this machine's GPU, and how fast, in one command."""
