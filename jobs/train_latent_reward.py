"""Train a latent reward: `python jobs/train_latent_reward.py [CONFIG] [--set key=value ...] [--dry-run]`."""

import sys

from flashdmd_ray.reward_training.cli import train_latent_reward_command

if __name__ == "__main__":
    sys.exit(train_latent_reward_command())
