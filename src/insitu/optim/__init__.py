"""Memory-efficient optimizers that drop into any PyTorch training loop."""

from insitu.optim.apollo import APOLLO, APOLLOMini
from insitu.optim.groups import param_groups

__all__ = ["APOLLO", "APOLLOMini", "param_groups"]
