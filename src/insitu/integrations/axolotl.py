"""Axolotl plugin: an optimizer of this package from a training file.

Written to Axolotl's plugin interface (0.21), and not run with Axolotl itself yet.

.. code-block:: yaml

    plugins:
      - insitu.integrations.axolotl.InsituPlugin
    insitu_optimizer: apollo-mini      # apollo, apollo-mini, apollo-qn
    insitu_options:                    # of the optimizer
      dense: apollo
    learning_rate: 3e-4                # this and weight_decay, adam_beta1, adam_beta2, adam_epsilon as for any optimizer
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from insitu.integrations.trainer import trainer_optimizer
from insitu.optim import APOLLO, APOLLOMini, ApolloQN

_OPTIMIZERS = {"apollo": APOLLO, "apollo-mini": APOLLOMini, "apollo-qn": ApolloQN}


class InsituArgs(BaseModel):
    """What the plugin adds to Axolotl's configuration."""

    insitu_optimizer: str = "apollo"
    insitu_options: dict[str, Any] | None = None


class InsituPlugin(BasePlugin):  # type: ignore[misc]
    """Makes the optimizer; everything else is Axolotl's."""

    def get_input_args(self) -> str:
        """Where Axolotl finds the settings of this plugin."""
        return "insitu.integrations.axolotl.InsituArgs"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Hand ``trainer`` the factory, which it calls with its model when it is about to train.

        Raises:
            ValueError: an unknown optimizer, or a setting of Axolotl's that would be ignored.
        """
        name = cfg.insitu_optimizer or "apollo"
        if name not in _OPTIMIZERS:
            raise ValueError(f"insitu_optimizer={name!r}: expected one of {', '.join(_OPTIMIZERS)}")
        for setting in ("loraplus_lr_ratio", "embedding_lr", "embedding_lr_scale", "lr_groups"):
            if getattr(cfg, setting, None):
                raise ValueError(f"{setting} is not followed by the insitu plugin: remove it, or the plugin")
        options = dict(cfg.insitu_options or {})
        trainer.optimizer_cls_and_kwargs = trainer_optimizer(trainer.args, _OPTIMIZERS[name], **options)
