"""A machine that runs compiled PTX on the CPU: what nvcc and Triton made of the kernels, without a GPU.

All threads of a launch are lanes of NumPy arrays. Memory knows what was allocated and what may be written; whatever was
never written is NaN. Faults, hangs and what is not defined are errors. Instructions are those that this project's
kernels have, as NVIDIA's "Parallel Thread Execution ISA", version 9.0, describes them.
"""

from .counts import Counts
from .launch import Copies, launch
from .memory import Memory, PtxError
from .program import Kernel, parse

__all__ = ["Copies", "Counts", "Kernel", "Memory", "PtxError", "launch", "parse"]
