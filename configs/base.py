"""Every option there is, with its default: the config that all others start from.

    python -m precision_scaling.train --config=configs/base.py --workdir=runs/first

The options, each with a comment, are in precision_scaling/config/base.py.
"""

from precision_scaling.config.base import get_config, grid

__all__ = ["get_config", "grid"]
