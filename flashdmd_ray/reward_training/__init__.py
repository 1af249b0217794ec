"""Training of latent rewards: pairs of images of which one is preferred, the loop, what it measures, the model it leaves behind."""
