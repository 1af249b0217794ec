"""Networks and what they need to be loaded: the teacher families behind `Denoiser`, SAM, the discriminator, reward models."""
