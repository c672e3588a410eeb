"""Command lines.

The threads of torch and of the kernels wait for each other some thousand times in a training step. GNU OpenMP has them
turn in a loop for milliseconds before they sleep; beside other busy processes that takes the cores from those that are
waited for. It reads for how long when torch is imported, so it is said here, before that.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
