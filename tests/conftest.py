"""One thread for torch: the tiny models of the tests only lose by sharing their few operations out."""

import torch

torch.set_num_threads(1)
