"""One thread for every test process: networks this small only lose by more."""

import os

# before torch starts its threads, and for the processes that tests start
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
