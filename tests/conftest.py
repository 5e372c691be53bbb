"""One thread for each test worker: there are as many workers as cores."""

import torch

torch.set_num_threads(1)
