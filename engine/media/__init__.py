"""Latent codec and video files of the demo."""
