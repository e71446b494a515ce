"""Latent codec of the demo, and video files."""

VIDEOS = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif")
"""Ends of the names of video files, in lower case."""
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Ends of the names of image files, in lower case."""
