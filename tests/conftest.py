import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# Without a GPU Triton's interpreter runs the kernel; this has to be set before Triton's import.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# The models are so small that a second thread mostly waits for the first, very long on a busy CPU.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
