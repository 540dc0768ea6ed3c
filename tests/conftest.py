import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
if not torch.cuda.is_available():  # then the Triton kernel runs in Triton's interpreter; must be set before its import
    os.environ["TRITON_INTERPRET"] = "1"
