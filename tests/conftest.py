"""What every test starts from."""

import pytest
import torch

# there is a worker for each core
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_draws_every_time():
    torch.manual_seed(0)
