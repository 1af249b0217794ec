"""Flash-DMD on Ray: few-step distillation of diffusion models with preference RL beside it."""

__version__ = "0.1.0"
