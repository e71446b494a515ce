"""The whole job on real video, on a laptop."""
