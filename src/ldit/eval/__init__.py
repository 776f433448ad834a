"""How good images are: features of images, and metrics computed from them."""
