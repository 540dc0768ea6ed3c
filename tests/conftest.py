import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
if not torch.cuda.is_available():  # then Triton's interpreter runs the kernel; to set before its import
    os.environ["TRITON_INTERPRET"] = "1"
