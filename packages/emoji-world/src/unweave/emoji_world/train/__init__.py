"""Training recipes of the embedded models: `python -m unweave.emoji_world.train MODEL`."""
