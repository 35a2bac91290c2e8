"""Random damage to files of adapters and checkpoints: each is read right, or refused."""
