"""Memory-efficient optimizers that drop into any PyTorch training loop."""

from insitu.optim.apollo import APOLLO, APOLLOMini
from insitu.optim.groups import param_groups
from insitu.optim.int8_layers import quantize
from insitu.optim.presets import preset
from insitu.optim.quasi_newton import ApolloQN, ApolloQNW
from insitu.optim.release import GradientRelease

__all__ = ["APOLLO", "APOLLOMini", "ApolloQN", "ApolloQNW", "GradientRelease", "param_groups", "preset", "quantize"]
