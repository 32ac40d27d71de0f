__version__ = "0.1.0"

from clip_nbdev.checkpoint import load
from clip_nbdev.clip import available_models, create_model

__all__ = ["available_models", "create_model", "load"]
