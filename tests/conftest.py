import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# Without a GPU Triton's interpreter runs the kernel; this has to be set before Triton's import.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
