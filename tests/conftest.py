"""One thread a process, children included: the operands are small, and xdist brings the processes."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
