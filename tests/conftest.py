import os

# Before NumPy and torch: these problems are so small that a second thread only costs, and changes the last digits.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers.utils import logging  # noqa: E402

# The models of these tests are so small that a second thread only costs.
torch.set_num_threads(1)
logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
