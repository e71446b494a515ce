"""Videos, images and prompts to training data, by Wan's VAE, UMT5 and CLIP; samples to videos."""
