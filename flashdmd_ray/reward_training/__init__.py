"""Training of latent rewards: pairs of images of which one is preferred, the loop, its figures, the model."""
