"""How one knows that memory did not suffice. Standard library: it is asked where torch may be missing, too."""

from __future__ import annotations

#: What errors say then: torch's of the CPU; those of CUDA and MONAI; those of cuBLAS and cuFFT.
_SAID = ("can't allocate memory", "out of memory", "Seems to be OOM", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """True for what torch and Python raise when memory does not suffice, on a GPU or a CPU."""
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in _SAID)
    return said or isinstance(error, MemoryError)
