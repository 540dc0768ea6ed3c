import os
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# Without a GPU Triton's interpreter runs the kernel; this has to be set before Triton's import.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# The models are so small that a second thread mostly waits for the first, very long on a busy CPU.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of data_gen.py with 24 training and 12 test problems."""
    import data_gen  # found only now, by the path above
    folder = str(tmp_path_factory.mktemp("set") / "data")
    data_gen.main(["--out", folder, "--n", "24", "--n_test", "12"])
    return folder
